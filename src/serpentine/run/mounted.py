"""A snapshot's file system as an open directory, mounted where nobody else sees it.

A thread has a mount namespace of its own once it asks for one.  It mounts the snapshot there,
opens it, takes the mount's name away again, and ends; the mount lives on for as long as the
directory is open.  So nothing is left behind, however we end, and nobody can stumble over it.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # other systems mount in other ways

import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from serpentine.containerd import Mount
from serpentine.errors import CopyError, PathNotFound
from serpentine.run.layers import layers_of

__all__ = ["open_active", "open_snapshot", "resolve"]

_CLONE_NEWNS = 0x00020000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x4000, 1 << 18
_MNT_DETACH = 2
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# How files that were changed are kept.
_KEPT_OPTIONS = ("userxattr", "index=", "metacopy=", "redirect_dir=", "xino=")
_MAX_LINKS = 40
_PAGE = 4096


def open_snapshot(mounts: Sequence[Mount]) -> int:
    """Return a descriptor of the root directory of a view; raises OSError.

    To be called in a thread that ends afterwards: it is left in its own mount namespace.
    """
    layers = _layers(mounts)
    if len(layers) == 1:
        return os.open(layers[0], _FOLDER)
    return _overlay(mounts[0], layers, _MS_RDONLY)


def open_active(mounts: Sequence[Mount], since: float) -> int:
    """Return a descriptor of the root directory of an active snapshot, to write into it.

    since: when it was asked for.  What has its path on this machine but was not touched since is
        something else: its containerd has another file system than ours.

    Raises OSError.  To be called in a thread that ends afterwards, like the other.
    """
    layers = _layers(mounts)
    # A file system's clock is some milliseconds late.
    if os.lstat(layers[0]).st_ctime < since - 1:
        raise OSError("another snapshot")
    # containerd leaves out devices there; whether it runs there, too, is not known.
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", str((1 << 32) - 1)]:
        raise OSError("root of a user namespace")
    if len(layers) == 1:
        return os.open(layers[0], _FOLDER)
    return _overlay(mounts[0], layers, 0)


def _layers(mounts: Sequence[Mount]) -> list[Path]:
    layers = layers_of(mounts)
    if layers is None:
        raise OSError("a mount of an unknown kind")
    return layers


def _overlay(mount: Mount, layers: Sequence[Path], flags: int) -> int:
    _call("unshare", ctypes.c_int(_CLONE_NEWNS))
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    # All options together have one page (trap 52): the directories are named from where they
    # have in common.  This thread alone is there now.
    base = os.path.commonpath([os.path.dirname(layer) for layer in layers])
    os.chdir(base)
    given = dict(option.partition("=")[::2] for option in mount.options)
    options = "".join(f",{o}" for o in mount.options if o.startswith(_KEPT_OPTIONS))
    if "upperdir" in given:
        upper, work = (os.path.relpath(given[name], base) for name in ("upperdir", "workdir"))
        options += f",upperdir={upper},workdir={work}"
        layers = layers[1:]
    lower = ":".join(os.path.relpath(layer, base) for layer in layers)
    target = str(layers[0])
    _mount("overlay", target, "overlay", flags | _FLAGS, f"lowerdir={lower}{options}")
    root = os.open(target, _FOLDER)
    # Now it lasts as long as that is open, and no longer.
    _call("umount2", os.fsencode(target), ctypes.c_int(_MNT_DETACH))
    return root


def resolve(root: int, path: str) -> str:
    """Return where a path really is in an open directory, without a leading slash.

    Links on the way are followed inside it.  One at the end is, too, if the path ends with a
    slash.  Raises PathNotFound, CopyError.
    """
    follow = path.endswith(("/", "/."))
    todo = [part for part in path.split("/") if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while todo:
        name = todo.pop(0)
        if name == "..":
            done = done[:-1]
            continue
        here = "/".join([*done, name])
        try:
            status = os.stat(here, dir_fd=root, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            raise PathNotFound(
                f"there is no {path} in the state", path=path, hint="check the path"
            ) from None
        except (OSError, ValueError) as error:
            raise CopyError(f"cannot look at {path}: {error}", path=path) from None
        if stat.S_ISLNK(status.st_mode) and (todo or follow):
            links += 1
            if links > _MAX_LINKS:
                raise CopyError(f"{path} is a circle of links", path=path)
            target = os.readlink(here, dir_fd=root)
            if target.startswith("/"):
                done = []
            todo = [part for part in target.split("/") if part not in ("", ".")] + todo
            continue
        if (todo or follow) and not stat.S_ISDIR(status.st_mode):
            raise PathNotFound(
                f"{path} leads through something that is no directory",
                path=path,
                hint="check the path",
            )
        done.append(name)
    return "/".join(done)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind, data)]
    given = [ctypes.c_char_p(word) for word in words]
    if data is not None and len(data) >= _PAGE:
        # The kernel would leave out the rest.
        raise OSError(errno.ENAMETOOLONG, "mount: more layers than its options have room for")
    _call("mount", given[0], given[1], given[2], ctypes.c_ulong(flags), given[3])


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
