"""``python -m serpentine.cli``."""

from serpentine.cli.main import main

main()
