"""A limit on what all downloads of a client take together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["Throttle"]


class Throttle:
    """So many bytes per second, on average; None for no limit.

    Who has taken bytes waits until their time is over: what is asked for later waits for that,
    too, so several downloads share the rate as they come.
    """

    def __init__(self, rate: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._free_at = 0.0

    def delay(self, size: int) -> float:
        """Count bytes that were taken, and return for how many seconds to take no more."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._free_at = max(self._free_at, now) + size / self._rate
        return self._free_at - now

    async def take(self, size: int) -> None:
        """Count bytes that were taken, and wait until more may be."""
        if delay := self.delay(size):
            await asyncio.sleep(delay)
