"""``python -m serpentine``."""

from serpentine.cli.main import main

main()
