"""One process at a time: a lock on a file, freed by the system when its holder dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from serpentine.errors import DaemonFailed

__all__ = ["locked"]

POLL = 0.02
# Whoever waits longer than this should be told what for.
TELL_AFTER = 1.0


@asynccontextmanager
async def locked(
    path: Path, *, timeout: float, on_wait: Callable[[], None] | None = None
) -> AsyncIterator[None]:
    """Hold the lock of a file, whose directory must exist.

    timeout: seconds to wait for another process.
    on_wait: called once when that takes more than a second.

    Raises DaemonFailed when the time is over, or when there can be no such file.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    began = time.monotonic()
    told = on_wait is None
    while True:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waited = time.monotonic() - began
            if waited > timeout:
                raise DaemonFailed(
                    f"another process has been starting or stopping containerd for"
                    f" {timeout:.0f} seconds",
                    hint=f"end that process; it holds {path}",
                ) from None
            if not told and waited > TELL_AFTER:
                told = True
                assert on_wait is not None
                on_wait()
            await asyncio.sleep(POLL)
        except OSError as error:
            raise DaemonFailed(
                f"cannot lock {path}: {error.strerror}", hint="make its directory writable"
            ) from None
        else:
            break
    try:
        yield
    finally:
        lock.release()
