"""Files as entries of an archive: in sorted order, complete, or an error; memory does not grow.

Plain and synchronous: who calls it does so in a thread.  The same files give the same entries, and
as a tar stream the same bytes, on whichever machine and file system they lie.
"""

from __future__ import annotations

import os
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from tarfile import HeaderError, ReadError
from typing import Any, BinaryIO, Literal, Self

from serpentine.errors import CopyError, FileChanged, PathNotFound
from serpentine.run.ignoring import Rules

__all__ = [
    "BLOCK",
    "END",
    "Entry",
    "Items",
    "Source",
    "StrictTar",
    "again",
    "as_tar",
    "blocks",
    "clean",
    "entries",
    "entries_again",
    "mtime_ns",
    "open_tar",
    "pack",
    "shown",
    "xattrs_of",
]

BLOCK = 1 << 20
# What Python's reader takes at once: it copies what is left of it for each header.
_PIECE = 1 << 16
_RECORD = tarfile.BLOCKSIZE
END = bytes(2 * _RECORD)
_XATTR = "SCHILY.xattr."
# The others describe this machine (labels of SELinux, IMA) or how its overlays are made, and
# would change the meaning of a file elsewhere.
_KEPT_XATTRS = ("user.", "trusted.", "security.capability", "system.posix_acl_")
_LEFT_XATTRS = ("user.overlay.", "trusted.overlay.")
_WHITEOUT = ".wh."
# A file that became a pipe since we looked must not keep us waiting.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = (
    os.O_RDONLY
    | _NOFOLLOW
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_AT = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd


@dataclass(frozen=True, slots=True)
class Source:
    """Something to pack: where it is, and its name in the archive ("" for a directory's root).

    itself: with False only what is in it is packed, and not the directory itself.
    shown: what errors call it, if not by its path.
    """

    path: str
    name: str
    itself: bool = True
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory, link or device: its header, extended attributes, and name in errors.

    A regular file's bytes come after it, in pieces, as many as its header says.
    """

    info: tarfile.TarInfo
    xattrs: dict[str, bytes]
    path: str


Items = Generator[Entry | bytes, None, None]


def entries(
    sources: Sequence[Source],
    *,
    owner: tuple[int, int] | None = None,
    rules: Callable[[str], Rules] | None = None,
    layer: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Items:
    """Yield what is to be packed, and the bytes of files.

    owner: user and group of everything, instead of the files' own.
    rules: what to leave out of a directory that is copied.
    layer: it is for containerd: refuse what would remove something else in a state, and tell
        what it does not take from an archive.
    notice: is told what is left out.

    Symlinks are packed as such and never followed, hard links are kept among what is packed.
    Raises CopyError, PathNotFound; FileChanged if a file is not what it was when it was begun.
    """
    packer = _Packer(owner, layer=layer, notice=notice)
    for source in sources:
        yield from packer.add(source, rules)


def as_tar(items: Iterable[Entry | bytes]) -> Iterator[bytes]:
    """Yield entries as a tar archive, in pieces."""
    padding = b""
    for item in items:
        if isinstance(item, bytes):
            yield item
            continue
        if padding:
            yield padding
        yield _header(item)
        padding = bytes(-item.info.size % _RECORD)
    yield padding + END


def pack(
    sources: Sequence[Source], *, notice: Callable[[str], None] = lambda _: None
) -> Iterator[bytes]:
    """Yield files as a tar archive, in pieces; see ``entries``."""
    return as_tar(entries(sources, notice=notice))


def blocks(pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
    """Join pieces to blocks of about a megabyte, so that few of them cross threads."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield b"".join(waiting)
            waiting.clear()
            size = 0
    if waiting:
        yield b"".join(waiting)


