"""Our HTTP/2 against another's: what is sent, what is understood, and what ends a call."""

from __future__ import annotations

import itertools
import random
import struct

import grpc
import h2.errors
import h2.events
import pytest
from h2.settings import SettingCodes
from hpack import Encoder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serpentine.containerd._http2 import Call, Status
from tests.support.http2 import frame as message
from tests.support.http2 import server_side

METHOD = "/containerd.services.content.v1.Content/Write"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE = 0, 1, 3, 4, 5
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 0x20
FRAME, WINDOW = 16384, 65535
LARGEST_WINDOW = 2**31 - 1
BYTES = random.Random(1).randbytes(300_000)
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
UNAVAILABLE, UNKNOWN = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">L", stream) + payload
    )


def headers(*pairs: tuple[str, str], flags: int = END_HEADERS | END_STREAM) -> bytes:
    return frame(HEADERS, flags, 1, Encoder().encode(pairs))


def setting(code: SettingCodes, value: int) -> bytes:
    return frame(SETTINGS, payload=struct.pack(">HL", code, value))


def window(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">L", more))


def messages(data: bytes) -> list[bytes]:
    """Return the messages that this is, and nothing else."""
    found = []
    while data:
        compressed, size = struct.unpack_from(">?L", data)
        assert not compressed
        assert len(data) >= 5 + size
        found.append(bytes(data[5 : 5 + size]))
        data = data[5 + size :]
    return found


def taken(call: Call) -> bytes:
    """Return all that is to be sent now, and take it out."""
    data = b"".join(call.out)
    call.out.clear()
    return data


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return kind, flags, stream and payload of each; nothing may be left over."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 3], "big")
        _, _, _, kind, flags, stream = struct.unpack_from(">BBBBBL", data, at)
        at += 9 + size
        assert len(data) >= at
        found.append((kind, flags, stream, data[at - size : at]))
    return found


def begun() -> Call:
    """A call whose beginning has been sent."""
    call = Call(METHOD, [])
    taken(call)
    return call


