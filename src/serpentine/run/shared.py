"""Sites whose file system we share: pipes and small files lie in a folder that both see."""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # elsewhere no containerd runs on our file system

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from serpentine._concurrency import shielded
from serpentine.containerd import Mount
from serpentine.errors import DaemonFailed
from serpentine.run.contained import ShellSite
from serpentine.run.layers import Layers, forget, layers_of, look
from serpentine.run.packing import Items, Source, blocks, pack
from serpentine.run.pipes import Reader, Writer
from serpentine.run.site import STDERR, STDOUT, Folder, Found, OnOutput, Shell, Site, Stdio
from serpentine.run.threads import CLEANUP_TIMEOUT, in_own_thread, in_threads

__all__ = ["ContainedFolders", "LocalSite", "SharedFolders"]


class _Pipes(Stdio):
    def __init__(
        self, here: Path, there: str, on_output: OnOutput, *, stdin: bool, terminal: bool
    ) -> None:
        self._readers: list[Reader] = []
        self._writer: Writer | None = None
        try:
            self.stdout = self._reader(here, there, "stdout", STDOUT, on_output)
            # A terminal has one output only.
            if not terminal:
                self.stderr = self._reader(here, there, "stderr", STDERR, on_output)
            if stdin:
                os.mkfifo(here / "stdin", 0o600)
                self._writer = Writer(here / "stdin")
                self.stdin = f"{there}/stdin"
        except BaseException:
            self.close()
            raise

    def _reader(self, here: Path, there: str, name: str, number: int, on_output: OnOutput) -> str:
        os.mkfifo(here / name, 0o600)
        self._readers.append(Reader(here / name, lambda data: on_output(number, data)))
        return f"{there}/{name}"

    async def wait(self) -> None:
        for reader in self._readers:
            await reader.wait()

    async def write(self, data: bytes) -> None:
        if self._writer is None:
            raise BrokenPipeError
        await self._writer.write(data)

    async def close_stdin(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class SharedFolders(Site):
    """A site with a directory that we and the daemon both see: ``here`` and ``there``."""

    def __init__(self, here: Path, there: str) -> None:
        self.here, self.there = here, there

    @asynccontextmanager
    async def folder(
        self,
        step: str,
        files: Mapping[str, bytes],
        on_output: OnOutput,
        *,
        stdin: bool,
        terminal: bool,
    ) -> AsyncIterator[Folder]:
        """Make a directory below ours for the step."""
        here, there = self.here / step, f"{self.there}/{step}"
        pipes: _Pipes | None = None
        try:
            try:
                here.mkdir(parents=True, mode=0o700)
                for name, data in files.items():
                    (here / name).write_bytes(data)
                    # Every user of the step reads them.
                    (here / name).chmod(0o644)
                pipes = _Pipes(here, there, on_output, stdin=stdin, terminal=terminal)
            except OSError as error:
                raise DaemonFailed(
                    f"cannot make the pipes of a step in {here}: {error.strerror}",
                    hint="choose a directory of your own with SERPENTINE_RUN_DIR",
                ) from None
            yield Folder({name: f"{there}/{name}" for name in files}, pipes)
        finally:
            if pipes is not None:
                pipes.close()
            shutil.rmtree(here, ignore_errors=True)

    async def read_file(self, path: str) -> bytes:
        """Read it where we see it."""
        return (self.here / path.removeprefix(f"{self.there}/")).read_bytes()

    async def clear(self, step: str) -> None:
        """Remove the folder."""
        await asyncio.to_thread(shutil.rmtree, self.here / step, ignore_errors=True)


class LocalSite(SharedFolders):
    """This machine: containerd is a child process of ours, or somebody else's on a socket."""

    async def look(
        self, mounts: Sequence[Mount], paths: Mapping[str, bool]
    ) -> dict[str, Found] | None:
        """Read the snapshot's own directories; only root may."""
        layers = layers_of(mounts)
        if layers is None or os.geteuid() != 0:
            return None

        def work() -> dict[str, Found]:
            whole = Layers(layers)
            return {path: look(whole, path, read=read) for path, read in paths.items()}

        try:
            return await asyncio.to_thread(work)
        except OSError:
            return None  # a containerd with another file system than ours

    async def forget(self, mounts: Sequence[Mount], paths: Sequence[str]) -> None:
        """Remove them in the snapshot's topmost directory."""
        layers = layers_of(mounts)
        if layers is None or os.geteuid() != 0:
            return
        whole = Layers(layers)
        for path in paths:
            forget(whole, path)

    @asynccontextmanager
    async def pack(
        self, mounts: Sequence[Mount], path: str, name: str, notice: Callable[[str], None]
    ) -> AsyncIterator[AsyncIterator[bytes] | None]:
        """Mount the snapshot for nobody else to see, and read it; only root may."""
        from serpentine.run.mounted import open_snapshot, resolve

        async with _opened(lambda: open_snapshot(mounts)) as root:
            if root is None:
                yield None
                return
            where = await asyncio.to_thread(resolve, root, path)
            source = Source(f"/proc/self/fd/{root}/{where or '.'}", name, shown=path)
            archive = blocks(pack([source], notice=notice))
            async with aclosing(in_threads(archive)) as stream:
                yield stream

    async def unpack(
        self,
        mounts: Sequence[Mount],
        items: Items,
        *,
        since: float,
        interrupt: Callable[[], None] | None = None,
    ) -> int | None:
        """Mount the snapshot for nobody else to see, and write into it; only root may."""
        from serpentine.run.applying import apply_entries
        from serpentine.run.mounted import open_active

        async with _opened(lambda: open_active(mounts, since)) as root:
            if root is None:
                return None
            size = 0
            async with aclosing(in_threads(apply_entries(root, items), interrupt)) as steps:
                async for done in steps:
                    size = done
            return size


@asynccontextmanager
async def _opened(mount: Callable[[], int]) -> AsyncIterator[int | None]:
    """Open a snapshot's root directory by a function that leaves its thread elsewhere.

    None for whoever is not root, and for a containerd with another file system than ours.
    """
    opened: list[int] = []
    try:
        if os.geteuid() == 0:
            with contextlib.suppress(OSError):
                await in_own_thread(lambda: opened.append(mount()))
        yield opened[0] if opened else None
    finally:
        for root in opened:
            # The mount ends with it, which may take a while.
            await shielded(asyncio.to_thread(os.close, root), timeout=CLEANUP_TIMEOUT)


class ContainedFolders(SharedFolders, ShellSite):
    """A container of this machine, which has a directory of ours mounted."""

    def __init__(self, shell: Shell, here: Path, there: str) -> None:
        SharedFolders.__init__(self, here, there)
        ShellSite.__init__(self, shell)