class _Folder:
    """A directory that is being packed, held open: what is asked about is in it and no other."""

    def __init__(self, path: str, name: str, relative: str, fd: int | None) -> None:
        self.path, self.name, self.relative, self.fd = path, name, relative, fd
        # Not yet written, because it may turn out that nothing in it is wanted.
        self.header: Entry | None = None
        self.entries: list[str] = []

    def join(self, name: str) -> str:
        return os.path.join(self.path, name)

    def stat(self, name: str) -> os.stat_result:
        if self.fd is not None:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        return os.lstat(self.join(name))

    def open(self, name: str, more: int = 0) -> int:
        if self.fd is not None:
            return os.open(name, _FLAGS | more, dir_fd=self.fd)
        return os.open(self.join(name), _FLAGS | more)

    def readlink(self, name: str) -> str:
        if self.fd is not None:
            return os.readlink(name, dir_fd=self.fd)
        target = os.readlink(self.join(name))
        if sys.platform == "win32":
            target = target.removeprefix("\\\\?\\").replace("\\", "/")
        return target

    def xattrs(self, name: str) -> dict[str, bytes]:
        # There is no call that takes a directory and a name.
        where = self.join(name) if self.fd is None else f"/proc/self/fd/{self.fd}/{name}"
        return _xattrs(where)

    def read(self, name: str) -> bytes:
        """Return a small regular file's bytes; nothing for what is none."""
        fd = self.open(name)
        with open(fd, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else b""

    def close(self) -> None:
        if self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)


