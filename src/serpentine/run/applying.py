"""Entries of an archive straight into a snapshot's file system, as containerd would write them.

The rules are those of its diff service, so that nobody can tell which of the two it was.  The
root's own links are an image's, and not trusted: they are followed inside the root only, by our
own walk.  Nobody else changes anything there meanwhile.  Plain and synchronous.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # snapshots are mounted there only

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from typing import BinaryIO

from serpentine.errors import CopyError, NoSpace
from serpentine.run.packing import BLOCK, Entry, Items, mtime_ns, shown
from serpentine.run.unpacking import write_at

__all__ = ["apply_entries"]

_MAX_LINKS = 255
# The last one that a file system's clock can say; containerd takes those beyond for 1970.
_LAST_TIME = (1 << 63) - 1
# How much is done before whoever runs it may stop it: thousands of small files, or some megabytes.
_STEP = 4 * BLOCK
_SMALL = 2048


def apply_entries(root: int, items: Items) -> Generator[int, None, None]:
    """Write entries below an open directory; yields the bytes of files until then, now and again.

    A directory is merged into one that is there, anything else replaces what has its name.
    Directories above that are missing are root's.  Raises NoSpace, CopyError, and what ``items``
    raise.
    """
    tree = _Tree(root)
    size = waiting = 0
    try:
        for item in items:
            with _told(tree):
                tree.take(item)
            if isinstance(item, bytes):
                size += len(item)
                waiting += len(item)
            else:
                waiting += _SMALL
            if waiting > _STEP:
                yield size
                waiting = 0
        with _told(tree):
            tree.finish()
        yield size
    finally:
        tree.close()
        # What it reads from is not to stay open until somebody collects it.
        items.close()


@contextlib.contextmanager
def _told(tree: _Tree) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        said = f"cannot write {shown(tree.here)} in the state: {why}"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hint = "make room on the disk that holds containerd's root directory"
            raise NoSpace(said, hint=hint) from error
        raise CopyError(said, path=tree.here, hint="check the destination") from error


class _Tree:
    def __init__(self, root: int) -> None:
        # Bytes: names are what the archive says, whatever this machine's locale is.
        self._root = b"/proc/self/fd/%d" % root
        self.here = ""
        # The directory that was entered last, and where it really is.
        self._entered: tuple[bytes, bytes] | None = None
        # The file that is being written, and how much of it is there.
        self._file: BinaryIO | None = None
        self._done = 0
        self._entry: Entry | None = None
        self._path = b""
        # Directories get their times when all is in them: whatever has their names then.
        self._times: list[tuple[bytes, int]] = []

    def take(self, item: Entry | bytes) -> None:
        if isinstance(item, Entry):
            self._end_file()
            self._add(item)
            return
        assert self._file is not None
        # What is only zeros becomes a hole.
        write_at(self._file, self._done, item)
        self._done += len(item)

    def _add(self, entry: Entry) -> None:
        info = entry.info
        self.here = f"/{info.name}"
        above, _, name = _encoded(info.name).rpartition(b"/")
        if name in (b"", b"."):
            return  # the root is nobody's to change
        path = self._join(self._enter(above), name)
        found = _mode(path)
        if found and not (stat.S_ISDIR(found) and info.isdir()):
            self._remove(path, found)
        if info.isdir():
            if not stat.S_ISDIR(found):
                os.mkdir(path, 0o700)
            self._times.append((_encoded(info.name), _time(entry)))
        elif info.isreg():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.fdopen(os.open(path, flags, 0o600), "wb")
            self._entry, self._path, self._done = entry, path, 0
            return  # described when all is in it
        elif info.issym():
            os.symlink(_encoded(info.linkname), path)
        elif info.islnk():
            above, _, name = _encoded(info.linkname).rpartition(b"/")
            target = self._join(self._enter(above, make=False), name)
            os.link(target, path, follow_symlinks=False)
        elif info.isfifo():
            os.mkfifo(path, 0o600)
        else:
            kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(info.devmajor, info.devminor))
        _describe(path, entry)

    def finish(self) -> None:
        self._end_file()
        for name, time in self._times:
            self.here = f"/{name.decode('utf-8', 'surrogateescape')}"
            os.utime(self._enter(name, make=False), ns=(time, time), follow_symlinks=False)

    def close(self) -> None:
        """Let go of a file that was not finished."""
        if self._file is not None:
            # It tries again to write what it could not.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _end_file(self) -> None:
        if self._file is None or self._entry is None:
            return
        self._file.flush()
        # It may end with a hole.
        self._file.truncate(self._done)
        self._file.close()
        self._file = None
        _describe(self._path, self._entry)

    def _join(self, folder: bytes, name: bytes) -> bytes:
        return b"%s/%s" % (folder, name)

    def _remove(self, path: bytes, mode: int) -> None:
        self._entered = None
        if stat.S_ISDIR(mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def _enter(self, folder: bytes, *, make: bool = True) -> bytes:
        """Return where a directory really is, below the root; with ``make`` it is there then.

        As in containerd, ``..`` leads back the way that was come, also from what is not there.
        """
        if self._entered is not None and self._entered[0] == folder:
            return self._entered[1]
        done: list[bytes] = []
        todo = folder.split(b"/")
        links = 0
        while todo:
            name = todo.pop(0)
            if name in (b"", b"."):
                continue
            if name == b"..":
                done = done[:-1]
                continue
            here = self._join(self._root, b"/".join([*done, name]))
            mode = _mode(here)
            if stat.S_ISLNK(mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = os.readlink(here)
                if target.startswith(b"/"):
                    done = []
                todo = target.split(b"/") + todo
                continue
            done.append(name)
        found = b"/".join([self._root, *done])
        if make:
            self._make(found)
            self._entered = (folder, found)
        return found

    def _make(self, folder: bytes) -> None:
        """Make a directory that has no links on its way, and those above it."""
        missing = []
        while not _mode(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            os.mkdir(path, 0o755)
            os.chmod(path, 0o755)  # noqa: S103 - as containerd does, whatever our umask is


def _describe(path: bytes, entry: Entry) -> None:
    """Give a file its owner, attributes, mode and time, in this order: each may undo the next."""
    info = entry.info
    os.chown(path, info.uid, info.gid, follow_symlinks=False)
    for name, value in entry.xattrs.items():
        # An archive must not say what is only for who administers a machine.
        if name.startswith("trusted."):
            continue
        try:
            os.setxattr(path, _encoded(name), value, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                continue
            # Links and devices have none of these.
            plain = stat.S_ISREG(_mode(path)) or stat.S_ISDIR(_mode(path))
            if error.errno == errno.EPERM and name.startswith("user.") and not plain:
                continue
            raise
    # Symlinks have no mode, and a hard link may be one's.
    if not (info.issym() or (info.islnk() and stat.S_ISLNK(_mode(path)))):
        os.chmod(path, info.mode & 0o7777)
    time = _time(entry)
    os.utime(path, ns=(time, time), follow_symlinks=False)


def _time(entry: Entry) -> int:
    time = mtime_ns(entry.info)
    return time if 0 <= time <= _LAST_TIME else 0


def _mode(path: bytes) -> int:
    """Return type and mode of what is there, 0 for nothing; never follows a link."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
