"""A disk on which nobody seems to have removed anything lately."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bench.tools import left_out

CACHES = Path("/proc/sys/vm/drop_caches")


def forget_removed(warm: Iterable[Path]) -> None:
    """Let the kernel forget what was removed, but not what is in these files.

    ext4 does not give an inode away again within some minutes of its removal, as long as it has its
    block in memory: it goes through all of them for each new file.  60,000 files took 1.4 s, and 18
    to 39 s after as many had been removed: what one program removed, the next one would pay for.
    """
    os.sync()
    try:
        CACHES.write_text("1\n")
    except OSError as error:
        left_out(f"the kernel's caches cannot be dropped ({error}): many files take longer")
        return
    for path in warm:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
