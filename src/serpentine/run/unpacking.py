"""An archive onto this machine's disk: never outside of the destination, whole files or none.

Plain and synchronous.  Who made the archive is not trusted: a name that leads upwards is refused,
and nothing is written through a symlink below the destination, whoever made that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from serpentine.errors import CopyError
from serpentine.run.packing import StrictTar, clean, mtime_ns, open_tar, shown, xattrs_of

__all__ = ["Copied", "unpack", "write_at"]

_HOLE = bytes(64 * 1024)
_NOT_ON_WINDOWS = frozenset('<>:"\\|?*')


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: where it is, and how many files, directories, links and others."""

    path: str
    count: int


def unpack(
    stream: BinaryIO,
    name: str,
    destination: str,
    *,
    notice: Callable[[str], None] = lambda _: None,
    count: Callable[[int], None] = lambda _: None,
) -> Copied:
    """Unpack an archive of one thing, called ``name`` in it; "" if it is a directory's contents.

    destination: a directory that is there takes it inside; otherwise it gets that name, in a
        directory that is there.  With a slash at its end it is a directory, made if need be.
        A directory's contents are merged into it.
    notice: is told what is left out.
    count: is told how much is there, each time that something is.

    Owners are kept if we are root, modes and times always, but for set-user-ID of what is not
    its owner's any more.  Raises CopyError, which says how much was copied before.
    """
    unpacker = _Unpacker(name, destination, notice)
    try:
        with open_tar(stream) as archive:
            try:
                for member in archive.one_by_one():
                    unpacker.add(archive, member)
                    count(unpacker.count)
            finally:
                unpacker.finish()
            while stream.read(1 << 20):
                pass
    except tarfile.TarError as error:
        raise CopyError(
            f"what came out is no whole archive: {error}{unpacker.so_far()}",
            hint="look at containerd's log, and copy again",
        ) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CopyError(
            f"cannot write {shown(unpacker.here)}: {why}{unpacker.so_far()}",
            path=unpacker.here,
            hint="mend that, or choose another destination",
        ) from None
    if not unpacker.root:
        raise CopyError("nothing came out", hint="look at containerd's log")
    return Copied(unpacker.root, unpacker.count)


