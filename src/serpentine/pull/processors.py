"""Whether the machine has processors left that do nothing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Idle", "Processors", "idle_so_far"]

# Linux: the seconds since the start of the system, and those that its processors did nothing,
# added up (proc_uptime(5)).
_UPTIME = Path("/proc/uptime")

# The kernel counts in hundredths of a second.
LOOK_EVERY = 0.5


class Idle(NamedTuple):
    """What there has been so far, in seconds: of time, and of time of idle processors."""

    uptime: float
    idle: float

    def share_since(self, before: Idle) -> float:
        """Return the part of all processors' time since ``before`` that they did nothing."""
        passed = (self.uptime - before.uptime) * (os.cpu_count() or 1)
        return (self.idle - before.idle) / passed if passed > 0 else 1.0


def idle_so_far() -> Idle | None:
    """Look now; None where the system does not tell.  Reads a file of the kernel's."""
    try:
        uptime, idle = map(float, _UPTIME.read_text().split())
    except (OSError, ValueError):
        return None
    # There are kernels that know the file and do not count.
    return Idle(uptime, idle) if idle else None


class Processors:
    """What part of the machine's processors has done nothing lately.

    ``idle`` is None until that is known, and 1 where the system does not tell.
    """

    def __init__(self) -> None:
        self.idle: float | None = None
        self._before: Idle | None = None
        self._at: float | None = None

    async def look(self, now: float) -> None:
        """Look, if that is half a second ago; ``now`` is any clock's, in seconds."""
        if self._at is not None and now - self._at < LOOK_EVERY:
            return
        before, self._before = self._before, await asyncio.to_thread(idle_so_far)
        if self._before is None:
            self.idle = 1.0
        elif before is not None:
            self.idle = self._before.share_since(before)
        self._at = now
