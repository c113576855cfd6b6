"""A blob in parts that come over several connections at once, and are passed on in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

__all__ = ["PART", "PARTS_AHEAD", "Part", "Parts"]

# Bytes of one request: so many that the time of a round trip hardly counts.
PART = 4 << 20
# How many may be on their way or wait for their turn: what is held in memory, and what comes again
# if we are killed.
PARTS_AHEAD = 6
# Of a part, when the next one is asked for: what is left of it comes during the round trip.
NEARLY = 0.75


@dataclass(slots=True, eq=False)
class Part:
    """The bytes from ``start`` to before ``end``."""

    start: int
    end: int
    chunks: list[bytes] = field(default_factory=list)
    came: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    nearly: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self.start + self.came == self.end

    def put(self, chunk: bytes) -> None:
        """Take what comes next; ``BlobStream`` sees to it that it is not too much."""
        self.chunks.append(chunk)
        self.came += len(chunk)
        self.moved.set()
        if self.came >= NEARLY * (self.end - self.start):
            self.nearly.set()

    def fail(self, error: Exception) -> None:
        """Note that no more comes; ``read`` raises it behind what has come."""
        self.error = error
        self.moved.set()
        self.nearly.set()


class Parts:
    """The parts from ``start`` to before ``end``: handed out to be fetched, read in their order."""

    def __init__(self, start: int, end: int, *, size: int, ahead: int) -> None:
        self._next = start
        self._end = end
        self._size = size
        self._ahead = ahead
        # Those that were handed out and not read to their end yet.
        self._open: list[Part] = []
        self._room = asyncio.Event()
        self._begun = asyncio.Event()

    def stop(self) -> None:
        """Hand out no more: who reads comes to the end of those that were."""
        self._end = self._next

    @property
    def left(self) -> bool:
        """Whether there are any that nobody fetches yet."""
        return self._next < self._end

    async def take(self) -> Part | None:
        """Return the next one to fetch, when there is room for it; None when there is none left."""
        while self.left:
            if len(self._open) < self._ahead:
                part = Part(self._next, min(self._next + self._size, self._end))
                self._next = part.end
                self._open.append(part)
                self._begun.set()
                return part
            self._room.clear()
            await self._room.wait()
        return None

    async def read(self) -> AsyncIterator[bytes]:
        """Yield all bytes in their order, as they come; raises what a part failed with.

        Only here, and only behind the bytes before it: who reads is not interrupted while he passes
        something on.
        """
        while self._open or self.left:
            if not self._open:
                self._begun.clear()
                await self._begun.wait()
            part = self._open[0]
            while part.chunks or not part.whole:
                if not part.chunks:
                    if part.error is not None:
                        raise part.error
                    part.moved.clear()
                    await part.moved.wait()
                chunks, part.chunks = part.chunks, []
                # What was passed on is let go of at once.
                chunks.reverse()
                while chunks:
                    yield chunks.pop()
            del self._open[0]
            self._room.set()
