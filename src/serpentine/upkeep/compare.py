"""Two directories, entry by entry: what they differ in, as a person would say it.

Plain and synchronous; nothing is followed, nothing written.  Whoever calls it does so in a thread.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # no containerd has its directories on our file system elsewhere

import asyncio
import os
import stat
import threading
from collections.abc import Callable, Iterator

from serpentine.upkeep.found import Difference

__all__ = ["compare", "compare_here"]

_BLOCK = 1 << 20
# An overlay's own notes, which come and go with how it was used.  The others (a directory that
# hides what is below, one that was renamed) are part of the layer.
_NOTES = ("origin", "impure", "nlink", "uuid", "protattr")
_PREFIXES = ("trusted.overlay.", "user.overlay.")
# What a security module adds to each file of its own accord.
_FOREIGN = ("security.selinux", "security.ima", "security.evm")


async def compare_here(
    should: str, found: str, since: float, most: int
) -> tuple[list[Difference], int] | None:
    """Compare two directories of containerd's; return the first differences, and their number.

    None if they are not on our file system, or not ours to read.
    """
    if os.geteuid() != 0:
        return None
    ended = threading.Event()

    def work() -> tuple[list[Difference], int] | None:
        try:
            status = os.lstat(should)
            # What has its path here and was not touched since is something else: containerd has
            # another file system than ours.  A file system's clock is some milliseconds late.
            if not stat.S_ISDIR(status.st_mode) or status.st_ctime < since - 1:
                return None
            told: list[Difference] = []
            count = 0
            for one in compare(should, found, since - 1, lambda: not ended.is_set()):
                count += 1
                if count <= most:
                    told.append(one)
        except FileNotFoundError:
            return None
        return told, count

    try:
        return await asyncio.to_thread(work)
    finally:
        # After a cancellation, it would read on.
        ended.set()


def compare(
    should: str, found: str, since: float, is_wanted: Callable[[], bool] = lambda: True
) -> Iterator[Difference]:
    """Yield what is in ``found`` and not as in ``should``, in the order of the paths.

    since: when ``should`` was begun; a directory that has a younger time got none from anybody,
        so that its time does not count.
    is_wanted: asked again and again; once it says no, this ends.

    Raises OSError.
    """
    yield from _Comparison(should, found, since, is_wanted).run()


class _Comparison:
    def __init__(
        self, should: str, found: str, since: float, is_wanted: Callable[[], bool]
    ) -> None:
        self._roots = os.fsencode(should), os.fsencode(found)
        self._since = since
        self._is_wanted = is_wanted
        # Files with several names: the first name, by which the others must be one with it.
        self._first: tuple[dict[tuple[int, int], bytes], dict[tuple[int, int], bytes]] = ({}, {})

    def run(self) -> Iterator[Difference]:
        yield from self._entry(b"")
        stack = [b""]
        while stack and self._is_wanted():
            folder = stack.pop()
            here, there = (self._list(root, folder) for root in self._roots)
            folders = []
            for name in sorted(here | there):
                path = os.path.join(folder, name)
                if name not in there:
                    yield Difference(_shown(path), ("missing",))
                elif name not in here:
                    yield Difference(_shown(path), ("added",))
                else:
                    yield from self._entry(path)
                    if all(self._is_folder(root, path) for root in self._roots):
                        folders.append(path)
                if not self._is_wanted():
                    return
            stack += reversed(folders)

    @staticmethod
    def _list(root: bytes, folder: bytes) -> set[bytes]:
        return set(os.listdir(os.path.join(root, folder)))

    @staticmethod
    def _is_folder(root: bytes, path: bytes) -> bool:
        return stat.S_ISDIR(os.lstat(os.path.join(root, path)).st_mode)

    def _entry(self, path: bytes) -> Iterator[Difference]:
        should, found = (os.path.join(root, path) if path else root for root in self._roots)
        what = self._differences(should, found, path)
        if what:
            yield Difference(_shown(path) or "/", tuple(what))

    def _differences(self, should: bytes, found: bytes, path: bytes) -> list[str]:
        one, other = os.lstat(should), os.lstat(found)
        if stat.S_IFMT(one.st_mode) != stat.S_IFMT(other.st_mode):
            return ["kind"]
        is_folder, is_link = stat.S_ISDIR(one.st_mode), stat.S_ISLNK(one.st_mode)
        what = []
        if stat.S_ISREG(one.st_mode):
            if one.st_size != other.st_size:
                what.append("size")
            elif not self._same_content(should, found):
                what.append("content")
        if is_link and os.readlink(should) != os.readlink(found):
            what.append("target")
        if stat.S_ISCHR(one.st_mode) or stat.S_ISBLK(one.st_mode):
            if one.st_rdev != other.st_rdev:
                what.append("device")
            if one.st_rdev == 0:
                return what  # a whiteout: nothing else of it counts
        if not is_link and stat.S_IMODE(one.st_mode) != stat.S_IMODE(other.st_mode):
            what.append("mode")
        if (one.st_uid, one.st_gid) != (other.st_uid, other.st_gid):
            what.append("owner")
        own_time = is_folder and (not path or one.st_mtime >= self._since)
        if not own_time and one.st_mtime_ns != other.st_mtime_ns:
            what.append("time")
        if _attributes(should) != _attributes(found):
            what.append("attributes")
        if not is_folder and self._name_of(0, one, path) != self._name_of(1, other, path):
            what.append("links")
        return what

    def _name_of(self, side: int, status: os.stat_result, path: bytes) -> bytes:
        if status.st_nlink < 2:
            return path
        return self._first[side].setdefault((status.st_dev, status.st_ino), path)

    def _same_content(self, should: bytes, found: bytes) -> bool:
        with open(should, "rb", buffering=0) as one, open(found, "rb", buffering=0) as other:
            while self._is_wanted():
                expected, actual = one.read(_BLOCK), other.read(_BLOCK)
                if expected != actual:
                    return False
                if not expected:
                    break
        return True


def _attributes(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in names
        if name not in _FOREIGN
        and not (name.startswith(_PREFIXES) and name.rpartition(".")[2] in _NOTES)
    }


def _shown(path: bytes) -> str:
    """Return a path for people; bytes that are no text are escaped."""
    return path.decode(errors="backslashreplace")
