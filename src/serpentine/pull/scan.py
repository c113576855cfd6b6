"""Tells from a layer's headers, while they pass, if it can be applied without the one below.

A tar may have ``secret/y`` and say nothing of ``secret/``.  containerd then makes that directory
like the one of the layers below, so they must be there.  A layer in which each directory is named
before what is in it comes out the same with and without them.

It is read as Go's ``archive/tar`` reads it, which is what containerd unpacks with.  Whatever is
not understood, or not certainly read alike, counts as "not alone": that costs time, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

__all__ = ["ALONE_BY", "LABEL_ALONE", "HeaderScan", "LayerScan", "can_look"]

# On a blob that may be applied without the layers below, for whoever finds it there.  The value is
# the number of the rules by which that was told: with other rules here, it is to be another one.
LABEL_ALONE = "io.serpentine/alone"
ALONE_BY = "1"

# How far the bytes may be ahead of the look at them, in bytes.
MOST_AHEAD = 1 << 20
# Seconds that a download is kept waiting for the look at it before that is given up; if it takes
# longer, this part of its time.
PATIENCE = 1.0
PATIENCE_PART = 0.5
# Seconds for the rest, once all has been downloaded.
LAST_PATIENCE = 5.0

_IN = 64 * 1024
_OUT = 256 * 1024
_ZSTD_PACKAGE = "compression" if sys.version_info >= (3, 14) else "backports"
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_MAGIC_SIZE = 4
# How far back zstd may refer, as a power of two: what most writers choose at most, and what a look
# then takes of memory.
_ZSTD_WINDOW = 23
# Go takes no longer names and attributes.
_MOST_META = 1 << 20
# What is remembered of a layer must not grow with it.
_MOST_FOLDERS = 40_000
_MOST_NAMES = 4_000_000
_OCTAL = re.compile(rb"[0-7]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_WHITEOUT = b".wh."


def can_look(media_type: str) -> bool:
    """Tell whether a layer of this type can be read here; what is in it may still say otherwise."""
    if not media_type.endswith("zstd"):
        return True
    try:
        return find_spec(f"{_ZSTD_PACKAGE}.zstd") is not None
    except ImportError:
        return False


class _NotAloneError(Exception):
    """It needs the layers below, or nobody can tell."""


class HeaderScan:
    """Reads a layer in pieces, whatever its compression.  Not for concurrent use.

    ``feed`` returns False when there is nothing more to be learnt.  ``alone`` is the answer.
    """

    def __init__(self) -> None:
        self._head = b""
        self._decompressor: _Decompressor | None = None
        self._new: Callable[[], _Decompressor] | None = None
        self._begun = False
        self._tar = _Tar()
        self._failed = False

    def feed(self, piece: bytes) -> bool:
        """Take the next bytes; tell whether more are wanted."""
        if self._failed or self._tar.ended:
            return False
        try:
            self._take_all(piece)
        except Exception:  # noqa: BLE001 - broken bytes are for containerd to find, not for a look
            self._failed = True
        return not (self._failed or self._tar.ended)

    @property
    def alone(self) -> bool:
        """Whether all that was fed can be applied without the layers below."""
        return self._begun and not self._failed and self._tar.whole

    def _take_all(self, piece: bytes) -> None:
        # In small pieces: what follows each of many members is copied.
        for at in range(0, len(piece), _IN):
            if self._tar.ended:
                return
            self._take(piece[at : at + _IN])

    def _take(self, piece: bytes) -> None:
        if not self._begun:
            piece = self._head + piece
            if len(piece) < _MAGIC_SIZE:
                self._head = piece
                return
            self._begun = True
            if piece.startswith(_GZIP):
                self._new = _Gzip
            elif piece.startswith(_ZSTD):
                self._new = _Zstd
        if self._new is None:
            self._tar.feed(piece)
            return
        while piece:
            if self._decompressor is None:
                self._decompressor = self._new()
            for out in self._decompressor.feed(piece):
                self._tar.feed(out)
                if self._tar.ended:
                    return
            # What follows the end is another member, or frame, of the same stream.
            piece = self._decompressor.unused
            if self._decompressor.eof:
                self._decompressor = None


class _Decompressor(Protocol):
    """Of one member or frame; ``unused`` is what comes after it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused(self) -> bytes: ...

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield what a piece becomes, a little at a time."""
        ...


class _Gzip:
    def __init__(self) -> None:
        try:
            from isal import isal_zlib

            self._object: Any = isal_zlib.decompressobj(wbits=31)
        except ImportError:
            self._object = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return bool(self._object.eof)

    @property
    def unused(self) -> bytes:
        return bytes(self._object.unused_data)

    def feed(self, piece: bytes) -> Iterator[bytes]:
        while True:
            yield (out := self._object.decompress(piece, _OUT))
            piece = self._object.unconsumed_tail
            if self._object.eof or (not piece and len(out) < _OUT):
                return


class _Zstd:
    def __init__(self) -> None:
        # Where it is not there, that is an error like another one: the layer is not alone.
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd

        window = {int(zstd.DecompressionParameter.window_log_max): _ZSTD_WINDOW}
        self._object = zstd.ZstdDecompressor(options=window)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused(self) -> bytes:
        return self._object.unused_data

    def feed(self, piece: bytes) -> Iterator[bytes]:
        while True:
            yield self._object.decompress(piece, _OUT)
            if self._object.eof or self._object.needs_input:
                return
            piece = b""


class _Tar:
    """A tar in pieces: headers are read, data is passed over."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._skip = 0
        # A header is read whole, and so is what a name or attributes consist of.
        self._need = _BLOCK
        self._meta = b""
        self._meta_size = 0
        self._zeros = 0
        # What was said of the entry that comes next.
        self._long_name: bytes | None = None
        self._records: dict[bytes, bytes] | None = None
        self._folders: set[bytes] = set()
        self._names = 0

    @property
    def whole(self) -> bool:
        """Whether it ended where a tar may end; Go wants no zeros there."""
        pending = self._rest or self._skip or self._meta
        return self.ended or not (pending or self._long_name or self._records)

    def feed(self, data: bytes) -> None:
        if self._skip >= len(data):
            self._skip -= len(data)
            return
        at, self._skip = self._skip, 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        while len(data) - at >= self._need:
            block = data[at : at + self._need]
            at += self._need
            if self._meta:
                self._described(block)
            else:
                self._header(block)
            if self.ended:
                return
            at += self._skip
            if at > len(data):
                self._skip = at - len(data)
                return
            self._skip = 0
        self._rest = data[at:]

    def _header(self, block: bytes) -> None:
        if block == _ZEROS:
            self._zeros += 1
            self.ended = self._zeros > 1
            return
        if self._zeros:
            raise _NotAloneError
        field = block[148:156].strip(b" \x00")
        if not _OCTAL.fullmatch(field) or int(field or b"0", 8) != (
            sum(block) - sum(block[148:156]) + 8 * 32
        ):
            raise _NotAloneError
        kind = block[156:157]
        size = _number(block[124:136])
        if kind in (b"x", b"L", b"K"):
            if size > _MOST_META:
                raise _NotAloneError
            if size:
                self._meta, self._meta_size = kind, size
                self._need = _padded(size)
            return
        name = _text(block[:100])
        magic = block[257:265]
        if magic.startswith(b"ustar\x00"):
            if block[508:] == b"tar\x00":
                raise _NotAloneError
            if prefix := _text(block[345:500]):
                name = prefix + b"/" + name
        elif magic == b"ustar  \x00":
            # Times; a tar of an old Go has a prefix there, and is read so if those are no numbers.
            for time in (block[345:357], block[357:369]):
                if not _OCTAL.fullmatch(time.strip(b" \x00")):
                    raise _NotAloneError
        name, size = self._say(name, size)
        self._entry(name, kind, size)
        self._skip = _padded(size)

    def _say(self, name: bytes, size: int) -> tuple[bytes, int]:
        """Return name and size as the descriptions before the header have them."""
        records, self._records = self._records, None
        long_name, self._long_name = self._long_name, None
        if records:
            if long_name is not None:
                raise _NotAloneError
            name = records.get(b"path") or name
            if b"size" in records:
                if not _DIGITS.fullmatch(records[b"size"]):
                    raise _NotAloneError
                size = int(records[b"size"])
        return long_name or name, size

    def _described(self, block: bytes) -> None:
        data, kind = block[: self._meta_size], self._meta
        self._meta, self._need = b"", _BLOCK
        if kind == b"L":
            self._long_name = _text(data)
        elif kind == b"x":
            if self._records is not None:
                raise _NotAloneError
            self._records = _records(data)

    def _entry(self, name: bytes, kind: bytes, size: int) -> None:
        if kind in (b"0", b"\x00"):
            if name.endswith(b"/"):
                raise _NotAloneError
        elif kind not in (b"1", b"2", b"3", b"4", b"5", b"6") or size:
            # Sparse files, attributes for all that follows, and whatever else there is.
            raise _NotAloneError
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise _NotAloneError
        if not parts:
            return  # the root: containerd passes over it, whatever it says
        path = b"/".join(parts)
        if len(parts) > 1 and path[: -len(parts[-1]) - 1] not in self._folders:
            raise _NotAloneError
        if kind != b"5":
            if path in self._folders:
                raise _NotAloneError  # replaced, with all that is in it
            return
        if parts[-1].startswith(_WHITEOUT):
            raise _NotAloneError
        if path not in self._folders:
            self._folders.add(path)
            self._names += len(path)
            if len(self._folders) > _MOST_FOLDERS or self._names > _MOST_NAMES:
                raise _NotAloneError


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _text(field: bytes) -> bytes:
    return field.partition(b"\x00")[0]


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \x00")
    if not _OCTAL.fullmatch(digits):
        raise _NotAloneError
    return int(digits or b"0", 8)


