"""What is known of hosts: when one may be asked again, and which are best left alone for a while.

Shared by all requests of a client, and by a file for each host with other processes: a registry
that asks one of us to wait means all of us.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

__all__ = ["DEAD_FOR", "HostMemory"]

# A mirror that failed is not asked again for this long, in seconds.
DEAD_FOR = 120.0
# Times in a file further away than this were written by a clock that was wrong.
_LONGEST = 24 * 3600.0
_MAX_FILE = 4096


class _Noted(msgspec.Struct):
    """Seconds of the wall clock, as several processes share it; 0 for never."""

    closed_until: float = 0.0
    dead_until: float = 0.0
    why: str = ""


class _Known(msgspec.Struct):
    noted: _Noted
    stamp: tuple[int, int] | None = None


class HostMemory:
    """One for each client.  Without a folder, or one that cannot be written, it is ours alone.

    It reads and writes files: call it from a thread, or several.
    """

    def __init__(
        self, folder: Path | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[str, _Known] = {}
        # A look may take what is in the file for what is known: not between a change and its
        # being written.
        self._lock = threading.Lock()

    def closed_for(self, host: str) -> float:
        """Return for how many more seconds the host wants no request; 0.0 if it may be asked."""
        with self._lock:
            return self._left(self._look(host).closed_until)

    def close(self, host: str, seconds: float) -> None:
        """Note that a host asked not to be asked again for so long."""
        with self._lock:
            noted = self._look(host)
            until = self._clock() + min(seconds, _LONGEST)
            if until > noted.closed_until:
                noted.closed_until = until
                self._write(host)

    def is_dead(self, host: str) -> bool:
        """Tell whether the host failed a short while ago."""
        with self._lock:
            return self._left(self._look(host).dead_until) > 0

    def note_dead(self, host: str, why: str) -> None:
        """Note that a host failed, so that others are asked first for a while."""
        with self._lock:
            noted = self._look(host)
            noted.dead_until, noted.why = self._clock() + DEAD_FOR, why[:500]
            self._write(host)

    def file(self, host: str) -> Path | None:
        """Return where it is kept what is known of a host; None if it is not kept."""
        return self._path(host) if self._folder is not None else None

    def _left(self, until: float) -> float:
        left = until - self._clock()
        return left if 0 < left <= _LONGEST else 0.0

    def _look(self, host: str) -> _Noted:
        known = self._known.setdefault(host, _Known(_Noted()))
        if self._folder is not None:
            # Nearly always there is no file, or the one that was read: one look costs a
            # few microseconds, so that what another process learned counts at once.
            path = self._path(host)
            with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    if known.stamp is not None:  # somebody knows that it is over
                        known.noted, known.stamp = _Noted(), None
                    raise
                stamp = (status.st_mtime_ns, status.st_ino)
                if stamp != known.stamp and status.st_size <= _MAX_FILE:
                    known.stamp = stamp
                    known.noted = msgspec.json.decode(path.read_bytes(), type=_Noted)
        return known.noted

    def _write(self, host: str) -> None:
        if self._folder is None:
            return
        path = self._path(host)
        temporary = path.with_suffix(f".{os.getpid()}")
        # A memory that cannot be kept is no reason to fail.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                temporary.write_bytes(msgspec.json.encode(self._known[host].noted))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _path(self, host: str) -> Path:
        assert self._folder is not None
        name = re.sub(r"[^a-z0-9.-]", lambda m: f"_{ord(m[0]):x}", host.lower())
        return self._folder / f"{name[:200]}.json"