class _Packer:
    def __init__(
        self, owner: tuple[int, int] | None, *, layer: bool, notice: Callable[[str], None]
    ) -> None:
        self._owner, self._layer, self._notice = owner, layer, notice
        # Where a file with several names was packed first.
        self._seen: dict[tuple[int, int], str] = {}

    def add(self, source: Source, rules: Callable[[str], Rules] | None) -> Items:
        path = source.path
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise PathNotFound(
                f"there is no {shown(path)}", path=path, hint="check the path"
            ) from None
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        if not stat.S_ISDIR(status.st_mode):
            above, name = os.path.split(path)
            folder = _Folder(above or ".", "", "", None)
            try:
                if _AT:
                    folder.fd = os.open(folder.path, _FLAGS & ~_NOFOLLOW)
                    folder.path = os.path.dirname(source.shown) or folder.path
                yield from self._one(folder, name, source.name, folder.stat(name))
            except OSError as error:
                raise _unreadable(path, error) from None
            finally:
                folder.close()
            return
        chosen = rules(path) if rules is not None else None
        yield from self._tree(path, source, status, chosen)

    def _tree(
        self, path: str, source: Source, status: os.stat_result, rules: Rules | None
    ) -> Items:
        stack: list[_Folder] = []
        try:
            stack.append(self._enter(None, path, source.name, "", status, rules))
            if source.shown:
                stack[0].path = source.shown
            if not source.itself:
                stack[0].header = None
            elif stack[0].header is not None:
                yield stack[0].header
                stack[0].header = None
            while stack:
                folder = stack[-1]
                if not folder.entries:
                    stack.pop().close()
                    continue
                yield from self._next(stack, folder, folder.entries.pop(), rules)
        finally:
            for folder in stack:
                folder.close()

    def _next(self, stack: list[_Folder], folder: _Folder, name: str, rules: Rules | None) -> Items:
        where = folder.join(name)
        relative = f"{folder.relative}/{name}" if folder.relative else name
        try:
            status = folder.stat(name)
            is_folder = stat.S_ISDIR(status.st_mode)
            excluded = rules is not None and rules.excludes(relative, folder=is_folder)
            if excluded and not (is_folder and rules is not None and rules.may_keep(relative)):
                return
            arcname = f"{folder.name}/{name}" if folder.name else name
            if is_folder:
                entered = self._enter(folder, where, arcname, relative, status, rules)
                stack.append(entered)
                if excluded:
                    return  # its header waits for something in it that is wanted
            for held in stack:
                if held.header is not None:
                    yield held.header
                    held.header = None
            if not is_folder:
                yield from self._one(folder, name, arcname, status)
        except FileNotFoundError:
            raise FileChanged(
                f"{shown(where)} went away while it was copied",
                path=where,
                hint="copy it when nothing changes it",
            ) from None
        except OSError as error:
            raise _unreadable(where, error) from None

    def _enter(
        self,
        above: _Folder | None,
        path: str,
        arcname: str,
        relative: str,
        status: os.stat_result,
        rules: Rules | None,
    ) -> _Folder:
        folder = _Folder(path, arcname, relative, None)
        try:
            if _AT:
                more = getattr(os, "O_DIRECTORY", 0)
                name = os.path.basename(path)
                folder.fd = (
                    os.open(path, (_FLAGS | more) & ~_NOFOLLOW)
                    if above is None
                    else above.open(name, more)
                )
                if not os.path.samestat(os.fstat(folder.fd), status):
                    raise _changed(path)
            names = os.listdir(path if folder.fd is None else folder.fd)
            # Bytes: the order must not depend on how names are decoded.  The last one is next.
            folder.entries = sorted(names, key=os.fsencode, reverse=True)
            if rules is not None:
                rules.enter(relative, names, folder.read)
            info = self._info(path, arcname or ".", status)
            info.type = tarfile.DIRTYPE
            where = path if folder.fd is None else f"/proc/self/fd/{folder.fd}"
            attributes = self._attributes(path, _xattrs(where, follow=True))
            folder.header = _entry(info, attributes, path)
        except OSError as error:
            folder.close()
            raise _unreadable(path, error) from None
        except BaseException:
            folder.close()
            raise
        return folder

    def _info(self, path: str, arcname: str, status: os.stat_result) -> tarfile.TarInfo:
        if self._layer and any(p.startswith(_WHITEOUT) for p in arcname.split("/")):
            raise _no_whiteout(path)
        info = tarfile.TarInfo(arcname)
        info.mode = stat.S_IMODE(status.st_mode)
        if sys.platform == "win32":
            info.mode |= 0o755 if stat.S_ISDIR(status.st_mode) else 0o644
        info.uid, info.gid = self._owner or (status.st_uid, status.st_gid)
        _set_time(info, status.st_mtime_ns)
        if self._layer and status.st_mtime_ns < 0:
            self._notice(f"{shown(path)} is from before 1970, which no layer can say")
        return info

    def _attributes(self, path: str, found: dict[str, bytes]) -> dict[str, bytes]:
        """Leave out what containerd does not take from an archive."""
        if self._layer:
            for name in [name for name in found if name.startswith("trusted.")]:
                del found[name]
                self._notice(f"the attribute {name} of {shown(path)} was left out")
        return found

    def _one(self, folder: _Folder, name: str, arcname: str, status: os.stat_result) -> Items:
        """Pack what is no directory."""
        path, mode = folder.join(name), status.st_mode
        info = self._info(path, arcname, status)
        inode = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and status.st_ino and not stat.S_ISSOCK(mode):
            first = self._seen.setdefault(inode, arcname)
            if first != arcname:
                info.type, info.linkname = tarfile.LNKTYPE, first
                yield _entry(info, {}, path)
                return
        if stat.S_ISREG(mode):
            yield from self._file(folder, name, info, status)
            return
        if stat.S_ISLNK(mode):
            info.type, info.mode = tarfile.SYMTYPE, 0o777
            info.linkname = folder.readlink(name)
        elif stat.S_ISFIFO(mode):
            info.type = tarfile.FIFOTYPE
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
            if sys.platform != "win32":
                info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
            if self._layer and info.ischr() and info.devmajor == info.devminor == 0:
                raise _no_whiteout(path)
        else:
            self._notice(f"{shown(path)} is a socket and was left out")
            return
        yield _entry(info, self._attributes(path, folder.xattrs(name)), path)

    def _file(
        self, folder: _Folder, name: str, info: tarfile.TarInfo, status: os.stat_result
    ) -> Items:
        path = folder.join(name)
        try:
            fd = folder.open(name)
        except OSError as error:
            raise _unreadable(path, error) from None
        with open(fd, "rb", buffering=0) as file:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode) or not os.path.samestat(before, status):
                raise _changed(path)
            info.size = left = before.st_size
            _set_time(info, before.st_mtime_ns)
            yield _entry(info, self._attributes(path, _xattrs(fd)), path)
            while left:
                data = file.read(min(BLOCK, left))
                if not data:
                    raise _changed(path)
                left -= len(data)
                yield data
            after = os.fstat(fd)
            same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if not same or file.read(1):
                raise _changed(path)


