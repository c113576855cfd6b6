"""How many connections the downloads of one pull have: as many as bring more, and no more.

Blobs come first, each over one connection.  What is free after that is for parts of large blobs.

Where fewer bring as much, the youngest blobs are held until the others are there: what comes one
after the other is unpacked while the rest comes, what comes together after the last byte.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

__all__ = ["Line", "Lines", "enough", "worth_having"]

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
# What fewer must bring, as a part of what the best number brings, to be enough.
NEARLY = 0.9
# And when they were enough before: what is unpacked by now takes processors from the downloads, and
# what others brought before that is more than they would bring.
STILL = 0.6
# Fewer are tried when so many seconds are left: less is not worth it, and more is too long to hold
# a blob that another client may wait for, over a connection that its registry may give up.
SOON = 3.0
LATE = 30.0
# Seconds without a byte of the others after which none is held any more.
QUIET = 1.0
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


def enough(rates: Mapping[int, float]) -> int:
    """Return the lowest number of connections that has brought nearly as much as any other."""
    most = max(rates.values())
    return min(number for number, rate in rates.items() if rate >= NEARLY * most)


class Line:
    """The connection of a blob of ``size`` bytes.

    ``left``: how many of them are to come.  ``patient``: whether it may be held, since what breaks
    off meanwhile can be continued.  ``held_at``: what was left when it was last held, or None.
    """

    def __init__(self, lines: Lines, size: int) -> None:
        self._lines = lines
        self.left = size
        self.patient = False
        self.held_at: int | None = None
        self.moved = False
        self.go = asyncio.Event()
        self.go.set()

    def came(self, size: int) -> None:
        """Note bytes of the network."""
        self.left -= size
        self.moved = True
        self._lines.came(size)

    def done(self) -> None:
        """Leave it to others: all bytes are there."""
        self._lines.leave(self)

    async def turn(self) -> float:
        """Wait as long as others are to have the link; return the seconds."""
        if self.go.is_set():
            return 0.0
        self.held_at = self.left
        began = self._lines.now()
        while not self.go.is_set():
            try:
                async with asyncio.timeout(QUIET):
                    await self.go.wait()
            except TimeoutError:
                now = self._lines.now()
                if now - began > LATE or now - self._lines.last > QUIET:
                    self._lines.hold_no_more()
        return self._lines.now() - began


class Lines:
    """The connections of one pull, in use and free.

    most: of blobs and parts together, and blobs at once; None for what is measured to be good.
    ``parts``: whether the registry gives parts.  ``last``: when bytes came, by the clock ``now``.
    """

    def __init__(
        self, most: int | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = most or FIRST
        self._most = most or MOST
        self._may_hold = most is None
        self.now = clock
        self.last = clock()
        self.parts = True
        # How many blobs may come at once.
        self._blobs = self._first
        self._used = 0
        self._worth = 0
        # Of the blobs that have one, in the order in which they asked; and those that are held.
        self._lines: list[Line] = []
        self._held: list[Line] = []
        # The number that was enough.
        self._enough = 0
        self._waiting: deque[tuple[asyncio.Future[None], Line]] = deque()
        self._rates: dict[int, tuple[float, float]] = {}
        self._bytes = 0
        self._since = 0.0

    @property
    def used(self) -> int:
        """How many are in use; of a blob that is held, none is."""
        return self._used

    @asynccontextmanager
    async def one(self, size: int = 0) -> AsyncIterator[Line]:
        """Have a connection for a blob of so many bytes; who asks first gets one first."""
        line = Line(self, size)
        if self._used < self._blobs and not self._blob_wants_one():
            self._lines.append(line)
            self._change(+1)
        else:
            turn = asyncio.get_running_loop().create_future()
            entry = turn, line
            self._waiting.append(entry)
            try:
                while not turn.done():
                    await asyncio.wait([turn], timeout=QUIET)
                    self._listen()
            except asyncio.CancelledError:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self.leave(line)  # it may have come in the moment in which we were cancelled
                raise
        try:
            yield line
        finally:
            self.leave(line)

    def more(self) -> bool:
        """Tell whether there is a free one for parts of a blob, and it may bring more."""
        return self.parts and not self._blob_wants_one() and self._used < self._worth

    def try_more(self) -> bool:
        """Take it, if there is."""
        if more := self.more():
            self._change(+1)
        return more

    def too_many(self) -> bool:
        """Tell whether one that a part has is better given back: to a blob, or to nobody."""
        return self._blob_wants_one() or self._used > self._worth

    def give_back(self) -> None:
        """Give back what ``try_more`` took."""
        self._release()

    def came(self, size: int) -> None:
        """Note bytes of the network."""
        self.last = now = self.now()
        if not self._used or now < self._since:
            return  # nobody counts them, or they do not count yet
        self._bytes += size
        if now - self._since < WINDOW:
            return
        self._rates[self._used] = self._bytes / (now - self._since), now
        self._bytes, self._since = 0, now
        known = {n: rate for n, (rate, at) in self._rates.items() if now - at < FORGET}
        self._worth = worth_having(known, self._used, self._most)
        running = [line for line in self._lines if line not in self._held]
        fewer = self._fewer(known, running)
        self._blobs = max(self._first, self._worth) if fewer is None else fewer
        if fewer is None and self._held:
            self._blobs = max(self._blobs, self._used + len(self._held))
        for line in running:
            line.moved = False
        while fewer is not None and self._used > fewer and self._hold(running):
            pass
        self._fill()

    def hold_no_more(self) -> None:
        """Let all go that are held, and hold none again."""
        self._may_hold = False
        self._blobs = max(self._blobs, self._first, self._used + len(self._held))
        self._fill()

    def leave(self, line: Line) -> None:
        """Leave to others what a blob has had, if it still has it."""
        if line not in self._lines:
            return
        self._lines.remove(line)
        if line in self._held:
            self._held.remove(line)
        else:
            self._release()
        # With fewer blobs, what one of them gets is to be measured before it comes in parts.
        self._worth = min(self._worth, self._used)

    def _listen(self) -> None:
        """Let more blobs come when those that do bring nothing, whatever they wait for."""
        if self._blobs < self._first and self.now() - self.last > QUIET:
            self._blobs, self._enough = self._first, 0
            self._fill()

    def _fewer(self, known: Mapping[int, float], running: list[Line]) -> int | None:
        """Return how many blobs are to come at once; None where none is to be held for that."""
        if not self._may_hold or self._used > len(running):  # some are parts
            return None
        left = sum(line.left for line in (*self._lines, *(line for _, line in self._waiting)))
        seconds = left / max(known[self._used], 1.0)
        few = bool(self._held) or self._blobs < self._first
        if seconds > (2 * LATE if few else LATE) or (seconds < SOON and not few):
            return None
        fewest = enough(known)
        if self._used == self._enough and known[self._used] >= STILL * max(known.values()):
            fewest = self._used
        if fewest == self._used:
            self._enough = fewest
            if fewest > 1 and fewest - 1 not in known:
                fewest -= 1  # nobody has tried
            elif max(known) > fewest:
                return fewest
        if fewest < self._used:
            # Who brings nothing, waits for somebody else, who may wait for one that we hold.
            return fewest if all(line.moved for line in running) else None
        return max(fewest, self._worth)

    def _hold(self, running: list[Line]) -> bool:
        """Hold the youngest one that may be; False if there is none."""
        while len(running) > 1:
            line = running.pop()
            if line.patient:
                line.go.clear()
                self._held.append(line)
                self._change(-1)
                return True
        return False

    def _release(self) -> None:
        self._used -= 1
        if self._next():
            self._used += 1  # as many as before: what is being measured goes on
        else:
            self._change(0)

    def _fill(self) -> None:
        while self._next():
            self._change(+1)

    def _next(self) -> bool:
        """Let the next blob have one, if there may be more and there is a blob."""
        return self._used < self._blobs and (self._let_go() or self._hand_over())

    def _blob_wants_one(self) -> bool:
        return bool(self._waiting or self._held)

    def _let_go(self) -> bool:
        """Let one that is held go on, the oldest first; False if there is none."""
        if not self._held:
            return False
        line = min(self._held, key=self._lines.index)
        self._held.remove(line)
        line.go.set()
        return True

    def _hand_over(self) -> bool:
        """Let the next one that waits have one; False if there is none."""
        while self._waiting:
            turn, line = self._waiting.popleft()
            if not turn.done():  # its task may have been cancelled, and not know it yet
                self._lines.append(line)
                turn.set_result(None)
                return True
        return False

    def _change(self, by: int) -> None:
        self._used += by
        self._bytes, self._since = 0, self.now() + SETTLE
