"""Blocking work beside the event loop: generators that read, consumers that write."""

from __future__ import annotations

import asyncio
import os
import queue
import select
import stat
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any, BinaryIO, Generic, TypeVar, cast

from serpentine._concurrency import shielded, task_group

__all__ = ["Aborted", "Interruptible", "Pieces", "consume", "in_own_thread", "in_threads"]

_T = TypeVar("_T")

# Blocks that were made and are not yet taken.
AHEAD = 2
CLEANUP_TIMEOUT = 60.0


class Aborted(Exception):
    """Raised in a thread that waits for more, when nobody wants its work any more."""


class _Work(Generic[_T]):
    """Work in a thread of its own, whose end can be awaited even when it is not wanted any more.

    Not one of the loop's pool, which are few: a consumer waits there for what a generator makes,
    and enough of them would leave no thread to make it.
    """

    def __init__(self, work: Callable[[], _T]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._work = work
        # A daemon: a read that never returns must not keep the program from ending.
        threading.Thread(target=self._run, name="serpentine-files", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            self._error = error
        try:
            self._loop.call_soon_threadsafe(self._ended.set)
        except RuntimeError:
            return  # the loop has ended, and with it who waited

    async def end(self) -> None:
        await self._ended.wait()

    async def result(self) -> _T:
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return cast("_T", self._result)


async def in_own_thread(work: Callable[[], _T]) -> _T:
    """Run something short in a thread that ends with it; it is always awaited."""
    running = _Work(work)
    try:
        return await running.result()
    finally:
        await shielded(running.end(), timeout=CLEANUP_TIMEOUT)


async def in_threads(
    blocks: Generator[_T, None, None], interrupt: Callable[[], None] | None = None
) -> AsyncGenerator[_T, None]:
    """Run a generator that blocks; one step at a time is under way.

    interrupt: ends a step that would last for ever; called before the generator is closed.
    """
    running = threading.Lock()

    def step() -> _T | None:
        with running:
            return next(blocks, None)

    def close() -> None:
        # After a cancellation, a step may still run: its thread cannot be stopped.
        with running:
            blocks.close()

    try:
        while (block := await asyncio.to_thread(step)) is not None:
            yield block
    finally:
        if interrupt is not None:
            interrupt()
        await shielded(asyncio.to_thread(close), timeout=CLEANUP_TIMEOUT)


class Pieces:
    """Pieces of bytes as a file that is read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """Return some bytes, at most ``size``; none at the end."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._piece = memoryview(piece)
        size = len(self._piece) if size < 0 else size
        taken, self._piece = bytes(self._piece[:size]), self._piece[size:]
        return taken


class _Feed:
    """What the event loop puts in, a thread takes out."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(AHEAD)
        self._blocks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._aborted = False

    async def put(self, block: bytes) -> None:
        await self._room.acquire()
        self._blocks.put(block)

    def end(self) -> None:
        self._blocks.put(None)

    def abort(self) -> None:
        self._aborted = True
        self._blocks.put(None)

    def __iter__(self) -> Iterator[bytes]:
        """Yield what was put in, in the thread."""
        while True:
            block = self._blocks.get()
            if self._aborted:
                raise Aborted
            if block is None:
                return
            self._loop.call_soon_threadsafe(self._room.release)
            yield block


async def consume(
    blocks: AsyncIterator[bytes], work: Callable[[BinaryIO], _T], *, wait: bool = True
) -> _T:
    """Let a function read blocks as a file, in a thread; it ends before this returns or raises.

    When the blocks fail or we are cancelled, its next read raises Aborted.
    wait: False for a function that leaves nothing to clean up and may be stuck elsewhere.
    """
    feed = _Feed()

    async def carry() -> None:
        async for block in blocks:
            if block:
                await feed.put(block)
        feed.end()

    running: _Work[_T] = _Work(lambda: work(cast("BinaryIO", Pieces(iter(feed)))))
    try:
        async with task_group() as group:
            carrying = group.create_task(carry())
            try:
                return await running.result()
            finally:
                # It may have had enough before the end.
                carrying.cancel()
    finally:
        feed.abort()
        if wait:
            await shielded(running.end(), timeout=CLEANUP_TIMEOUT)
    raise AssertionError("unreachable")


class Interruptible:
    """An input that may never come, like a terminal or a pipe: ``close`` ends a read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._pipe: tuple[int, int] | None = None
        try:
            mode = os.fstat(stream.fileno()).st_mode
        except (OSError, AttributeError):
            return  # no file of the system
        # There is no waiting for several things at once on Windows, and no need for a file.
        if sys.platform != "win32" and not stat.S_ISREG(mode):
            self._pipe = os.pipe()

    def read(self, size: int = -1) -> bytes:
        """Return some bytes, none at the end; raises Aborted."""
        if self._pipe is not None:
            ready, _, _ = select.select([self._stream.fileno(), self._pipe[0]], [], [])
            if self._pipe[0] in ready:
                raise Aborted
        some: Any = getattr(self._stream, "read1", self._stream.read)
        data = some(size)
        assert isinstance(data, bytes)
        return data

    def interrupt(self) -> None:
        """End a read that waits, and all later ones."""
        if self._pipe is not None:
            os.write(self._pipe[1], b"x")

    def close(self) -> None:
        """Let go of what it needed; the stream stays open."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            for fd in pipe:
                os.close(fd)
