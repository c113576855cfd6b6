"""Looking into a snapshot through the directories that it is made of, without mounting it.

An overlay's directories are read from the top down with its own rules: a whiteout hides what is
below, and so does a directory that is marked opaque.  A symlink is resolved inside the snapshot,
never on the machine that it lies on.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # overlays are read where they are

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from serpentine.containerd import Mount
from serpentine.run.site import Found

__all__ = ["Layers", "forget", "layers_of", "look"]

MAX_FILE = 4 << 20
_MAX_LINKS = 40
# An image's link may name what no file can be called.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def layers_of(mounts: Sequence[Mount]) -> list[Path] | None:
    """Return the directories of a snapshot's mounts, the topmost first; None if unknown."""
    if len(mounts) != 1:
        return None
    (mount,) = mounts
    if mount.type == "bind":
        return [Path(mount.source)]
    if mount.type != "overlay":
        return None
    options = dict(o.split("=", 1) for o in mount.options if "=" in o)
    if "lowerdir" not in options:
        return None
    lower = [Path(p) for p in options["lowerdir"].split(":")]
    return [Path(options["upperdir"]), *lower] if "upperdir" in options else lower


class Layers:
    """The directories of a snapshot, for as long as nobody writes to those below the topmost."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        # What is at the root of each of those below: of a hundred, most have nothing to do with
        # a path, and one question for all paths is cheaper than one for each.
        self._roots: list[set[str]] | None = None

    def find(self, parts: Sequence[str], *, below: bool = False) -> Path | None:
        """Return where a path that has no symlink above its last part really is.

        below: leave the topmost directory out.
        """
        if self._roots is None:
            self._roots = [set(os.listdir(path)) for path in self.paths[1:]]  # noqa: PTH208
        chosen = [] if below else self.paths[:1]
        chosen += [p for p, names in zip(self.paths[1:], self._roots, strict=True)
                   if parts[0] in names]  # fmt: skip
        return _find(chosen, parts)


def look(layers: Layers, path: str, *, read: bool = False) -> Found:
    """Look at one path; follows symlinks inside the snapshot."""
    parts = _parts(path)
    done: list[str] = []
    links = 0
    while parts:
        name = parts.pop(0)
        if name == ".":
            continue
        if name == "..":
            done = done[:-1]
            continue
        here = layers.find([*done, name])
        if here is None:
            rest = "/".join(p for p in parts if p != ".")
            return Found("absent", missing="/" + "/".join([*done, name]), rest=rest)
        mode = here.lstat().st_mode
        if stat.S_ISLNK(mode):
            links += 1
            if links > _MAX_LINKS:
                return Found("other")
            # As it is: pathlib would tidy up a "/." at its end, which asks for a directory.
            target = os.readlink(here)  # noqa: PTH115
            if target.startswith("/"):
                done = []
            parts = _parts(target) + parts
            continue
        done.append(name)
        if parts and not stat.S_ISDIR(mode):
            return Found("other")
        if not parts:
            return _found(here, mode, read=read)
    return Found("directory")


def _found(here: Path, mode: int, *, read: bool) -> Found:
    if stat.S_ISDIR(mode):
        return Found("directory")
    if not stat.S_ISREG(mode):
        return Found("other")
    if not read:
        return Found("file")
    with here.open("rb") as file:
        return Found("file", data=file.read(MAX_FILE))


def _parts(path: str) -> list[str]:
    # Both a last "." and a last "/" ask for a directory.
    return [p for p in path.split("/") if p] + ["."] * path.endswith("/")


def _find(layers: Sequence[Path], parts: Sequence[str]) -> Path | None:
    for layer in layers:
        here = layer
        opaque = False
        for place, name in enumerate(parts):
            here = here / name
            try:
                status = here.lstat()
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                break
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                return None  # a whiteout
            if place == len(parts) - 1:
                return here
            if not stat.S_ISDIR(status.st_mode):
                return None  # hides a directory of that name below
            opaque = opaque or _is_opaque(here)
        if opaque:
            return None
    return None


def forget(layers: Layers, path: str) -> None:
    """Remove an empty file or directory of the topmost layer that was made to mount on.

    Never through a link that the step put there.  A directory above it that was copied up for
    it alone goes as well, or it would be a change of this layer, with a time of its own.
    """
    parts = _parts(path)
    top = layers.paths[0]
    here = _in_top(top, parts)
    if here is None:
        return
    with contextlib.suppress(OSError):
        status = here.lstat()
        if stat.S_ISDIR(status.st_mode):
            here.rmdir()
        elif stat.S_ISREG(status.st_mode) and status.st_size == 0:
            here.unlink()
        for end in range(len(parts) - 1, 0, -1):
            if not _is_copy(layers, parts[:end]):
                break
            top.joinpath(*parts[:end]).rmdir()


def _in_top(top: Path, parts: list[str]) -> Path | None:
    here = top
    for part in parts:
        here = here / part
        if here.is_symlink() or part == "..":
            return None
    return here if parts else None


def _is_copy(layers: Layers, parts: list[str]) -> bool:
    """Tell whether a directory of the topmost layer is as the one below it, time apart."""
    above, below = layers.paths[0].joinpath(*parts), layers.find(parts, below=True)
    if below is None or _is_opaque(above):
        return False
    return _attributes(above) == _attributes(below)


def _attributes(folder: Path) -> tuple[object, ...]:
    status = folder.lstat()
    names = (n for n in os.listxattr(folder) if ".overlay." not in n)
    xattrs = {name: os.getxattr(folder, name) for name in names}
    return (status.st_mode, status.st_uid, status.st_gid, xattrs)


def _is_opaque(folder: Path) -> bool:
    for name in _OPAQUE:
        try:
            if os.getxattr(folder, name) == b"y":
                return True
        except (OSError, AttributeError):
            continue
    return False
