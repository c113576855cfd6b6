"""Commands in the container of our containerd, through the container engine's exec.

To start one takes the engine 60 to 100 ms, so what is short is given to a shell that stays.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from serpentine._concurrency import shielded
from serpentine.daemon.api import ContainerAPI, reach
from serpentine.daemon.container import ContainerDaemon
from serpentine.errors import DaemonFailed

if TYPE_CHECKING:
    from aiodocker.stream import Stream

__all__ = ["ContainerShell"]

ANSWER_TIMEOUT = 60.0
CLOSE_TIMEOUT = 10.0
# Numbers of streams in Docker's protocol, which are those of file descriptors.
_STDOUT, _STDERR = 1, 2
# The image's script empties it when the container starts anew.
_FOLDER = "/run/serpentine-steps"

# What reading and writing raise when the connection is gone; an answer that does not come counts
# as that.  aiodocker asserts that there is a connection.
_BROKEN = (aiohttp.ClientError, OSError, AssertionError)

# $1: a directory of its own.  Reads "NUMBER SIZE", then a script of so many bytes; answers
# "NUMBER STATUS SIZE SIZE", then what it printed on stdout and stderr.  dd, unlike head, never
# reads more than it was told to, whoever wrote it.
_SESSION = """\
umask 077
mkdir -p "$1" || exit 1
echo ready
while read -r number size; do
  script=$(dd bs="$size" count=1 iflag=fullblock 2>/dev/null)
  (eval "$script") >"$1/out" 2>"$1/err" </dev/null
  printf '%s %s %s\\n' "$number" "$?" "$(echo $(stat -c %s "$1/out" "$1/err"))"
  cat "$1/out" "$1/err"
done
for file in "$1"/*/pid; do
  read -r pid 2>/dev/null <"$file" && kill -s KILL -- "-$pid" 2>/dev/null
done
rm -rf "$1"
"""


class ContainerShell:
    """A way to run commands in the container.  Opens what it needs when it is needed."""

    def __init__(self, daemon: ContainerDaemon) -> None:
        self._daemon = daemon
        self._lock = asyncio.Lock()
        self._reached = AsyncExitStack()
        self._api: ContainerAPI | None = None
        self._session: _Session | None = None

    async def folder(self) -> str:
        """Return a directory there that goes when we go, also when we are killed."""
        async with self._lock:
            return (await self._open_session()).folder

    async def run(self, script: str, *arguments: str) -> bytes:
        """Run a shell script and return what it prints; raises DaemonFailed if it fails.

        It is run a second time if the first answer was lost.
        """
        text = f"set -- {shlex.join(arguments)}\n{script}".encode()
        async with self._lock:
            try:
                status, out, error = await (await self._open_session()).ask(text)
            except _Lost:
                # Somebody ended it, or the container was started anew.
                await self._close_session()
                try:
                    status, out, error = await (await self._open_session()).ask(text)
                except _Lost:
                    raise self._gone() from None
        if status:
            said = " | ".join(error.decode(errors="replace").split("\n")[-3:])
            raise DaemonFailed(
                f"a command in the container {self._name} failed: {said or f'status {status}'}",
                hint="see 'serpentine daemon logs', or try 'serpentine daemon upgrade'",
            )
        return out

    @asynccontextmanager
    async def open(self, script: str, *arguments: str) -> AsyncIterator[_Stream]:
        """Run a shell script whose output and input are streamed; leaving the context ends both.

        It does not end the script, which only sees the end of its input.
        """
        async with self._lock:
            api = await self._reach()
        command = ["sh", "-c", script, "serpentine", *arguments]
        async with api.exec(self._name, command) as stream:
            yield _Stream(stream, self._gone)

    async def close(self) -> None:
        """End what is kept between commands."""
        async with self._lock:
            await shielded(self._close(), timeout=CLOSE_TIMEOUT)

    async def _close(self) -> None:
        try:
            await self._close_session()
        finally:
            self._api = None
            await self._reached.aclose()

    async def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _reach(self) -> ContainerAPI:
        if self._api is None:
            self._api = await self._reached.enter_async_context(self._daemon.reach(reach))
        return self._api

    async def _open_session(self) -> _Session:
        if self._session is None:
            session = _Session(await self._reach(), self._name)
            try:
                await session.open()
            except _Lost:
                raise self._gone() from None
            self._session = session
        return self._session

    @property
    def _name(self) -> str:
        return self._daemon.names.containerd

    def _gone(self) -> DaemonFailed:
        return DaemonFailed(
            f"the connection to the container {self._name} broke", hint="is it still running?"
        )


class _Lost(Exception):
    """The session has ended."""


class _Session:
    """A shell that stays, and is asked one thing after the other."""

    def __init__(self, api: ContainerAPI, container: str) -> None:
        self.folder = f"{_FOLDER}/{secrets.token_hex(8)}"
        self._command = ["sh", "-c", _SESSION, "serpentine-session", self.folder]
        self._exec: Any = api.exec(container, self._command)
        self._stream: Stream | None = None
        self._number = 0
        self._buffer = bytearray()

    async def open(self) -> None:
        self._stream = await self._exec.__aenter__()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._line()
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise _Lost from None
            raise

    async def close(self) -> None:
        if self._stream is not None:
            self._stream = None
            await self._exec.__aexit__(None, None, None)

    async def ask(self, script: bytes) -> tuple[int, bytes, bytes]:
        assert self._stream is not None
        self._number += 1
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._stream.write_in(b"%d %d\n%s" % (self._number, len(script), script))
                # Whoever asked before may have been cancelled while it waited.
                while (answer := await self._answer())[0] != self._number:
                    pass
        except _BROKEN:
            raise _Lost from None
        return answer[1:]

    async def _answer(self) -> tuple[int, int, bytes, bytes]:
        """Return the next answer; leaves all of it where it was when it is cancelled."""
        line = await self._line(take=False)
        number, status, out, error = map(int, line.split())
        begin, end = len(line) + 1, len(line) + 1 + out + error
        while len(self._buffer) < end:
            await self._more()
        found = bytes(self._buffer[begin:end])
        del self._buffer[:end]
        return number, status, found[:out], found[out:]

    async def _line(self, *, take: bool = True) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            await self._more()
        line = bytes(self._buffer[:end])
        if take:
            del self._buffer[: end + 1]
        return line

    async def _more(self) -> None:
        assert self._stream is not None
        try:
            message = await self._stream.read_out()
        except _BROKEN:
            message = None
        if message is None:
            raise _Lost
        if message.stream == _STDOUT:
            self._buffer += message.data


class _Stream:
    """A script that runs; see ``run.site.ShellStream``."""

    def __init__(self, stream: Stream, gone: Any) -> None:
        self._stream = stream
        self._gone = gone

    async def read(self) -> tuple[int, bytes] | None:
        try:
            message = await self._stream.read_out()
        except _BROKEN:
            raise self._gone() from None
        return None if message is None else (message.stream, message.data)

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write_in(data)
        except _BROKEN:
            raise BrokenPipeError from None
