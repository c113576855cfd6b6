"""Who made a step or began a pull, so that what a killed client left is known to be nobody's.

A client notes itself, in a label, by what no other process can be taken for: the machine's boot,
its namespace of processes, its number and its start time.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["current_session", "is_dead"]


def current_session() -> str:
    """Return what names this process; empty where a system does not tell."""
    try:
        return f"{_machine()}.{os.getpid()}.{_started(os.getpid())}"
    except OSError:
        return ""


def is_dead(session: str) -> bool:
    """Tell whether the process is known to be gone.  False for other machines' processes."""
    machine, _, process = session.partition(".")
    pid, _, started = process.partition(".")
    try:
        if not pid.isdigit() or machine != _machine():
            return False
        return _started(int(pid)) != started
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        raise FileNotFoundError(pid) from None
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