def _records(data: bytes) -> dict[bytes, bytes]:
    """Read the attributes of an entry: LENGTH KEY=VALUE, and an end of line, for each."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        length = _RECORD.match(data, at)
        if length is None:
            raise _NotAloneError
        end = at + int(length[1])
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        if end > len(data) or data[end - 1 : end] != b"\n" or not key or not equals:
            raise _NotAloneError
        if key.startswith(b"GNU.sparse") or (key == b"path" and b"\x00" in value):
            raise _NotAloneError
        if key in (b"path", b"size"):
            found[key] = value
        at = end
    return found


class LayerScan:
    """A look at a layer in a thread of its own, while the layer goes to containerd.

    The thread ends with the answer, or soon after ``stop``.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._given = self._taken = 0
        self._waited = 0.0
        self._awaited = False
        self._moved = asyncio.Event()
        self._over = self._stopped = self._alone = False
        threading.Thread(target=self._look, name="layer scan", daemon=True).start()

    async def feed(self, piece: bytes) -> None:
        """Take the next bytes; waits only while the look is far behind, and never for long."""
        if self._over or self._stopped:
            return
        self._given += len(piece)
        self._pieces.put(piece)
        if self._given - self._taken > MOST_AHEAD:
            now = self._loop.time()
            most = max(PATIENCE, PATIENCE_PART * (now - self._began)) - self._waited
            await self._wait(lambda: self._given - self._taken <= MOST_AHEAD // 2, most)
            self._waited += self._loop.time() - now

    async def alone(self) -> bool:
        """Return the answer; everything has been fed."""
        self._pieces.put(None)
        await self._wait(lambda: False, LAST_PATIENCE)
        return self._alone and not self._stopped

    def stop(self) -> None:
        """Give it up, if there is no answer yet."""
        self._stopped = True
        self._pieces.put(None)

    async def _wait(self, enough: Callable[[], bool], most: float) -> None:
        """Wait until it is over or far enough; after ``most`` seconds, give it up."""
        self._awaited = True
        try:
            async with asyncio.timeout(max(0.0, most)):
                while True:
                    self._moved.clear()
                    if self._over or enough():
                        break
                    await self._moved.wait()
        except TimeoutError:
            self.stop()
        finally:
            self._awaited = False

    def _look(self) -> None:
        scan = HeaderScan()
        while not self._stopped and (piece := self._pieces.get()) is not None:
            more = scan.feed(piece)
            self._taken += len(piece)
            if not more:
                break
            # Waking a loop that does not wait for it would cost more than the look.
            if self._awaited and self._given - self._taken <= MOST_AHEAD // 2:
                self._tell()
        self._alone = scan.alone
        self._over = True
        self._tell()

    def _tell(self) -> None:
        # The loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._moved.set)
