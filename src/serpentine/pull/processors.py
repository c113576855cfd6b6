"""Whether the machine has processors left that do nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Idle", "idle_so_far"]

# Linux: the seconds since the start of the system, and those that its processors did nothing,
# added up (proc_uptime(5)).
_UPTIME = Path("/proc/uptime")


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
    return Idle(uptime, idle)
