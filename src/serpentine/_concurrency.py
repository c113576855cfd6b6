"""The few pieces of concurrency that asyncio lacks, in one place.

Everything else is ``asyncio.TaskGroup`` and ``asyncio.timeout``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Hashable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from serpentine.errors import SerpentineError

__all__ = ["KeyedLock", "shielded", "task_group", "unbroken"]

_T = TypeVar("_T")


async def shielded(work: Coroutine[Any, Any, _T], *, timeout: float) -> _T:
    """Run clean-up to its end even while the caller is being cancelled.

    A cancellation that arrives meanwhile is raised after the work is done, or after
    ``timeout`` seconds (then the work is cancelled and TimeoutError raised).
    """

    async def bounded() -> _T:
        async with asyncio.timeout(timeout):
            return await work

    # The one bare task of the project: asyncio has no cancel scopes, and a TaskGroup would
    # cancel the work together with its caller.  It is always awaited to its end below.
    task = asyncio.get_running_loop().create_task(bounded())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                break
            cancelled = error
        except BaseException:  # noqa: BLE001, S110 - raised by task.result() below
            pass
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()


async def unbroken(work: Coroutine[Any, Any, _T], *, patience: float) -> _T:
    """Finish what was begun before a cancellation counts; without one, there is no time limit.

    For requests to a server that does not stop where it is when nobody waits any more: only
    when it has answered is it known what there is to clean up.  A cancellation is raised then,
    or after ``patience`` seconds more, in which case the work is cancelled.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            with suppress(TimeoutError):
                await shielded(_end_of(task), timeout=patience)
        finally:
            task.cancel()
            # Looked at, so that nobody is told of it later; the cancellation is what counts.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


async def _end_of(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Open a TaskGroup whose failure is one plain exception, not an ExceptionGroup.

    The error that is raised is the first one of our own tree (it has a message for the user),
    else the first one; the others are its notes, so that none is lost.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        errors = list(_leaves(failures))
        chosen = next((e for e in errors if isinstance(e, SerpentineError)), errors[0])
        for other in errors:
            if other is not chosen:
                chosen.add_note(f"also failed: {type(other).__name__}: {other}")
        raise chosen from chosen.__cause__


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


class KeyedLock:
    """One lock per key, made when first wanted and forgotten when nobody wants it.

    With "take the lock, then look whether the work is done" it gives a single flight in which
    a cancelled leader hands over to the next waiter.
    """

    def __init__(self) -> None:
        self._locks: dict[Hashable, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def __call__(self, key: Hashable) -> AsyncIterator[None]:
        """Hold the key's lock; waiters get it in the order in which they came."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def __len__(self) -> int:
        return len(self._locks)
