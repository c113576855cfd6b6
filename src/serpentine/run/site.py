"""The daemon's machine, as far as a step needs it: a folder in common, and a look into snapshots.

What is true of every such machine is here; ``shared`` has those whose file system we share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from serpentine.containerd import Mount
from serpentine.run.packing import Items

__all__ = [
    "STDERR",
    "STDOUT",
    "Folder",
    "Found",
    "OnOutput",
    "Shell",
    "ShellStream",
    "Site",
    "Stdio",
]

STDOUT, STDERR = 1, 2
OnOutput = Callable[[int, bytes], None]


class Stdio(ABC):
    """The ends of a step's pipes that are ours; the paths are those of the daemon's machine."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""

    @abstractmethod
    async def wait(self) -> None:
        """Wait until all output was read."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Write to the step's stdin; raises BrokenPipeError once it was closed."""

    @abstractmethod
    async def close_stdin(self) -> None:
        """Close our end of stdin; containerd must be told as well."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A step's folder: where its files are on the daemon's machine, and its pipes."""

    files: Mapping[str, str]
    stdio: Stdio


@dataclass(frozen=True, slots=True)
class Found:
    """A path in a snapshot: what is there, and a regular file's bytes if they were asked for.

    kind: ``file``, ``directory``, ``other``, or ``absent``.
    missing: for an absent one, the topmost directory or file of it that is not there.
    rest: what of it is below that, where links led elsewhere than the path says.
    """

    kind: str
    data: bytes | None = None
    missing: str = ""
    rest: str = ""


class Site(ABC):
    """The daemon's machine.

    has_cgroups: whether a step may have one of its own, and with that, limits.
    is_rootless: whether root is another user outside.
    shares_files: whether its directories are those of this machine.
    """

    has_cgroups = True
    is_rootless = False
    shares_files = True

    @abstractmethod
    def folder(
        self,
        step: str,
        files: Mapping[str, bytes],
        on_output: OnOutput,
        *,
        stdin: bool,
        terminal: bool,
    ) -> AbstractAsyncContextManager[Folder]:
        """Make the files and pipes of a step, and remove them at the end."""

    @abstractmethod
    async def look(
        self, mounts: Sequence[Mount], paths: Mapping[str, bool]
    ) -> dict[str, Found] | None:
        """Look at paths of a snapshot, whose bytes are wanted where the value is true.

        None where we cannot look.
        """

    @abstractmethod
    async def forget(self, mounts: Sequence[Mount], paths: Sequence[str]) -> None:
        """Remove paths of an active snapshot that are empty files or directories, in order."""

    @abstractmethod
    async def read_file(self, path: str) -> bytes:
        """Return what is in a file of a step's folder, by its path on the daemon's machine."""

    @asynccontextmanager
    async def pack(
        self, mounts: Sequence[Mount], path: str, name: str, notice: Callable[[str], None]
    ) -> AsyncIterator[AsyncIterator[bytes] | None]:
        """Read a path of a view as a tar archive with all that the file system knows of it.

        path: absolute; links on the way are followed inside the view, and with a slash at its
            end one there, too.
        name: what it is called in the archive; "" for a directory whose contents are meant.
        notice: is told what cannot be in an archive.

        None where we cannot look.  Raises PathNotFound, CopyError.
        """
        del mounts, path, name, notice
        yield None

    async def unpack(
        self,
        mounts: Sequence[Mount],
        items: Items,
        *,
        since: float,
        interrupt: Callable[[], None] | None = None,
    ) -> int | None:
        """Write entries into an active snapshot that nobody else uses, and return their bytes.

        The outcome is that of containerd's diff service.
        since: when the snapshot was asked for.
        interrupt: ends a read of ``items`` that waits.

        None where we cannot, and nothing was taken from ``items`` then.  Raises CopyError, NoSpace.
        """
        del mounts, items, since, interrupt
        return None

    async def clear(self, step: str) -> None:  # noqa: B027 - not all leave any
        """Remove the folder of a step whose client was killed."""

    async def close(self) -> None:  # noqa: B027 - most keep nothing
        """Let go of what is kept between steps."""


class Shell(Protocol):
    """A way to run commands on the daemon's machine, as root in the daemon's own namespaces."""

    async def folder(self) -> str:
        """Return a directory there that goes when we go, also when we are killed.

        The same happens to the process group whose number is in the file ``pid`` of a directory
        in it.
        """
        ...

    async def run(self, script: str, *arguments: str) -> bytes:
        """Run a shell script and return what it prints; raises DaemonFailed if it fails.

        It is run a second time if the first answer was lost.
        """
        ...

    def open(self, script: str, *arguments: str) -> AbstractAsyncContextManager[ShellStream]:
        """Run a shell script whose output and input are streamed; leaving the context ends both.

        It does not end the script, which only sees the end of its input.
        """
        ...

    async def close(self) -> None:
        """End what is kept between commands."""
        ...


class ShellStream(Protocol):
    """A shell script that runs."""

    async def read(self) -> tuple[int, bytes] | None:
        """Return the next piece of its output, and which stream it is of; None at the end.

        Raises DaemonFailed when the connection breaks.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Write to its stdin; raises BrokenPipeError once it has ended."""
        ...
