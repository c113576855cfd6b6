"""Named pipes between us and a shim, read and written without blocking the event loop."""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # whoever has no containerd here has other pipes

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["Reader", "Writer"]

CHUNK = 1 << 18
# What a pipe holds: the kernel's default of 64 KiB costs a round of the event loop each.
PIPE_SIZE = 1 << 20


class Reader:
    """The reading end of a pipe, opened before its path is given away (trap 46)."""

    def __init__(self, path: Path, on_data: Callable[[bytes], None]) -> None:
        self._on_data = on_data
        self._ended = asyncio.Event()
        self._fd: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        _enlarge(self._fd)
        # Until somebody has opened the other end, epoll says nothing of it: not end of file.
        asyncio.get_running_loop().add_reader(self._fd, self._ready)

    def _ready(self) -> None:
        assert self._fd is not None
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last process has gone
                raise
            data = b""
        if data:
            self._on_data(data)
        else:
            self.close()

    async def wait(self) -> None:
        """Wait until everybody who wrote has closed it."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop reading; what is still in the pipe is lost."""
        fd, self._fd = self._fd, None
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._ended.set()


class Writer:
    """The writing end of a pipe."""

    def __init__(self, path: Path) -> None:
        # For reading, too: alone for writing it would not open before the shim reads.
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        _enlarge(self._fd)

    async def write(self, data: bytes) -> None:
        """Write all of it; raises BrokenPipeError when it was closed meanwhile."""
        view = memoryview(data)
        while view:
            if self._fd is None:
                raise BrokenPipeError(errno.EPIPE, "the pipe was closed")
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        fd = self._fd
        assert fd is not None
        loop.add_writer(fd, ready.set)
        try:
            await ready.wait()
        finally:
            if self._fd == fd:
                loop.remove_writer(fd)

    def close(self) -> None:
        """Close it: the reader sees end of file after what is in the pipe."""
        fd, self._fd = self._fd, None
        if fd is not None:
            asyncio.get_running_loop().remove_writer(fd)
            os.close(fd)


def _enlarge(fd: int) -> None:
    # A user has a limit of such pipes; without, it is only slower.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
