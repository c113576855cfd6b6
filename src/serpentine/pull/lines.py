"""How many connections the downloads of one pull have: as many as bring more, and no more.

Blobs come first, each over one connection.  What is free after that is for parts of large blobs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

__all__ = ["Lines", "worth_having"]

# Blobs at once before anything is known, as Docker and containerd have it; and connections at the
# utmost, which no registry minds.
FIRST = 3
MOST = 5
# What more connections must bring, as a part of what they would bring if each got as much.
GAIN = 0.4
# Seconds after a change of their number that do not count (a new connection begins slowly), and
# those that are measured then.
SETTLE = 0.25
WINDOW = 0.5
# After so many seconds, what another number of them brought is no longer known.
FORGET = 20.0


def worth_having(rates: Mapping[int, float], used: int, most: int) -> int:
    """Return how many connections to have.

    rates: bytes per second that so many have brought together, as far as that was measured.
    used: how many there are; what they bring is among the rates.

    The highest number that brought clearly more than those below it.  If that is ``used``, and
    nobody has tried more, twice as many are worth a try.
    """
    best = min(rates)
    for number in sorted(rates):
        if rates[number] >= rates[best] * _enough(best, number):
            best = number
    if best == used == max(rates):
        best *= 2
    return min(best, most)


def _enough(fewer: int, more: int) -> float:
    return 1 + GAIN * (more - fewer) / fewer


class Lines:
    """The connections of one pull, in use and free.

    most: of blobs and parts together, and blobs at once to begin with; None for FIRST and MOST.
    ``parts``: whether the registry gives parts.
    """

    def __init__(
        self, most: int | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = most or FIRST
        self._most = most or MOST
        self._clock = clock
        self.parts = True
        self._used = 0
        self._worth = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._rates: dict[int, tuple[float, float]] = {}
        self._bytes = 0
        self._since = 0.0

    @property
    def used(self) -> int:
        """How many are in use."""
        return self._used

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Have a connection for a blob; who asks first gets one first."""
        if self._used < self._allowed_blobs() and not self._waiting:
            self._change(+1)
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif not turn.cancelled():
                    self._release()  # it came in the moment in which we were cancelled
                raise
        try:
            yield
        finally:
            self._release()
            # With fewer blobs, what one of them gets is to be measured before it comes in parts.
            self._worth = min(self._worth, self._used)

    def more(self) -> bool:
        """Tell whether there is a free one for parts of a blob, and it may bring more."""
        return self.parts and not self._waiting and self._used < self._worth

    def try_more(self) -> bool:
        """Take it, if there is."""
        if more := self.more():
            self._change(+1)
        return more

    def too_many(self) -> bool:
        """Tell whether one that a part has is better given back: to a blob, or to nobody."""
        return bool(self._waiting) or self._used > self._worth

    def give_back(self) -> None:
        """Give back what ``try_more`` took."""
        self._release()

    def came(self, size: int) -> None:
        """Note bytes of the network."""
        now = self._clock()
        if not self._used or now < self._since:
            return  # nobody counts them, or they do not count yet
        self._bytes += size
        if now - self._since < WINDOW:
            return
        self._rates[self._used] = self._bytes / (now - self._since), now
        self._bytes, self._since = 0, now
        known = {n: rate for n, (rate, at) in self._rates.items() if now - at < FORGET}
        self._worth = worth_having(known, self._used, self._most)
        while self._used < self._allowed_blobs() and self._hand_over():
            self._change(+1)

    def _allowed_blobs(self) -> int:
        return max(self._first, self._worth)

    def _release(self) -> None:
        self._used -= 1
        if self._used < self._allowed_blobs() and self._hand_over():
            self._used += 1  # as many as before: what is being measured goes on
        else:
            self._change(0)

    def _hand_over(self) -> bool:
        """Let the next blob have one; False if there is none."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its task may have been cancelled, and not know it yet
                turn.set_result(None)
                return True
        return False

    def _change(self, by: int) -> None:
        self._used += by
        self._bytes, self._since = 0, self._clock() + SETTLE
