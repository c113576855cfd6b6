"""Our command line in a process whose imports are done: what is left when Python has started.

    python -m bench.imported MODULES BEGAN ARGUMENTS...

MODULES is a file of names, one a line; if it is not there, the command runs and the file is made
of what it imported.  BEGAN is a file for the moment at which the imports were done, of the clock
that all processes share.
"""

from __future__ import annotations

import contextlib
import sys
import time
from importlib import import_module
from pathlib import Path


def main() -> None:
    modules, began = map(Path, sys.argv[1:3])
    sys.argv[:] = ["serpentine", *sys.argv[3:]]
    known = modules.exists()
    if known:
        for name in modules.read_text().split():
            # Some are made by others, and cannot be imported by their names.
            with contextlib.suppress(ImportError):
                import_module(name)
    from serpentine.cli.main import main as command

    began.write_text(str(time.monotonic()))
    try:
        command()
    finally:
        if not known:
            modules.write_text("\n".join(name for name in sys.modules if name != "__main__"))


if __name__ == "__main__":
    main()