class _Unpacker:
    def __init__(self, name: str, destination: str, notice: Callable[[str], None]) -> None:
        self._name, self._destination, self._notice = name, destination, notice
        self._is_root = sys.platform != "win32" and os.geteuid() == 0
        # Where the thing itself goes; known once it is known what it is.
        self.root = ""
        self.here = destination
        self.count = 0
        # Directories below the root that are none of somebody else's links.
        self._folders: set[str] = set()
        # They get their mode and time when all is in them: the last made first.
        self._later: list[tuple[str, tarfile.TarInfo]] = []
        self._told: set[str] = set()

    def so_far(self) -> str:
        return f"; copied before: {self.count}" if self.count else ""

    def add(self, archive: StrictTar, member: tarfile.TarInfo) -> None:
        below = self._below(member.name)
        if not self.root:
            self.root = self._choose(member, below)
        self.here = path = os.path.join(self.root, *below.split("/")) if below else self.root
        self._enter(below)
        if member.isdir():
            self._folder(path, below, member)
        else:
            self._replace(archive, path, member)
        self.count += 1

    def _below(self, name: str) -> str:
        """Return a member's name below the thing that is copied."""
        cleaned = clean(name)
        if sys.platform == "win32" and _NOT_ON_WINDOWS.intersection(cleaned):
            raise CopyError(
                f"Windows has no name for {shown(name)}",
                path=name,
                hint="copy it as an archive, with - as the destination",
            )
        if not self._name:
            return cleaned
        if cleaned != self._name and not cleaned.startswith(f"{self._name}/"):
            raise CopyError(
                f"the archive has something that nobody asked for: {shown(name)}", path=name
            )
        return cleaned[len(self._name) + 1 :]

    def _choose(self, first: tarfile.TarInfo, below: str) -> str:
        """Return where the thing itself goes."""
        destination, name = self._destination, self._name.rpartition("/")[2]
        if below and self._name:
            raise CopyError(f"the archive begins in the middle: {shown(first.name)}")
        is_folder = first.isdir() or not self._name
        slash = destination.endswith(("/", os.sep))
        if os.path.isdir(destination):
            if not self._name:
                return destination
            return os.path.join(destination, name)
        if os.path.lexists(destination.rstrip("/" + os.sep)) and (is_folder or slash):
            raise CopyError(
                f"{shown(destination)} is there and is no directory",
                path=destination,
                hint="choose another destination",
            )
        plain = destination.rstrip("/" + os.sep) or destination
        above = os.path.dirname(plain) or "."
        if not os.path.isdir(above):
            raise CopyError(
                f"there is no directory {shown(above)}", path=above, hint="make it first"
            )
        if is_folder:
            if not self._name:
                os.mkdir(plain)
            return plain
        if slash:
            os.mkdir(plain)
            return os.path.join(plain, name)
        return plain

    def _enter(self, below: str) -> None:
        """Make sure that the directories on the way are real ones."""
        parts = below.split("/")[:-1]
        for count in range(len(parts) + 1):
            way = "/".join(parts[:count])
            if way in self._folders or not (below or way):
                continue
            path = os.path.join(self.root, *parts[:count])
            # The root itself may be a link if it is the caller's.
            status = os.stat(path) if not way and not self._name else self._lstat(path)
            if status is None:
                os.mkdir(path)
            elif not stat.S_ISDIR(status.st_mode):
                raise self._in_the_way(path)
            self._folders.add(way)

    def _folder(self, path: str, below: str, member: tarfile.TarInfo) -> None:
        if below or self._name:
            status = self._lstat(path)
            if status is None:
                # Ours alone until all is in it.
                os.mkdir(path, 0o700)
            elif not stat.S_ISDIR(status.st_mode):
                raise self._in_the_way(path)
            self._later.append((path, member))
        self._folders.add(below)

    def _replace(self, archive: StrictTar, path: str, member: tarfile.TarInfo) -> None:
        status = self._lstat(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            raise CopyError(
                f"{shown(path)} is a directory, and no file can take its place{self.so_far()}",
                path=path,
                hint="remove it, or choose another destination",
            )
        temporary = os.path.join(
            os.path.dirname(path) or ".", f".serpentine-{secrets.token_hex(8)}"
        )
        try:
            if self._make(archive, temporary, member):
                if not member.islnk():
                    self._describe(temporary, member)
                os.replace(temporary, path)
        finally:
            # There only if it failed, or if both names were one file's already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _make(self, archive: StrictTar, path: str, member: tarfile.TarInfo) -> bool:
        """Make what is no directory; tell whether that can be."""
        if member.isreg():
            self._file(archive, path, member)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.islnk():
            self._link(path, member)
        elif sys.platform == "win32":
            self._tell(f"{shown(self.here)} is no file that Windows has, and was left out")
            return False
        elif member.isfifo():
            os.mkfifo(path, 0o600)
        elif member.ischr() or member.isblk():
            if not self._is_root:
                self._tell(f"{shown(self.here)} is a device, which only root can make")
                return False
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        else:
            self._tell(f"{shown(self.here)} is of an unknown kind, and was left out")
            return False
        return True

    def _file(self, archive: StrictTar, path: str, member: tarfile.TarInfo) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags, 0o600), "wb") as file:
            for place, piece in archive.data(member):
                write_at(file, place, piece)
            file.flush()
            # It may end with a hole.
            os.ftruncate(file.fileno(), member.size)

    def _link(self, path: str, member: tarfile.TarInfo) -> None:
        below = self._below(member.linkname)
        target = os.path.join(self.root, *below.split("/")) if below else self.root
        self._enter(below)
        status = self._lstat(target)
        if status is None or stat.S_ISDIR(status.st_mode):
            raise CopyError(
                f"{shown(self.here)} is to be one with {shown(member.linkname)}, which did not"
                " come",
                path=self.here,
            )
        if os.link in os.supports_follow_symlinks:
            os.link(target, path, follow_symlinks=False)
        else:
            os.link(target, path)

    def _describe(self, path: str, member: tarfile.TarInfo) -> None:
        """Give a file its owner, attributes, mode and time, in this order."""
        mode = member.mode & 0o7777
        if sys.platform != "win32":
            if self._is_root:
                os.chown(path, member.uid, member.gid, follow_symlinks=False)
            else:
                mode &= ~0o6000
            self._attributes(path, member)
        if not member.issym():
            os.chmod(path, mode)
        time = mtime_ns(member)
        if os.utime in os.supports_follow_symlinks:
            os.utime(path, ns=(time, time), follow_symlinks=False)
        elif not member.issym():
            os.utime(path, ns=(time, time))

    def _attributes(self, path: str, member: tarfile.TarInfo) -> None:
        if sys.platform == "linux":
            for name, value in xattrs_of(member).items():
                try:
                    os.setxattr(path, name, value, follow_symlinks=False)
                except OSError as error:
                    self._untold(name, error)

    def _untold(self, name: str, error: OSError) -> None:
        kind = name.partition(".")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._tell(
                f"attributes like {name} of {shown(self.here)} were left out: {error.strerror}"
            )

    def finish(self) -> None:
        """Give directories their modes and times, also those of a copy that failed."""
        while self._later:
            path, member = self._later.pop()
            self.here = path
            self._describe(path, member)

    def _lstat(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None

    def _in_the_way(self, path: str) -> CopyError:
        return CopyError(
            f"{shown(path)} is there and is no directory{self.so_far()}",
            path=path,
            hint="remove it, or choose another destination",
        )

    def _tell(self, text: str) -> None:
        self._notice(text)


def write_at(file: BinaryIO, place: int, piece: bytes) -> None:
    """Write at a place, and leave holes where there are only zeros."""
    start = 0
    for offset in range(0, len(piece), len(_HOLE)):
        # Looked at before it is compared, which costs a copy.
        if piece[offset] == 0 and piece[offset : offset + len(_HOLE)] == _HOLE:
            if start < offset:
                file.seek(place + start)
                file.write(memoryview(piece)[start:offset])
            start = offset + len(_HOLE)
    if start < len(piece):
        file.seek(place + start)
        file.write(memoryview(piece)[start:])
