"""One gRPC call that has an HTTP/2 connection to itself: what is sent and what it means, no I/O.

RFC 9113, and gRPC's "HTTP/2 protocol mapping".  There is one stream, number 1, and the end of the
call is the end of the connection.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

import grpc
from hpack import Decoder, HPACKError

from serpentine.containerd._convert import varint

__all__ = ["Buffer", "Call", "Status"]

Buffer: TypeAlias = bytes | memoryview

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Of a frame: its length (24 bits), type, flags, stream.
_HEADER = struct.Struct(">BHBBL")
_SETTING = struct.Struct(">HL")
_LENGTH = struct.Struct(">?L")  # before a message: whether compressed, how long

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE = 0, 1, 3, 4, 5
_PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 6, 7, 8, 9
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _ENABLE_PUSH, _HEADER_TABLE_SIZE = 4, 5, 2, 1

_STREAM = 1
_FRAME = 16384  # the largest that may be sent to who has said nothing, and to us
_WINDOW = 65535  # what may be sent to who has said nothing
_LARGEST_WINDOW = 2**31 - 1
# Answers are short and few, so that they are let in without counting: of a write, 2 GiB of them
# would be the answers to three terabytes.
_OPENING = b"".join(
    [
        _PREFACE,
        _HEADER.pack(0, 18, _SETTINGS, 0, 0),
        _SETTING.pack(_HEADER_TABLE_SIZE, 0),
        _SETTING.pack(_ENABLE_PUSH, 0),
        _SETTING.pack(_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW),
        _HEADER.pack(0, 4, _WINDOW_UPDATE, 0, 0),
        (_LARGEST_WINDOW - _WINDOW).to_bytes(4, "big"),
    ]
)
_LARGEST_ANSWER = 16 * 1024 * 1024
_LARGEST_HEADERS = 64 * 1024

_CODES = {str(code.value[0]): code for code in grpc.StatusCode}


class Status(NamedTuple):
    """How a call ended."""

    code: grpc.StatusCode
    details: str


class _BrokenError(Exception):
    """What came is not HTTP/2, or not gRPC."""


class Call:
    """A call's two directions, by the bytes of its connection.

    ``out`` is what to send next, whole frames in order; whoever sends takes away from its left what
    has been sent.  ``answers`` are messages that came, still serialized.  ``status`` is None until
    the call has ended.
    """

    def __init__(self, method: str, metadata: Sequence[tuple[str, str]]) -> None:
        self.out: deque[Buffer] = deque([_OPENING])
        self.answers: deque[bytes] = deque()
        self.status: Status | None = None
        self._unsent: deque[memoryview] = deque()
        self._finishing = self._finished = False
        self._connection_window = self._stream_window = self._first_window = _WINDOW
        self._largest_frame = _FRAME
        self._came = bytearray()
        self._message = bytearray()
        self._headers: bytearray | None = None
        self._headers_flags = 0
        self._farewell = ""
        self._decoder = Decoder(max_header_list_size=_LARGEST_HEADERS)
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "serpentine"),
            *metadata,
        ]
        block = b"".join(_literal(name) + _text(value) for name, value in headers)
        kind = _HEADERS
        while kind == _HEADERS or block:
            part, block = block[:_FRAME], block[_FRAME:]
            self._frame(kind, 0 if block else _END_HEADERS, _STREAM, part)
            kind = _CONTINUATION

    @property
    def is_sent(self) -> bool:
        """Whether all that was to be sent has been taken out of ``out``."""
        return not self._unsent and not self.out

    def send(self, parts: Sequence[Buffer]) -> None:
        """Put a message that consists of these parts into ``out``, as much as may be sent now.

        The rest follows when the other side takes more.  No byte is copied.
        """
        self._unsent.append(memoryview(_LENGTH.pack(False, sum(map(len, parts)))))
        self._unsent.extend(memoryview(part) for part in parts if part)
        self._fill()

    def finish(self) -> None:
        """Say that no message follows those that were given."""
        self._finishing = not self._finished
        self._fill()

    def received(self, data: bytes) -> None:
        """Take what came over the connection, cut anywhere."""
        self._came += data
        try:
            while self.status is None and len(self._came) >= _HEADER.size:
                high, low, kind, flags, stream = _HEADER.unpack_from(self._came)
                end = _HEADER.size + (high << 16 | low)
                if end > _HEADER.size + _FRAME:
                    raise _BrokenError("a frame is larger than 16 KiB")
                if len(self._came) < end:
                    break
                payload = bytes(self._came[_HEADER.size : end])
                del self._came[:end]
                self._take(kind, flags, stream & _LARGEST_WINDOW, payload)
        except _BrokenError as error:
            self.end(grpc.StatusCode.UNAVAILABLE, f"what answers does not speak gRPC: {error}")
        self._fill()

    def lost(self, why: str) -> None:
        """Take it that the connection has ended."""
        why = f"{why}, saying {self._farewell!r}" if self._farewell else why
        self.end(grpc.StatusCode.UNAVAILABLE, f"the connection was lost: {why}")

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """End the call, unless it has ended: nothing more is sent or taken."""
        if self.status is None:
            self.status = Status(code, details)
            self._unsent.clear()
            self.out.clear()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self.out.append(_HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload)

    def _fill(self) -> None:
        """Put into frames what may be sent now."""
        if self.status is not None:
            return
        unsent = self._unsent
        while unsent:
            # A frame of several parts is filled from them; a part may go into several frames.
            size = min(self._connection_window, self._stream_window, self._largest_frame)
            if size <= 0:
                return
            at = len(self.out)
            self.out.append(b"")
            left = size
            while left and unsent:
                part = unsent[0]
                if len(part) > left:
                    self.out.append(part[:left])
                    unsent[0] = part[left:]
                    left = 0
                else:
                    self.out.append(unsent.popleft())
                    left -= len(part)
            size -= left
            self.out[at] = _HEADER.pack(size >> 16, size & 0xFFFF, _DATA, 0, _STREAM)
            self._connection_window -= size
            self._stream_window -= size
        if self._finishing:
            self._finishing, self._finished = False, True
            self._frame(_DATA, _END_STREAM, _STREAM, b"")

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if (self._headers is not None) != (kind == _CONTINUATION):
            raise _BrokenError("headers are interrupted")
        if stream != _STREAM and (
            kind in (_DATA, _HEADERS, _RST_STREAM, _CONTINUATION)
            or (kind == _WINDOW_UPDATE and stream)
        ):
            raise _BrokenError("a frame is of a stream that was never opened")
        if kind == _DATA:
            self._take_data(_unpadded(flags, payload))
            if flags & _END_STREAM:
                self.end(grpc.StatusCode.UNKNOWN, "the answer ended without a status")
        elif kind == _HEADERS:
            block = _unpadded(flags, payload)
            self._headers = bytearray(block[5:] if flags & _PRIORITY else block)
            self._headers_flags = flags
            self._take_headers(flags)
        elif kind == _CONTINUATION:
            assert self._headers is not None
            self._headers += payload
            self._take_headers(flags)
        elif kind == _RST_STREAM:
            number = int.from_bytes(payload, "big")
            self.end(grpc.StatusCode.UNAVAILABLE, f"the call was broken off (RST_STREAM {number})")
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(payload)
            self._frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._frame(_PING, _ACK, 0, payload)
        elif kind == _GOAWAY:
            # With a high number, containerd is about to stop and lets the call come to its end.
            if int.from_bytes(payload[:4], "big") & _LARGEST_WINDOW < _STREAM:
                self.end(grpc.StatusCode.UNAVAILABLE, "containerd takes no calls any more")
            self._farewell = payload[8:108].decode("ascii", "replace")
        elif kind == _WINDOW_UPDATE:
            self._take_window(stream, payload)
        elif kind == _PUSH_PROMISE:
            raise _BrokenError("it pushes, which was forbidden")

    def _take_data(self, data: bytes) -> None:
        self._message += data
        while len(self._message) >= _LENGTH.size:
            compressed, size = self._message[0], int.from_bytes(self._message[1:5], "big")
            if compressed or size > _LARGEST_ANSWER:
                raise _BrokenError("an answer is compressed, or larger than 16 MiB")
            end = _LENGTH.size + size
            if len(self._message) < end:
                return
            self.answers.append(bytes(self._message[_LENGTH.size : end]))
            del self._message[:end]

    def _take_headers(self, flags: int) -> None:
        assert self._headers is not None
        if len(self._headers) > _LARGEST_HEADERS:
            raise _BrokenError("its headers are larger than 64 KiB")
        if not flags & _END_HEADERS:
            return
        block, self._headers = bytes(self._headers), None
        try:
            headers = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except (HPACKError, UnicodeDecodeError) as error:
            raise _BrokenError("its headers cannot be read") from error
        http = headers.get(":status", "200")
        if http != "200" and "grpc-status" not in headers:
            raise _BrokenError(f"its HTTP status is {http}")
        if not self._headers_flags & _END_STREAM:
            return
        number = headers.get("grpc-status", "")
        code = _CODES.get(number, grpc.StatusCode.UNKNOWN)
        self.end(code, unquote(headers.get("grpc-message", "")))

    def _take_settings(self, payload: bytes) -> None:
        if len(payload) % _SETTING.size:
            raise _BrokenError("its settings are cut off")
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _LARGEST_WINDOW:
                    raise _BrokenError("a window is opened too far")
                # Counts for what was sent before, too: the window can be below zero then.
                self._stream_window = _window(self._stream_window, value - self._first_window)
                self._first_window = value
            elif name == _MAX_FRAME_SIZE:
                self._largest_frame = min(max(value, _FRAME), 2**24 - 1)

    def _take_window(self, stream: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & _LARGEST_WINDOW
        if not more:
            raise _BrokenError("it opens a window by nothing")
        if stream == 0:
            self._connection_window = _window(self._connection_window, more)
        else:
            self._stream_window = _window(self._stream_window, more)


def _literal(name: str) -> bytes:
    """Begin a header that no intermediary may remember (RFC 7541, section 6.2.3).

    Not by ``hpack``, which logs what it encodes, a token too.
    """
    return b"\x10" + _text(name)


def _text(text: str) -> bytes:
    """Return a string as HPACK has it, not compressed (RFC 7541, section 5.2)."""
    data = text.encode("ascii")
    size = len(data)
    return (bytes([size]) if size < 0x7F else b"\x7f" + varint(size - 0x7F)) + data


def _window(now: int, more: int) -> int:
    if now + more > _LARGEST_WINDOW:
        raise _BrokenError("a window is opened too far")
    return now + more


def _unpadded(flags: int, payload: bytes) -> bytes:
    """Return what a frame holds, without what was added to hide its length."""
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _BrokenError("a frame has more padding than bytes")
    return payload[1 : len(payload) - payload[0]]