def _set_time(info: tarfile.TarInfo, nanoseconds: int) -> None:
    info.mtime = nanoseconds // 10**9
    info.pax_headers = {k: v for k, v in info.pax_headers.items() if k != "mtime"}
    if nanoseconds % 10**9:
        sign = "-" if nanoseconds < 0 else ""
        whole, part = divmod(abs(nanoseconds), 10**9)
        # As text: a float has not enough digits.
        info.pax_headers = {**info.pax_headers, "mtime": f"{sign}{whole}.{part:09d}"}


def mtime_ns(info: tarfile.TarInfo) -> int:
    """Return a member's time in nanoseconds."""
    text = info.pax_headers.get("mtime")
    if text is None:
        return int(info.mtime) * 10**9
    try:
        whole, _, part = text.partition(".")
        value = abs(int(whole or "0")) * 10**9 + int(part[:9].ljust(9, "0"))
    except ValueError:
        return int(info.mtime) * 10**9
    return -value if text.startswith("-") else value


def _xattrs(where: str | int, *, follow: bool = False) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if sys.platform == "linux":
        follow = follow or isinstance(where, int)
        try:
            names = os.listxattr(where, follow_symlinks=follow)
        except OSError:
            return found  # a file system without any
        for name in sorted(names):
            if _is_kept(name):
                found[name] = os.getxattr(where, name, follow_symlinks=follow)
    return found


