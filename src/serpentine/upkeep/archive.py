"""The names in a layer that containerd wrote, read as it comes: memory does not grow with it."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from serpentine.errors import ContainerdError

__all__ = ["CLEAR", "Entries", "read_entries"]

_BLOCK = tarfile.BLOCKSIZE
# A header of extended attributes; one that is larger is no archive of containerd's.
_MAX_EXTENDED = 1 << 20
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class Entries:
    """What an archive holds: headers by path, and the paths that it removes."""

    headers: Mapping[str, tarfile.TarInfo]
    removed: frozenset[str]


async def read_entries(pieces: AsyncIterator[bytes], limit: int) -> Entries:
    """Read an archive's headers, the first ``limit`` of them; raises ContainerdError."""
    reader = _Reader(pieces)
    headers: dict[str, tarfile.TarInfo] = {}
    removed: set[str] = set()
    extended: dict[str, str] = {}
    while len(headers) + len(removed) < limit:
        block = await reader.take(_BLOCK)
        if not block.strip(b"\0"):
            break
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ContainerdError(f"containerd's comparison is no archive: {error}") from None
        if info.type == tarfile.XHDTYPE:
            if not 0 <= info.size <= _MAX_EXTENDED:
                raise ContainerdError("containerd's comparison has a header that is too long")
            extended = _records(await reader.take(info.size))
            await reader.skip(-info.size % _BLOCK)
            continue
        try:
            _complete(info, extended)
        except ValueError as error:
            raise ContainerdError(f"containerd's comparison is no archive: {error}") from None
        size = 0 if info.type in _WITHOUT_DATA else info.size
        await reader.skip(size + -size % _BLOCK)
        extended = {}
        path = info.name.strip("/").removeprefix("./")
        above, _, last = path.rpartition("/")
        if last.startswith(_WHITEOUT):
            name = last.removeprefix(_WHITEOUT)
            removed.add(f"{above}/{name}" if above else name)
        elif path not in ("", "."):
            headers[path] = info
    return Entries(headers, frozenset(removed))


def _complete(info: tarfile.TarInfo, extended: Mapping[str, str]) -> None:
    """Take what a header has no room for from the one before it; raises ValueError."""
    info.name = extended.get("path", info.name)
    info.linkname = extended.get("linkpath", info.linkname)
    info.size = int(extended.get("size", info.size))
    info.uid = int(extended.get("uid", info.uid))
    info.gid = int(extended.get("gid", info.gid))
    info.mtime = float(extended.get("mtime", info.mtime))
    if info.size < 0:
        raise ValueError("a negative size")


def _records(data: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        found[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
    return found


class _Reader:
    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._waiting = b""

    async def take(self, size: int) -> bytes:
        while len(self._waiting) < size:
            piece = await anext(self._pieces, b"")
            if not piece:
                raise ContainerdError("containerd's comparison broke off")
            self._waiting += piece
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        return taken

    async def skip(self, size: int) -> None:
        while size > len(self._waiting):
            size -= len(self._waiting)
            self._waiting = await anext(self._pieces, b"")
            if not self._waiting:
                raise ContainerdError("containerd's comparison broke off")
        self._waiting = self._waiting[size:]


def _clear() -> bytes:
    info = tarfile.TarInfo(_OPAQUE)
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * _BLOCK)


CLEAR = _clear()
"""An archive that empties the directory that it is unpacked in."""