class Server:
    """h2 at the other end, which raises whatever the protocol forbids.

    It has taken the beginning of the call.  Its own first settings wait to be given to us.
    """

    def __init__(self, call: Call, changes: dict[SettingCodes, int] | None = None) -> None:
        self.call = call
        self.h2 = server_side()
        self.data = bytearray()
        self.events: list[h2.events.Event] = []
        self.to_call = bytearray()
        self.unsettled = 0
        self.change(changes or {})
        self.take()

    def count(self, kind: type[h2.events.Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def change(self, changes: dict[SettingCodes, int]) -> None:
        self.h2.update_settings(changes)
        self.unsettled += 1
        self.flush()

    def open(self, stream: int, more: int) -> None:
        self.h2.increment_flow_control_window(more, stream or None)
        self.flush()

    def answer(self, data: bytes) -> None:
        """Send these bytes as DATA frames."""
        for at in range(0, len(data), FRAME):
            self.h2.send_data(1, data[at : at + FRAME])
        self.flush()

    def flush(self) -> None:
        self.to_call += self.h2.data_to_send()

    def take(self, most: int = 2**40) -> None:
        """Take so many bytes at most from the call."""
        out = self.call.out
        while out and most:
            part = bytes(out.popleft())
            if len(part) > most:
                out.appendleft(part[most:])
                part = part[:most]
            most -= len(part)
            # One by one: what h2 takes at once, it measures by the settings before it.
            for event in self.h2.receive_data(part):
                self.events.append(event)
                if isinstance(event, h2.events.DataReceived):
                    self.data += event.data
                elif isinstance(event, h2.events.SettingsAcknowledged):
                    self.unsettled -= 1
        self.flush()

    def give(self, most: int = 2**40) -> None:
        """Give so many bytes at most to the call."""
        data = bytes(self.to_call[:most])
        del self.to_call[:most]
        self.call.received(data)

    def exchange(self) -> None:
        """Until there is nothing to say on either side."""
        while self.call.out or self.to_call:
            self.give()
            self.take()


def served(changes: dict[SettingCodes, int] | None = None, **call) -> Server:
    """A server that has greeted, and been greeted."""
    server = Server(Call(METHOD, call.get("metadata", [])), changes)
    server.exchange()
    assert server.unsettled == 0
    return server


def cut(sizes: list[int]) -> list[memoryview]:
    """Return parts of these sizes that differ from each other."""
    return [memoryview(BYTES)[n * 37 : n * 37 + size] for n, size in enumerate(sizes)]


class TestTheBeginning:
    def test_the_request(self):
        server = served(metadata=[("containerd-namespace", "n"), ("a", "b"), ("a", "c")])
        [request] = [e for e in server.events if isinstance(e, h2.events.RequestReceived)]
        assert [tuple(header) for header in request.headers] == [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", METHOD),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "serpentine"),
            ("containerd-namespace", "n"),
            ("a", "b"),
            ("a", "c"),
        ]
        assert request.stream_ended is None

    def test_all_answers_are_let_in(self):
        """No window of ours is ever opened again."""
        server = served()
        assert server.h2.local_flow_control_window(1) == LARGEST_WINDOW
        assert server.h2.remote_settings.enable_push == 0
        assert server.h2.remote_settings.header_table_size == 0

    @pytest.mark.parametrize("more", [-1, 0, 1, FRAME - 1, FRAME, FRAME + 1])
    def test_metadata_that_fill_frames(self, more):
        """An X takes a byte."""

        def blocks(count):
            call = Call(METHOD, [("x", "X" * count)])
            opening, *rest = call.out
            assert opening.startswith(b"PRI * HTTP/2.0")
            return frames(b"".join(rest))

        [(_, _, _, block)] = blocks(10_000)
        count = 10_000 + FRAME + more - len(block)
        found = blocks(count)
        assert [kind for kind, *_ in found] == [HEADERS, CONTINUATION, CONTINUATION][: len(found)]
        assert [flags for _, flags, _, _ in found] == [0, 0, END_HEADERS][-len(found) :]
        assert all(len(payload) == FRAME for *_, payload in found[:-1])
        assert 0 < len(found[-1][-1]) <= FRAME
        server = served(metadata=[("x", "X" * count)])
        [request] = [e for e in server.events if isinstance(e, h2.events.RequestReceived)]
        assert dict(request.headers)["x"] == "X" * count

    def test_a_server_that_says_nothing(self):
        """A message may follow before any settings have come."""
        call = Call(METHOD, [])
        call.send([b"abc"])
        call.finish()
        server = Server(call)
        assert messages(server.data) == [b"abc"]
        assert server.count(h2.events.StreamEnded) == 1
        assert call.status is None


class TestMessages:
    _sizes = st.sampled_from([0, 1, 5, FRAME - 5, FRAME, WINDOW - 5, 100_000]) | st.integers(
        0, 40_000
    )
    _steps = st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.lists(_sizes, max_size=3)),
            st.tuples(st.just("take"), st.integers(1, 50_000)),
            st.tuples(st.just("give"), st.integers(1, 60)),
            st.tuples(st.just("window"), st.sampled_from([0, 1]), st.integers(1, 70_000)),
            st.tuples(st.just("initial"), st.sampled_from([0, 1, 99, FRAME, 70_001, 2**20])),
            st.tuples(st.just("frame"), st.sampled_from([FRAME, FRAME + 1, 65536, 2**24 - 1])),
            st.tuples(st.just("ping")),
        ),
        min_size=3,
        max_size=25,
    )

    @settings(max_examples=300)
    @given(steps=_steps, first=st.sampled_from([0, 1, WINDOW, 10**6]), early=st.booleans())
    @example(
        # A window that a change of the settings takes below zero, and that is opened in part.
        steps=[
            ("give", 60),
            ("send", [100_000]),
            ("take", 50_000),
            ("initial", 99),
            ("give", 60),
            ("window", 0, 70_000),
            ("window", 1, 65_000),
            ("give", 60),
            ("take", 50_000),
        ],
        first=WINDOW,
        early=True,
    )
    def test_arrive(self, steps, first, early):
        """Whole and in order, in whatever windows and frames, by whatever pieces of bytes."""
        call = Call(METHOD, [])
        server = Server(call, {SettingCodes.INITIAL_WINDOW_SIZE: first})
        sent, pings = [], 0
        for step, *values in steps:
            match step:
                case "send":
                    parts = cut(*values)
                    sent.append(b"".join(parts))
                    call.send(parts)
                case "take":
                    server.take(*values)
                case "give":
                    server.give(*values)
                case "window":
                    server.open(*values)
                # h2 counts wrong when two changes are on their way.
                case "initial" if not server.unsettled:
                    server.change({SettingCodes.INITIAL_WINDOW_SIZE: values[0]})
                case "frame" if not server.unsettled:
                    server.change({SettingCodes.MAX_FRAME_SIZE: values[0]})
                case "ping":
                    server.h2.ping(bytes(8))
                    server.flush()
                    pings += 1
        server.exchange()
        if early and not call.is_sent:
            call.finish()
        while not call.is_sent:
            server.open(0, 1_000_003)
            server.open(1, 1_000_003)
            server.exchange()
        if not server.count(h2.events.StreamEnded):
            # h2 lets it in with a window below zero no more than data.
            server.open(1, 2_000_003)
            call.finish()
            server.exchange()
        assert messages(server.data) == sent
        assert server.count(h2.events.StreamEnded) == 1
        assert server.count(h2.events.PingAckReceived) == pings
        assert server.unsettled == 0
        assert call.status is None
        assert call.is_sent

    def test_a_window_below_zero(self):
        """A smaller initial window counts for what was sent before it, too."""
        server = served()
        server.call.send([BYTES[:100_000]])
        server.exchange()
        assert len(server.data) == WINDOW
        server.open(0, 10**6)
        server.change({SettingCodes.INITIAL_WINDOW_SIZE: 100})
        server.exchange()
        server.open(1, WINDOW - 100)
        server.exchange()
        assert len(server.data) == WINDOW
        server.open(1, 1)
        server.exchange()
        assert len(server.data) == WINDOW + 1
        server.change({SettingCodes.INITIAL_WINDOW_SIZE: 101})
        server.exchange()
        assert len(server.data) == WINDOW + 2

    def test_one_window_does_not_count_for_the_other(self):
        server = served()
        server.call.send([BYTES])
        server.exchange()
        for opened, closed in [(0, 1), (1, 0)]:
            before = len(server.data)
            server.open(opened, 1000)
            server.exchange()
            assert len(server.data) == before
            server.open(closed, 1000)
            server.exchange()
            assert len(server.data) == before + 1000

    @pytest.mark.parametrize("most", [FRAME, FRAME + 1, 100_000, 2**24 - 1])
    def test_frames_are_as_large_as_they_may_be(self, most):
        server = served(
            {SettingCodes.MAX_FRAME_SIZE: most, SettingCodes.INITIAL_WINDOW_SIZE: 10**6}
        )
        server.open(0, 10**6)
        server.exchange()
        server.call.send([BYTES[:1], BYTES[1:]])
        sizes = [len(payload) for *_, payload in frames(b"".join(server.call.out))]
        assert max(sizes) == min(most, len(BYTES) + 5)
        assert sizes[:-1] == [most] * (len(sizes) - 1)
        server.exchange()
        assert messages(server.data) == [BYTES]

    def test_no_byte_is_copied(self):
        server = served({SettingCodes.INITIAL_WINDOW_SIZE: 10**6})
        server.open(0, 10**6)
        server.exchange()
        server.call.send([BYTES])
        parts = [p for p in server.call.out if isinstance(p, memoryview) and p.obj is BYTES]
        assert sum(map(len, parts)) == len(BYTES)

    def test_small_messages_share_a_frame(self):
        """Those that wait for the window."""
        server = served({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        for n in range(5):
            server.call.send([bytes([n]) * n])
        server.exchange()
        assert not server.data
        server.open(1, 1000)
        server.exchange()
        assert messages(server.data) == [bytes([n]) * n for n in range(5)]
        assert server.count(h2.events.DataReceived) == 1


class TestFinish:
    def test_after_the_data_that_waits(self):
        server = served()
        server.call.send([BYTES[:WINDOW]])
        server.call.finish()
        server.exchange()
        assert len(server.data) == WINDOW
        assert server.count(h2.events.StreamEnded) == 0
        assert not server.call.is_sent
        server.open(0, 5)
        server.open(1, 5)
        server.exchange()
        assert messages(server.data) == [BYTES[:WINDOW]]
        assert server.count(h2.events.StreamEnded) == 1

    def test_needs_no_window(self):
        server = served()
        server.call.send([BYTES[: WINDOW - 5]])
        server.exchange()
        assert server.h2.remote_flow_control_window(1) == 0
        server.call.finish()
        server.exchange()
        assert server.count(h2.events.StreamEnded) == 1

    def test_is_said_once(self):
        """Whatever comes after it."""
        server = served()
        server.call.send([BYTES[:10]])
        server.call.finish()
        server.exchange()
        server.h2.ping(bytes(8))
        server.change({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        server.exchange()
        server.call.received(window(0, 1000) + window(1, 1000))
        server.exchange()
        assert server.count(h2.events.StreamEnded) == 1
        assert server.call.is_sent
        assert server.call.status is None

    def test_is_said_once_however_often_it_is_called(self):
        """A task that was cancelled while it waited may come again."""
        server = served()
        server.call.send([BYTES])
        server.call.finish()
        server.call.finish()
        server.open(0, 10**6)
        server.open(1, 10**6)
        server.exchange()
        server.call.finish()
        assert not server.call.out
        assert server.count(h2.events.StreamEnded) == 1


class TestAnswers:
    @settings(max_examples=60)
    @given(
        sizes=st.lists(
            st.sampled_from([0, 1, 4, FRAME - 5, FRAME, 20_000]) | st.integers(0, 300), max_size=6
        ),
        parts=st.lists(st.integers(1, FRAME), min_size=1, max_size=4),
        paddings=st.lists(st.none() | st.integers(0, 255), min_size=1, max_size=4),
        cuts=st.lists(
            st.sampled_from([9, 10, FRAME]) | st.integers(1, 20_000), min_size=1, max_size=5
        ),
    )
    def test_come_whole(self, sizes, parts, paddings, cuts):
        """However they are cut into frames, and these on their way."""
        server = served()
        expected = [bytes(part) for part in cut(sizes)]
        server.h2.send_headers(1, RESPONSE)
        data = b"".join(map(message, expected))
        for size, padding in zip(itertools.cycle(parts), itertools.cycle(paddings), strict=False):
            size -= min(size - 1, 0 if padding is None else padding + 1)
            server.h2.send_data(1, data[:size], pad_length=padding)
            data = data[size:]
            if not data:
                break
        server.h2.send_headers(1, OK, end_stream=True)
        server.flush()
        for size in itertools.cycle(cuts):
            server.give(max(size, len(server.to_call) // 500))
            if not server.to_call:
                break
        assert list(server.call.answers) == expected
        assert server.call.status == Status(grpc.StatusCode.OK, "")

    def test_byte_by_byte(self):
        """And each as soon as its last byte is there."""
        server = served()
        server.h2.send_headers(1, RESPONSE)
        server.h2.send_data(1, message(b"abc") + message(b""))
        server.flush()
        seen = []
        while server.to_call:
            server.give(1)
            seen.append(len(server.call.answers))
        assert seen[-1] == 2
        assert list(server.call.answers) == [b"abc", b""]
        assert server.call.status is None

    def test_come_while_we_send(self):
        server = served()
        server.call.send([BYTES])
        server.h2.send_headers(1, RESPONSE)
        server.answer(message(b"1"))
        server.exchange()
        assert list(server.call.answers) == [b"1"]
        server.open(0, 10**6)
        server.open(1, 10**6)
        server.answer(message(b"2"))
        server.exchange()
        assert list(server.call.answers) == [b"1", b"2"]
        assert messages(server.data) == [BYTES]

    def test_before_the_request_is_complete(self):
        """An error that is told while we send: what came before it counts."""
        server = served()
        server.call.send([BYTES])
        server.h2.send_headers(1, RESPONSE)
        server.answer(message(b"1"))
        server.h2.send_headers(1, [("grpc-status", "6"), ("grpc-message", "x")], end_stream=True)
        server.flush()
        server.give()
        assert list(server.call.answers) == [b"1"]
        assert server.call.status == Status(grpc.StatusCode.ALREADY_EXISTS, "x")
        assert not server.call.out


class TestTheStatus:
    @pytest.mark.parametrize("code", list(grpc.StatusCode))
    @pytest.mark.parametrize("only", [False, True])
    def test_codes(self, code, only):
        """In trailers, and in headers that are all there is."""
        server = served()
        status = [("grpc-status", str(code.value[0])), ("grpc-message", "why")]
        if only:
            server.h2.send_headers(1, RESPONSE + status, end_stream=True)
        else:
            server.h2.send_headers(1, RESPONSE)
            server.h2.send_headers(1, status, end_stream=True)
        server.flush()
        server.give()
        assert server.call.status == Status(code, "why")

    @pytest.mark.parametrize(
        ("sent", "told"),
        [
            ("no space left on device", "no space left on device"),
            ("100%25 of n%C3%A4h: %E2%82%AC", "100% of näh: €"),
            ("50% %zz %2", "50% %zz %2"),
            ("a%FFb", "a\ufffdb"),
            ("", ""),
        ],
    )
    def test_the_message(self, sent, told):
        call = begun()
        call.received(headers(*RESPONSE, ("grpc-status", "2"), ("grpc-message", sent)))
        assert call.status == Status(UNKNOWN, told)

    @pytest.mark.parametrize(
        "number",
        ["", "x", "-1", "17", "99", " 0", "0x0", "1.0", "²", "1" * 30],
    )
    def test_a_status_that_is_none(self, number):
        call = begun()
        call.received(headers(*RESPONSE, ("grpc-status", number)))
        assert call.status == Status(UNKNOWN, "")

    def test_a_status_that_has_too_many_digits(self):
        """Python does not make a number of more than 4300."""
        call = begun()
        call.received(headers(*RESPONSE, ("grpc-status", "1" * 5000)))
        assert call.status == Status(UNKNOWN, "")

    def test_no_status(self):
        call = begun()
        call.received(headers(*RESPONSE))
        assert call.status == Status(UNKNOWN, "")

    def test_data_that_end_the_stream(self):
        """What they hold counts, but that it was all nobody has said."""
        call = begun()
        call.received(headers(*RESPONSE, flags=END_HEADERS))
        call.received(frame(DATA, END_STREAM, 1, message(b"a")))
        assert list(call.answers) == [b"a"]
        assert call.status == Status(UNKNOWN, "the answer ended without a status")

    @pytest.mark.parametrize("flags", [END_HEADERS, END_HEADERS | END_STREAM])
    def test_of_http(self, flags):
        """A proxy has answered, which is no gRPC server."""
        call = begun()
        call.received(headers((":status", "502"), ("content-type", "text/html"), flags=flags))
        assert call.status == Status(
            UNAVAILABLE, "what answers does not speak gRPC: its HTTP status is 502"
        )

    def test_of_http_with_one_of_ours(self):
        call = begun()
        call.received(headers((":status", "404"), ("grpc-status", "5"), ("grpc-message", "x")))
        assert call.status == Status(grpc.StatusCode.NOT_FOUND, "x")

    @pytest.mark.parametrize("size", [FRAME, 40_000])
    def test_metadata_that_need_more_frames(self, size):
        server = served()
        server.h2.send_headers(1, [*RESPONSE, ("x", "X" * size)])
        server.answer(message(b"a"))
        trailers = [("y", "X" * size), ("grpc-status", "11"), ("grpc-message", "far")]
        server.h2.send_headers(1, trailers, end_stream=True)
        server.flush()
        sent = frames(bytes(server.to_call))
        assert sum(kind == CONTINUATION for kind, *_ in sent) >= 2
        while server.to_call:
            server.give(1000)
        assert list(server.call.answers) == [b"a"]
        assert server.call.status == Status(grpc.StatusCode.OUT_OF_RANGE, "far")

    def test_headers_with_priority_and_padding(self):
        block = Encoder().encode([*RESPONSE, ("grpc-status", "5"), ("grpc-message", "x")])
        flags = END_HEADERS | END_STREAM | PADDED | PRIORITY
        payload = b"\x07" + bytes(4) + b"\x10" + block + bytes(7)
        call = begun()
        call.received(frame(HEADERS, flags, 1, payload))
        assert call.status == Status(grpc.StatusCode.NOT_FOUND, "x")

    def test_the_stream_ends_with_the_first_headers_frame(self):
        """And not with the last, which has no such flag."""
        block = Encoder().encode([*RESPONSE, ("grpc-status", "5")])
        call = begun()
        call.received(frame(HEADERS, END_STREAM, 1, block[:5]))
        assert call.status is None
        call.received(frame(CONTINUATION, 0, 1) + frame(CONTINUATION, END_HEADERS, 1, block[5:]))
        assert call.status == Status(grpc.StatusCode.NOT_FOUND, "")


class TestControl:
    def test_pings_are_answered(self):
        call = begun()
        call.received(frame(PING, 0, 0, b"12345678"))
        assert frames(taken(call)) == [(PING, ACK, 0, b"12345678")]

    def test_settings_are_acknowledged(self):
        call = begun()
        call.received(frame(SETTINGS) + setting(SettingCodes.MAX_CONCURRENT_STREAMS, 1))
        assert frames(taken(call)) == [(SETTINGS, ACK, 0, b"")] * 2

    def test_acknowledgements_are_not(self):
        call = begun()
        call.received(frame(SETTINGS, ACK) + frame(PING, ACK, 0, bytes(8)))
        assert taken(call) == b""

    @pytest.mark.parametrize("already", [0, 1, 5, 9, 10, 5000, 40_000])
    def test_in_the_midst_of_a_message(self, already):
        """Between its frames, wherever the sending stands."""
        server = served()
        server.call.send([BYTES[:20_000], BYTES])
        server.take(already)
        server.h2.ping(b"12345678")
        server.change({SettingCodes.INITIAL_WINDOW_SIZE: 200_000})
        server.give()
        server.exchange()
        assert server.count(h2.events.PingAckReceived) == 1
        assert server.unsettled == 0
        server.open(0, 10**6)
        server.open(1, 10**6)
        server.exchange()
        assert messages(server.data) == [BYTES[:20_000] + BYTES]

    def test_larger_windows_are_used_after_the_acknowledgement(self):
        """h2 counts with them only then."""
        server = served()
        server.open(0, 10**6)
        server.exchange()
        server.call.send([BYTES])
        server.exchange()
        server.change({SettingCodes.INITIAL_WINDOW_SIZE: 10**6, SettingCodes.MAX_FRAME_SIZE: 2**17})
        server.give()
        kinds = [kind for kind, *_ in frames(b"".join(server.call.out))]
        assert kinds == [SETTINGS, DATA, DATA]
        server.exchange()
        assert messages(server.data) == [BYTES]

    def test_what_is_unknown_is_passed_over(self):
        call = begun()
        call.received(setting(99, 1)[:9] + struct.pack(">HL", 99, 1))
        taken(call)
        call.received(frame(2, 0, 1, bytes(5)) + frame(10, 255, 0, b"abc") + frame(255, 0, 77))
        assert call.status is None
        assert taken(call) == b""

    def test_a_server_about_to_stop(self):
        """It lets the calls come to their end that it has taken, and opens windows for them."""
        server = served()
        server.call.send([BYTES])
        server.exchange()
        server.to_call += frame(GOAWAY, payload=struct.pack(">LL", LARGEST_WINDOW, 0))
        server.to_call += frame(GOAWAY, payload=struct.pack(">LL", 1, 0) + b"debug")
        server.open(0, 10**6)
        server.open(1, 10**6)
        server.exchange()
        assert messages(server.data) == [BYTES]
        server.h2.send_headers(1, RESPONSE)
        server.h2.send_headers(1, OK, end_stream=True)
        server.flush()
        server.give()
        assert server.call.status == Status(grpc.StatusCode.OK, "")

    def test_a_server_that_has_not_taken_the_call(self):
        server = served()
        server.call.send([BYTES])
        server.h2.close_connection(h2.errors.ErrorCodes.NO_ERROR, last_stream_id=0)
        server.flush()
        server.give()
        assert server.call.status == Status(UNAVAILABLE, "containerd takes no calls any more")
        assert not server.call.out

    def test_a_call_that_is_broken_off(self):
        server = served()
        server.h2.send_headers(1, RESPONSE)
        server.answer(message(b"a"))
        server.h2.reset_stream(1, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
        server.flush()
        server.give()
        assert list(server.call.answers) == [b"a"]
        assert server.call.status == Status(UNAVAILABLE, "the call was broken off (RST_STREAM 11)")

    def test_a_good_end_is_not_broken_off_afterwards(self):
        """Go's server says both when we have not finished."""
        server = served()
        server.h2.send_headers(1, RESPONSE)
        server.h2.send_headers(1, OK, end_stream=True)
        server.flush()
        server.to_call += frame(RST_STREAM, 0, 1, bytes(4))
        server.give()
        assert server.call.status == Status(grpc.StatusCode.OK, "")


def bomb() -> bytes:
    """A header of 4000 bytes, and twenty times the same by its number."""
    return Encoder().encode([("x", "X" * 3900)]) + b"\xbe" * 20


_opened = headers(*RESPONSE, flags=END_HEADERS)

WRONG = {
    "a frame larger than 16 KiB": (frame(DATA, 0, 1, bytes(FRAME + 1)), "larger than 16 KiB"),
    "only its head": (frame(DATA, 0, 1, bytes(FRAME + 1))[:9], "larger than 16 KiB"),
    "HTTP/1.1": (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "larger than 16 KiB"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46\x00\x00\x00", "larger than 16 KiB"),
    "compressed": (_opened + frame(DATA, 0, 1, b"\x01" + bytes(4)), "compressed"),
    "a large answer": (
        _opened + frame(DATA, 0, 1, struct.pack(">?L", False, 16 * 2**20 + 1)),
        "larger than 16 MiB",
    ),
    "data of another stream": (_opened + frame(DATA, 0, 3, b"a"), "never opened"),
    "data of the connection": (_opened + frame(DATA, 0, 0, b"a"), "never opened"),
    "headers of another stream": (frame(HEADERS, END_HEADERS, 3), "never opened"),
    "a reset of another stream": (frame(RST_STREAM, 0, 3, bytes(4)), "never opened"),
    "a continuation of another stream": (
        frame(HEADERS, 0, 1) + frame(CONTINUATION, END_HEADERS, 3),
        "never opened",
    ),
    "a window of another stream": (window(3, 1), "never opened"),
    "a push": (frame(PUSH_PROMISE, END_HEADERS, 1, b"\x00\x00\x00\x02\x88"), "pushes"),
    "a window of the connection too large": (window(0, LARGEST_WINDOW) * 2, "too far"),
    "a window of the stream too large": (window(1, LARGEST_WINDOW) + window(1, 1), "too far"),
    "an initial window too large": (setting(SettingCodes.INITIAL_WINDOW_SIZE, 2**31), "too far"),
    "a setting after which a window is too large": (
        window(1, LARGEST_WINDOW) + setting(SettingCodes.INITIAL_WINDOW_SIZE, WINDOW + 1),
        "too far",
    ),
    "a window opened by 0": (window(0, 0), "by nothing"),
    "a window of the stream opened by 0": (window(1, 0), "by nothing"),
    "a window opened by the bit that does not count": (window(1, 2**31), "by nothing"),
    "settings cut off": (frame(SETTINGS, payload=b"\x00\x04\x00\x00\x00"), "cut off"),
    "padding without its length": (_opened + frame(DATA, PADDED, 1), "more padding"),
    "padding that is all and more": (_opened + frame(DATA, PADDED, 1, b"\x03ab"), "more padding"),
    "padding of headers": (frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff\x88"), "more padding"),
    "headers interrupted": (frame(HEADERS, 0, 1) + frame(PING, 0, 0, bytes(8)), "interrupted"),
    "headers in headers": (frame(HEADERS, 0, 1) + _opened, "interrupted"),
    "headers continued that are complete": (_opened + frame(CONTINUATION, 0, 1), "interrupted"),
    "headers cut off": (frame(HEADERS, END_HEADERS, 1, b"\x40\x05abc"), "cannot be read"),
    "headers by no number": (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\x7f"), "cannot be read"),
    "headers by an endless number": (
        frame(HEADERS, END_HEADERS, 1, b"\xff" * 20),
        "cannot be read",
    ),
    "headers in no Huffman": (
        frame(HEADERS, END_HEADERS, 1, b"\x40\x84\xff\xff\xff\xff\x00"),
        "cannot be read",
    ),
    "headers in no UTF-8": (frame(HEADERS, END_HEADERS, 1, b"\x00\x01\xff\x01\xfe"), "cannot be"),
    "headers that grow": (frame(HEADERS, END_HEADERS, 1, bomb()), "cannot be read"),
    "headers without end": (
        frame(HEADERS, 0, 1, bytes(FRAME)) + frame(CONTINUATION, 0, 1, bytes(FRAME)) * 4,
        "larger than 64 KiB",
    ),
}


class TestWhatIsWrong:
    @pytest.mark.parametrize("wrong", WRONG)
    @pytest.mark.parametrize("pieces", [1, 2**20])
    def test_ends_the_call(self, wrong, pieces):
        data, why = WRONG[wrong]
        call = begun()
        call.send([BYTES])
        if pieces == 1 and len(data) > 1000:
            pieces = 999
        for at in range(0, len(data), pieces):
            call.received(data[at : at + pieces])
        assert call.status is not None
        assert call.status.code is UNAVAILABLE
        assert call.status.details.startswith("what answers does not speak gRPC: ")
        assert why in call.status.details
        assert call.status.details.isprintable()
        silent(call)

    @pytest.mark.parametrize("size", [0, 1, FRAME - 1, 2**24, 2**32 - 1])
    def test_a_frame_size_that_is_none(self, size):
        """Nothing may be sent then that has a larger size than frames can have."""
        call = begun()
        call.received(
            window(0, LARGEST_WINDOW - WINDOW)
            + window(1, LARGEST_WINDOW - WINDOW)
            + setting(SettingCodes.MAX_FRAME_SIZE, size)
        )
        call.send([memoryview(bytes(2**24 + 1))])
        if call.status is None:
            sizes = [len(payload) for *_, payload in frames(taken(call))]
            assert max(sizes) < 2**24
            assert sum(sizes) == 5 + 2**24 + 1
        else:
            assert call.status.code is UNAVAILABLE

    @settings(max_examples=100)
    @given(st.lists(st.binary(max_size=200), max_size=5))
    def test_anything(self, pieces):
        """Random bytes never raise."""
        survives(pieces)

    _payloads = st.one_of(
        st.binary(max_size=40),
        st.binary(min_size=4, max_size=4),
        st.binary(min_size=8, max_size=8),
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2**32 - 1)), max_size=3).map(
            lambda pairs: b"".join(struct.pack(">HL", *pair) for pair in pairs)
        ),
        st.binary(max_size=20).map(message),
        st.lists(
            st.tuples(
                st.sampled_from([":status", "grpc-status", "grpc-message", "x"]),
                st.sampled_from(["200", "0", "2", "502", "%"]) | st.text(max_size=5),
            ),
            max_size=4,
        ).map(
            lambda pairs: Encoder().encode([(k, v.encode("utf-8", "replace")) for k, v in pairs])
        ),
    )
    _frames = st.builds(
        frame,
        st.integers(0, 10),
        st.sampled_from([0, 1, 4, 5]) | st.integers(0, 255),
        st.sampled_from([0, 0, 1, 1, 1, 2, 3, 2**31, 2**32 - 1]),
        _payloads,
    )

    @settings(max_examples=150)
    @given(st.lists(_frames, max_size=12))
    def test_anything_in_frames(self, pieces):
        """Nor do frames of any kind, in any order."""
        survives(pieces)

    @settings(max_examples=100)
    @given(st.binary(max_size=60))
    def test_any_header_block(self, block):
        survives([frame(HEADERS, END_HEADERS | END_STREAM, 1, block)])


def survives(pieces) -> None:
    """Check that a call in the midst of a message takes these bytes, or ends by them."""
    call = begun()
    call.send([BYTES])
    for data in pieces:
        call.received(data)
    if call.status is None:
        for _, _, stream, payload in frames(taken(call)):
            assert stream in (0, 1)
            assert len(payload) < 2**24
    else:
        silent(call)


def silent(call: Call) -> None:
    """Check that a call which has ended neither sends nor takes anything."""
    status, answers = call.status, list(call.answers)
    assert not call.out
    call.send([b"more"])
    call.finish()
    call.received(frame(PING, 0, 0, bytes(8)) + window(0, 10) + window(1, 10))
    call.received(_opened + frame(DATA, 0, 1, message(b"late")))
    call.received(headers(*OK))
    call.lost("later")
    call.end(grpc.StatusCode.OK, "")
    assert not call.out
    assert call.status == status
    assert list(call.answers) == answers


class TestTheEnd:
    def test_nothing_is_sent_after_a_good_one(self):
        call = begun()
        call.send([BYTES])
        call.received(headers(*RESPONSE, *OK))
        assert call.status == Status(grpc.StatusCode.OK, "")
        silent(call)

    def test_nothing_is_sent_after_ours(self):
        call = begun()
        call.send([BYTES])
        call.end(grpc.StatusCode.CANCELLED, "enough")
        assert call.status == Status(grpc.StatusCode.CANCELLED, "enough")
        silent(call)

    def test_nothing_is_sent_after_a_loss(self):
        call = begun()
        call.send([BYTES])
        call.lost("it is gone")
        assert call.status == Status(UNAVAILABLE, "the connection was lost: it is gone")
        silent(call)

    def test_what_comes_along_with_the_end_gets_no_answer(self):
        """A ping before the trailers, in the same bytes."""
        call = begun()
        call.received(frame(PING, 0, 0, bytes(8)) + headers(*RESPONSE, *OK) + frame(SETTINGS))
        silent(call)