def _entry(info: tarfile.TarInfo, xattrs: dict[str, bytes], path: str) -> Entry:
    for name in xattrs:
        if "=" in name:
            raise CopyError(
                f"{shown(path)} has an attribute that no archive can hold: {name!r}",
                path=path,
                hint="remove the attribute, or leave the file out",
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise _no_text(path) from None
    return Entry(info, xattrs, path)


def _header(entry: Entry) -> bytes:
    info = entry.info
    for name, value in entry.xattrs.items():
        text = value.decode(errors="surrogateescape")
        info.pax_headers = {**info.pax_headers, _XATTR + name: text}
    try:
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise _no_text(entry.path) from None


# --- somebody else's archive -----------------------------------------------------------------


class _StrictInfo(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            # The zero blocks at the end, which have no public name.
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise ReadError(f"{error}, and so it is not whole") from None


class StrictTar(tarfile.TarFile):
    """An archive that is read as a stream, and that is whole or an error.

    Python's own reader takes a broken header for the end, and a stream that was cut between two
    files for a whole one.
    """

    tarinfo = _StrictInfo
    members: list[tarfile.TarInfo]

    def one_by_one(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members; none is kept, so memory does not grow with the archive."""
        while (member := self.next()) is not None:
            self.members.clear()
            yield member

    def data(self, member: tarfile.TarInfo) -> Iterator[tuple[int, bytes]]:
        """Yield a regular file's bytes and where they belong, in order; between them are zeros.

        Raises tarfile.ReadError if they are not all there.
        """
        assert self.fileobj is not None
        spans: Any = member.sparse if member.sparse is not None else [(0, member.size)]
        self.fileobj.seek(member.offset_data)
        for start, size in spans:
            done = 0
            while done < size:
                piece = self.fileobj.read(min(BLOCK, size - done))
                if not piece:
                    raise ReadError("a file in it is cut short")
                yield start + done, piece
                done += len(piece)


def open_tar(stream: BinaryIO, mode: Literal["r|", "r|*"] = "r|") -> StrictTar:
    """Open a stream as an archive; raises tarfile.TarError if it is none."""
    return StrictTar.open(
        None, mode, stream, bufsize=_PIECE, encoding="utf-8", errors="surrogateescape"
    )


def clean(name: str) -> str:
    """Return a member's name without what means nothing; raises CopyError if it leads upwards."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise CopyError(
            f"the archive has a name that leads out of it: {shown(name)}",
            path=name,
            hint="do not trust this archive",
        )
    return "/".join(parts)


def entries_again(
    stream: BinaryIO,
    prefix: str,
    *,
    itself: bool = False,
    owner: tuple[int, int] | None = None,
) -> Items:
    """Read an archive, compressed or not, and yield it again with ``prefix`` before its names.

    itself: whether the archive's own entry for its root becomes one for the prefix.
    Raises CopyError for what is no archive, is not whole, or would remove something.
    """
    try:
        with open_tar(stream, "r|*") as tar:
            for member in tar.one_by_one():
                yield from _renamed(tar, member, prefix, itself=itself, owner=owner)
            # Whoever writes to us must not find a closed pipe.
            while stream.read(BLOCK):
                pass
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise CopyError(
            f"what comes in is no tar archive, or not a whole one: {error}",
            hint="give the whole output of a 'tar --create'",
        ) from None
    except OSError as error:
        raise CopyError(f"cannot read the archive: {error.strerror or error}") from None


def _renamed(
    tar: StrictTar,
    member: tarfile.TarInfo,
    prefix: str,
    *,
    itself: bool,
    owner: tuple[int, int] | None,
) -> Items:
    name = clean(member.name)
    if not name and not (itself and member.isdir() and prefix):
        if member.isdir():
            return
        raise CopyError("the archive has a file without a name", hint="make it again")
    whole = "/".join(part for part in (prefix, name) if part)
    removes = any(part.startswith(_WHITEOUT) for part in whole.split("/"))
    if removes or (member.ischr() and member.devmajor == member.devminor == 0):
        raise _no_whiteout(member.name)
    link = member.linkname
    if member.islnk():
        link = "/".join(part for part in (prefix, clean(link)) if part)
    yield from again(tar, member, whole, link, owner)


def again(
    tar: StrictTar,
    member: tarfile.TarInfo,
    name: str,
    link: str,
    owner: tuple[int, int] | None = None,
) -> Items:
    """Yield a member as it was read, under another name."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = member.type, member.mode & 0o7777, link
    info.uid, info.gid = owner or (member.uid, member.gid)
    info.devmajor, info.devminor = member.devmajor, member.devminor
    _set_time(info, mtime_ns(member))
    if member.isreg():
        info.type, info.size = tarfile.REGTYPE, member.size
    elif not (member.isdir() or member.issym() or member.islnk() or member.isdev()):
        raise CopyError(
            f"the archive has something of an unknown kind: {shown(member.name)}",
            path=member.name,
            hint="make it again, with another tar",
        )
    yield _entry(info, xattrs_of(member), member.name)
    if not member.isreg():
        return
    done = 0
    for place, piece in tar.data(member):
        yield from _zeros(place - done)
        yield piece
        done = place + len(piece)
    yield from _zeros(info.size - done)


def _zeros(count: int) -> Items:
    while count > 0:
        yield bytes(min(count, BLOCK))
        count -= BLOCK


def xattrs_of(member: tarfile.TarInfo) -> dict[str, bytes]:
    """Return a member's extended attributes, those that mean something elsewhere."""
    found: dict[str, bytes] = {}
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if name != key and _is_kept(name):
            found[name] = value.encode(errors="surrogateescape")
    return found


def _is_kept(name: str) -> bool:
    return name.startswith(_KEPT_XATTRS) and not name.startswith(_LEFT_XATTRS)


# --- errors ----------------------------------------------------------------------------------


def shown(path: str) -> str:
    """Return a path for a message; bytes that are no text are escaped."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _unreadable(path: str, error: OSError | ValueError) -> CopyError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return CopyError(
        f"cannot read {shown(path)}: {why}", path=path, hint="mend that, or leave it out"
    )


def _no_text(path: str) -> CopyError:
    # Attributes' names must be UTF-8, and on Windows names may be half a character.
    return CopyError(
        f"the name of {shown(path)} or of its attributes is no text",
        path=path,
        hint="rename it, or leave it out",
    )


def _changed(path: str) -> FileChanged:
    return FileChanged(
        f"{shown(path)} changed while it was copied",
        path=path,
        hint="copy it when nothing writes to it",
    )


def _no_whiteout(path: str) -> CopyError:
    return CopyError(
        f"{shown(path)} cannot be copied in: in a layer it means that something is removed",
        path=path,
        hint="rename it, or leave it out with an ignore file",
    )
