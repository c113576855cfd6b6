"""Calls both ways over unix sockets: against gRPC's own server, and against ones that misbehave."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import random
import resource
import socket
import struct
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import h2.events
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from h2.settings import SettingCodes

from serpentine import errors
from serpentine.containerd import Endpoint, duplex
from serpentine.containerd.channel import Channel
from serpentine.containerd.duplex import SocketDuplex
from serpentine.errors import ContainerdError, Unavailable
from tests.support.http2 import frame as message
from tests.support.http2 import server_side

pytestmark = pytest.mark.timeout(15)

METHOD = "/a.B/C"
WINDOW = 65535
BYTES = random.Random(1).randbytes(3_000_000)  # more than the system's buffers hold
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "s")


@pytest.fixture
async def channel(path):
    channel = Channel(Endpoint(f"unix://{path}"), "n")
    yield channel
    await channel.close()


def opened() -> set[tuple[str, str]]:
    """Return the descriptors of this process, and what each is of."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the directory itself
            found.add((descriptor.name, str(descriptor.readlink())))
    return found


@pytest.fixture
async def descriptors():
    """None is left over.  Others may have gone: those of gRPC's that earlier tests made."""
    before = opened()
    yield
    assert opened() <= before


async def started(work) -> asyncio.Task:
    """Let a task run until it waits."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def cancelled(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def answer(value: bytes) -> bytes:
    return message(BytesValue(value=value).SerializeToString())


# --- against gRPC's own server --------------------------------------------------------------------


class Served(grpc.GenericRpcHandler):
    """A gRPC server that answers each message with its digest, until one says otherwise."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.ended = asyncio.Event()
        self.server = grpc.aio.server(
            handlers=[self], options=[("grpc.max_receive_message_length", 16 * 2**20)]
        )

    def service(self, details):
        if details.method != METHOD:
            return None

        async def behaviour(requests, context):
            self.seen.append((details.method, dict(context.invocation_metadata())))
            try:
                async for request in requests:
                    if request.startswith(b"abort "):
                        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, request.decode())
                    if request == b"return":
                        return
                    if request == b"metadata":
                        context.set_trailing_metadata([("x", "X" * 6000), ("y", "Y" * 1000)])
                    yield BytesValue(value=hashlib.sha256(request).digest()).SerializeToString()
            finally:
                self.ended.set()

        return grpc.stream_stream_rpc_method_handler(behaviour)


@pytest.fixture
async def served(path):
    served = Served()
    served.server.add_insecure_port(f"unix:{path}")
    await served.server.start()
    yield served
    await served.server.stop(None)


async def digest(call, data: bytes) -> None:
    """Check that the next answer is of this message."""
    assert await call.receive() == BytesValue(value=hashlib.sha256(data).digest())


class TestGrpc:
    async def test_messages_and_answers(self, served, channel):
        async with channel.duplex(METHOD, BytesValue) as call:
            assert isinstance(call, SocketDuplex)
            for size in (0, 1, 100, 16379, 16384, WINDOW, 200_000, 3_000_000, 7):
                third = size // 3
                await call.send([BYTES[:third], memoryview(BYTES)[third:size]])
                await digest(call, BYTES[:size])
            assert call.is_open
            await call.finish()
            assert await call.receive() is None
            assert await call.receive() is None
            assert not call.is_open

    async def test_many_messages_before_the_answers(self, served, channel):
        async with channel.duplex(METHOD, BytesValue) as call:
            for n in range(20):
                await call.send([BYTES[n : n + 100_000]])
            await call.finish()
            for n in range(20):
                await digest(call, BYTES[n : n + 100_000])
            assert await call.receive() is None

    async def test_many_calls_at_once(self, served, channel):
        async def one(n):
            async with channel.duplex(METHOD, BytesValue) as call:
                for size in (n, 200_000 + n):
                    await call.send([BYTES[n : n + size]])
                    await digest(call, BYTES[n : n + size])
                await call.finish()
                assert await call.receive() is None

        async with asyncio.TaskGroup() as group:
            for n in range(12):
                group.create_task(one(n))
        assert len(served.seen) == 12

    async def test_what_is_sent_along(self, served, path):
        endpoint = Endpoint(f"unix://{path}", metadata=(("authorization", "t" * 7000),))
        async with Channel(endpoint, "n").duplex(METHOD, BytesValue, lease="l") as call:
            await call.finish()
            assert await call.receive() is None
        [(method, metadata)] = served.seen
        assert method == METHOD
        assert metadata["containerd-namespace"] == "n"
        assert metadata["containerd-lease"] == "l"
        assert metadata["authorization"] == "t" * 7000

    async def test_no_token_is_logged(self, served, path, caplog):
        caplog.set_level(logging.DEBUG)
        secret = "s3cr3t-" + "t" * 130
        endpoint = Endpoint(f"unix://{path}", metadata=(("authorization", secret),))
        async with Channel(endpoint, "n").duplex(METHOD, BytesValue) as call:
            await call.finish()
            assert await call.receive() is None
        assert served.seen[0][1]["authorization"] == secret
        assert "s3cr3t" not in caplog.text
        assert secret.encode().hex() not in caplog.text

    async def test_large_trailers(self, served, channel):
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"metadata"])
            await digest(call, b"metadata")
            await call.finish()
            assert await call.receive() is None

    async def test_an_error(self, served, channel):
        """With words that must be written differently on the way."""
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"a"])
            await call.send(["abort 100% näh: €".encode()])
            await digest(call, b"a")
            with pytest.raises(errors.ResourceExhausted, match="containerd: abort 100% näh: €"):
                await call.receive()
            with pytest.raises(errors.ResourceExhausted):
                await call.send([b"a"])
            assert isinstance(await call.error(), errors.ResourceExhausted)

    async def test_an_error_while_we_send(self, served, channel):
        """More than the server takes: it tells of the error all the same."""
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"abort it"])
            with pytest.raises(errors.ResourceExhausted, match="containerd: abort it"):
                while True:
                    await call.send([BYTES])

    async def test_a_good_end_that_comes_too_soon(self, served, channel):
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"return"])
            with pytest.raises(Unavailable, match="ended a write before it was complete"):
                while True:
                    await call.send([BYTES])

    async def test_leaving_ends_the_call(self, served, channel):
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"a"])
            await digest(call, b"a")
            assert not served.ended.is_set()
        await served.ended.wait()

    async def test_a_server_about_to_stop(self, served, channel):
        """It refuses new calls, and lets ours come to its end."""
        async with channel.duplex(METHOD, BytesValue) as call:
            await call.send([b"a"])
            await digest(call, b"a")
            stopping = await started(served.server.stop(30))
            await call.send([BYTES])
            await digest(call, BYTES)
            await call.finish()
            assert await call.receive() is None
        await stopping

    async def test_a_method_that_is_not_there(self, served, channel):
        async with channel.duplex("/a.B/D", BytesValue) as call:
            with pytest.raises(errors.Unimplemented):
                await call.receive()


# --- against a server that does what a test says --------------------------------------------------


class Peer:
    """The server's end of one connection, by h2; it reads only when it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.h2 = server_side()
        self.data = bytearray()
        self.events: list[h2.events.Event] = []

    def count(self, kind: type[h2.events.Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    async def flush(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, self.h2.data_to_send())

    async def read_until(self, condition) -> None:
        while not condition():
            data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
            assert data, "the other end has closed the connection"
            for event in self.h2.receive_data(data):
                self.events.append(event)
                if isinstance(event, h2.events.DataReceived):
                    self.data += event.data
            await self.flush()

    async def read_data(self, size: int) -> None:
        """Read until so many bytes of messages have come, and no more."""
        await self.read_until(lambda: len(self.data) >= size)
        assert len(self.data) == size

    async def read_end(self) -> None:
        """Read until our stream has been finished."""
        await self.read_until(lambda: self.count(h2.events.StreamEnded))

    async def greet(self, changes: dict[SettingCodes, int]) -> None:
        """Exchange the settings, and see the request."""
        self.h2.update_settings(changes)
        await self.flush()
        awaited = (h2.events.SettingsAcknowledged, h2.events.RequestReceived)
        await self.read_until(lambda: all(self.count(kind) for kind in awaited))

    async def ping(self) -> None:
        """Let the other end take what was sent to it, and do what it does then."""
        before = self.count(h2.events.PingAckReceived)
        self.h2.ping(bytes(8))
        await self.flush()
        await self.read_until(lambda: self.count(h2.events.PingAckReceived) > before)

    async def open(self, more: int) -> None:
        self.h2.increment_flow_control_window(more)
        self.h2.increment_flow_control_window(more, 1)
        await self.flush()

    async def answer(self, *values: bytes, first: bool = True) -> None:
        if first:
            self.h2.send_headers(1, RESPONSE)
        for value in values:
            data = answer(value)
            for at in range(0, len(data), 16384):
                self.h2.send_data(1, data[at : at + 16384])
        await self.flush()

    async def end(self, number: int = 0, details: str = "", *, answered: bool = False) -> None:
        status = [("grpc-status", str(number)), ("grpc-message", details)]
        self.h2.send_headers(1, status if answered else RESPONSE + status, end_stream=True)
        await self.flush()

    async def eof(self) -> None:
        """Wait until the other end has closed the connection."""
        with suppress(ConnectionResetError):  # it had not read all that we sent
            while await asyncio.get_running_loop().sock_recv(self.socket, 2**20):
                pass

    def close(self) -> None:
        self.socket.close()


@contextmanager
def listening(path: str, backlog: int = 8):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(backlog)
        listener.setblocking(False)
        yield listener


@asynccontextmanager
async def accepted(listener: socket.socket, changes: dict[SettingCodes, int] | None = None):
    """The server's end of the next connection, once both have greeted."""
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    with connection:
        peer = Peer(connection)
        await peer.greet(changes or {})
        yield peer


@asynccontextmanager
async def connected(channel: Channel, changes: dict[SettingCodes, int] | None = None):
    """A call of ours, and the server's end of its connection."""
    with listening(channel.endpoint.socket_path) as listener:
        async with (
            channel.duplex(METHOD, BytesValue) as call,
            accepted(listener, changes) as peer,
        ):
            yield call, peer


async def stuck(how: str, call, peer: Peer) -> asyncio.Task:
    """Return a task that sends and cannot go on.

    What it waits for is the window, or the system: the server has opened the window wide then and
    does not read.
    """
    if how == "system":
        await peer.open(2**28)
        await peer.ping()
        return await started(call.send([BYTES]))
    task = await started(call.send([BYTES]))
    await peer.read_data(WINDOW)
    await peer.ping()
    assert not task.done()
    return task


@asynccontextmanager
async def sending(channel: Channel, how: str):
    """A call of ours, the server's end, and a task that is stuck in sending."""
    async with connected(channel) as (call, peer):
        yield call, peer, await stuck(how, call, peer)


both = pytest.mark.parametrize("how", ["window", "system"])


@pytest.mark.usefixtures("descriptors")
class TestSend:
    async def test_waits_for_the_window(self, channel):
        async with sending(channel, "window") as (call, peer, task):
            await peer.open(1000)
            await peer.ping()
            assert len(peer.data) == WINDOW + 1000
            assert not task.done()
            await peer.open(2**24)
            await peer.read_data(5 + len(BYTES))
            await task
            assert peer.data == message(BYTES)
            assert call.is_open

    async def test_waits_for_the_window_only(self, channel):
        """The system takes the rest at once."""
        async with connected(channel) as (call, peer):
            data = BYTES[: WINDOW + 1000]
            task = await started(call.send([data]))
            await peer.read_data(WINDOW)
            await peer.open(2000)
            await task
            await peer.read_data(5 + len(data))
            assert peer.data == message(data)

    async def test_waits_for_the_system(self, channel):
        """And takes up where it left off, in the midst of a part."""
        async with sending(channel, "system") as (call, peer, task):
            await peer.read_data(5 + len(BYTES))
            await task
            assert peer.data == message(BYTES)
            assert call.is_open

    async def test_many_parts(self, channel):
        """More than one system call takes."""
        async with connected(channel) as (call, peer):
            parts = [BYTES[n : n + 1 + n % 3] for n in range(5000)]
            await call.send(parts)
            await peer.read_data(5 + sum(map(len, parts)))
            assert peer.data == message(b"".join(parts))

    @both
    async def test_answers_come_meanwhile(self, channel, how):
        """More than fits into the system's buffers: neither side waits for the other."""
        values = [BYTES[n : n + 300_000] for n in range(5)]
        async with sending(channel, how) as (call, peer, task):
            await peer.answer(*values)
            assert not task.done()
            await peer.open(2**24)
            await peer.read_data(5 + len(BYTES))
            await task
            for value in values:
                assert await call.receive() == BytesValue(value=value)
            assert peer.data == message(BYTES)

    @both
    async def test_a_cancelled_one_is_sent_all_the_same(self, channel, how):
        """Half a message would be the end of the stream; the next ones follow it."""
        async with sending(channel, how) as (call, peer, task):
            await cancelled(task)
            assert call.is_open
            await cancelled(await started(call.send([BYTES[:100_000]])))
            task = await started(call.send([b"last"]))
            await peer.open(2**24)
            expected = message(BYTES) + message(BYTES[:100_000]) + message(b"last")
            await peer.read_data(len(expected))
            await task
            assert peer.data == expected
            await call.finish()
            await peer.read_end()
            await peer.answer(b"good")
            await peer.end(answered=True)
            assert await call.receive() == BytesValue(value=b"good")
            assert await call.receive() is None

    @both
    async def test_finish_comes_after_what_was_cancelled(self, channel, how):
        async with sending(channel, how) as (call, peer, task):
            await cancelled(task)
            task = await started(call.finish())
            await peer.open(2**24)
            await peer.read_end()
            await task
            assert peer.data == message(BYTES)

    @both
    async def test_a_finish_that_was_cancelled_may_be_called_again(self, channel, how):
        async with sending(channel, how) as (call, peer, task):
            await cancelled(task)
            await cancelled(await started(call.finish()))
            task = await started(call.finish())
            await peer.open(2**24)
            await peer.read_end()
            await task
            await call.finish()
            await peer.ping()
            assert peer.count(h2.events.StreamEnded) == 1
            assert peer.data == message(BYTES)


@pytest.mark.usefixtures("descriptors")
class TestReceive:
    async def test_waits(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.receive())
            await peer.ping()
            assert not task.done()
            await peer.answer(b"a")
            assert await task == BytesValue(value=b"a")
            task = await started(call.receive())
            await peer.end(answered=True)
            assert await task is None
            assert not call.is_open

    async def test_a_cancelled_one_loses_no_answer(self, channel):
        async with connected(channel) as (call, peer):
            await cancelled(await started(call.receive()))
            await peer.answer(b"a")
            await peer.ping()
            await cancelled(asyncio.create_task(call.receive()))
            assert await call.receive() == BytesValue(value=b"a")

    async def test_what_came_before_an_error(self, channel):
        async with connected(channel) as (call, peer):
            await peer.answer(b"a", b"b" * 100_000)
            await peer.end(6, "it is there", answered=True)
            peer.close()
            assert await call.receive() == BytesValue(value=b"a")
            assert await call.receive() == BytesValue(value=b"b" * 100_000)
            for _ in range(2):
                with pytest.raises(errors.AlreadyExists, match="it is there"):
                    await call.receive()

    async def test_why_it_ended(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.error())
            await peer.answer(b"a")
            await peer.ping()
            assert not task.done()
            await peer.end(5, "gone", answered=True)
            assert isinstance(await task, errors.NotFound)

    async def test_while_it_is_cancelled(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.receive())
            call.cancel()
            with pytest.raises(Unavailable, match="the call was ended"):
                await task
            await peer.eof()


@pytest.mark.usefixtures("descriptors")
class TestTheServerEndsIt:
    @both
    async def test_in_the_midst_of_a_message(self, channel, how):
        async with sending(channel, how) as (call, peer, task):
            peer.close()
            with pytest.raises(Unavailable, match="containerd: the connection was lost: ") as error:
                await task
            assert str(error.value).isprintable()
            assert error.value.hint
            for again in (call.send([b"a"]), call.receive()):
                with pytest.raises(Unavailable, match="the connection was lost"):
                    await again
            await call.finish()
            assert not call.is_open

    async def test_while_an_answer_is_awaited(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.receive())
            peer.close()
            with pytest.raises(Unavailable, match="the connection was lost: containerd closed it"):
                await task

    async def test_in_the_midst_of_an_answer(self, channel):
        async with connected(channel) as (call, peer):
            await peer.answer(b"a")
            peer.h2.send_data(1, answer(b"b" * 100)[:50])
            peer.socket.sendall(peer.h2.data_to_send()[:-10])
            peer.close()
            assert await call.receive() == BytesValue(value=b"a")
            with pytest.raises(Unavailable, match="the connection was lost"):
                await call.receive()

    async def test_before_we_send(self, channel):
        """Nobody has read yet that it is gone."""
        async with connected(channel) as (call, peer):
            peer.close()
            with pytest.raises(Unavailable, match="the connection was lost"):
                await call.send([BYTES])

    async def test_before_we_send_little(self, channel):
        """It is told with the answer, at the latest."""
        async with connected(channel) as (call, peer):
            peer.close()
            with suppress(Unavailable):
                await call.send([b"a"])
            with pytest.raises(Unavailable, match="the connection was lost"):
                await call.receive()

    async def test_one_way_only(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.receive())
            peer.socket.shutdown(socket.SHUT_WR)
            with pytest.raises(Unavailable, match="the connection was lost"):
                await task
            await peer.eof()

    @both
    @pytest.mark.parametrize(
        ("number", "details", "kind"),
        [
            (8, "too much", errors.ResourceExhausted),
            (2, "write /var/x: no space left on device", errors.NoSpace),
            (9, "unexpected digest", errors.FailedPrecondition),
            (14, "ref r locked for 2s", errors.Locked),
            (2, "", ContainerdError),
        ],
    )
    async def test_with_a_status_while_we_send(self, channel, how, number, details, kind):
        """The connection is lost in the same moment, which is not what went wrong."""
        async with sending(channel, how) as (call, peer, task):
            await peer.end(number, details)
            peer.close()
            with pytest.raises(ContainerdError, match=details or "unknown") as error:
                await task
            assert type(error.value) is kind
            for again in (call.send([b"a"]), call.receive()):
                with pytest.raises(ContainerdError) as error:
                    await again
                assert type(error.value) is kind

    @both
    async def test_with_a_status_behind_answers(self, channel, how):
        """More than we read at once, so that sending fails before the status has been read."""
        async with sending(channel, how) as (call, peer, task):
            await peer.answer(b"a" * 50_000)
            await peer.end(2, "no space left on device", answered=True)
            peer.close()
            if how == "window":
                with pytest.raises(errors.NoSpace):
                    await task
            else:
                await task  # there was nothing to wait for any more
            assert await call.receive() == BytesValue(value=b"a" * 50_000)
            with pytest.raises(errors.NoSpace):
                await call.receive()

    @pytest.mark.parametrize("size", [0, WINDOW - 5, len(BYTES)])
    async def test_with_a_status_before_we_send(self, channel, size):
        """Nobody has read it yet, and sending fails."""
        async with connected(channel) as (call, peer):
            await peer.answer(b"a" * 50_000)
            await peer.end(2, "no space left on device", answered=True)
            peer.close()
            with pytest.raises(errors.NoSpace):
                await call.send([BYTES[:size]])
                assert await call.receive() == BytesValue(value=b"a" * 50_000)
                await call.receive()

    @both
    async def test_as_a_success_before_it_has_all(self, channel, how):
        async with sending(channel, how) as (call, peer, task):
            await peer.end()
            peer.close()
            with pytest.raises(Unavailable, match="ended a write before it was complete"):
                await task
            with pytest.raises(Unavailable, match="ended a write before it was complete"):
                await call.send([b"a"])
            assert isinstance(await call.error(), Unavailable)

    async def test_by_what_is_no_grpc(self, channel):
        with listening(channel.endpoint.socket_path) as listener:
            async with channel.duplex(METHOD, BytesValue) as call:
                task = await started(call.receive())
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    with pytest.raises(Unavailable, match="does not speak gRPC"):
                        await task
                    await Peer(connection).eof()

    @both
    async def test_by_the_system(self, channel, how, monkeypatch):
        """What it cannot send is lost, with the connection; it says no more than that."""

        def no_memory(*_):
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

        async with sending(channel, how) as (call, peer, task):
            monkeypatch.setattr(call, "_socket", Failing(call._socket, no_memory))
            if how == "window":
                await peer.open(2**24)
            else:
                while await asyncio.get_running_loop().sock_recv(peer.socket, 65536):
                    pass
            with pytest.raises(Unavailable, match="connection was lost: No buffer space"):
                await task
            with pytest.raises(Unavailable, match="connection was lost: No buffer space"):
                await call.receive()

    async def test_by_a_mistake_of_ours(self, channel, monkeypatch):
        """In what the loop calls: it would log it, and who waits would wait for ever."""
        loop = asyncio.get_running_loop()
        told: list[dict] = []
        monkeypatch.setattr(loop, "call_exception_handler", told.append)
        async with connected(channel) as (call, peer):
            task = await started(call.receive())

            def mistaken(_):
                raise ZeroDivisionError

            monkeypatch.setattr(call._call, "received", mistaken)
            await peer.answer(b"a")
            with pytest.raises(ContainerdError, match=r"could not be served \(ZeroDivisionError"):
                await task
            assert not call.is_open
        assert [type(each["exception"]) for each in told] == [ZeroDivisionError]

    async def test_by_a_mistake_of_ours_in_sending(self, channel, monkeypatch):
        loop = asyncio.get_running_loop()
        told: list[dict] = []
        monkeypatch.setattr(loop, "call_exception_handler", told.append)

        def mistaken(_):
            raise ZeroDivisionError

        async with sending(channel, "system") as (call, peer, task):
            monkeypatch.setattr(call, "_socket", Failing(call._socket, mistaken))
            while await loop.sock_recv(peer.socket, 65536):
                pass
            with pytest.raises(ContainerdError, match=r"could not be served \(ZeroDivisionError"):
                await task
            assert not call.is_open
        assert [type(each["exception"]) for each in told] == [ZeroDivisionError]

    async def test_with_a_word_of_farewell(self, channel):
        async with connected(channel) as (call, peer):
            last = struct.pack(">LL", 2**31 - 1, 11) + b"too_many_pings"
            peer.socket.sendall(bytes([0, 0, len(last), 7, 0, 0, 0, 0, 0]) + last)
            peer.close()
            with pytest.raises(Unavailable, match="closed it, saying 'too_many_pings'"):
                await call.receive()

    @both
    async def test_the_connection_ends_with_the_call(self, channel, how):
        """Also while the context stands, so that what containerd holds for it is free."""
        async with sending(channel, how) as (_, peer, task):
            await peer.end(8, "too much")
            with pytest.raises(errors.ResourceExhausted):
                await task
            await peer.eof()


class Failing:
    """A socket that fails to send."""

    def __init__(self, real: socket.socket, sendmsg) -> None:
        self._real = real
        self.sendmsg = sendmsg

    def __getattr__(self, name: str):
        return getattr(self._real, name)


async def receive(channel: Channel) -> BytesValue | None:
    """Make a call and return its first answer."""
    async with channel.duplex(METHOD, BytesValue) as call:
        return await call.receive()


@pytest.mark.usefixtures("descriptors")
class TestConnect:
    @pytest.fixture
    def full(self, path):
        """A socket that takes no more connections before a first one is accepted."""
        with (
            listening(path, 0) as listener,
            socket.socket(socket.AF_UNIX) as first,
            socket.socket(socket.AF_UNIX) as second,
        ):
            first.connect(path)
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.connect(path)
            yield listener

    async def refused(self, channel, why):
        with pytest.raises(Unavailable) as error:
            await receive(channel)
        path = channel.endpoint.socket_path
        assert str(error.value) == f"containerd: cannot connect to {path}: {why}"
        assert error.value.hint

    async def test_no_socket(self, channel):
        await self.refused(channel, "no such file or directory")

    async def test_nobody_listens(self, channel, path):
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(path)
        await self.refused(channel, "connection refused")

    async def test_a_path_that_is_too_long(self, path):
        channel = Channel(Endpoint(f"unix://{path * 20}"), "n")
        await self.refused(channel, "af_unix path too long")

    async def test_a_server_that_is_busy(self, channel, full):
        task = await started(receive(channel))
        (await asyncio.get_running_loop().sock_accept(full))[0].close()
        async with accepted(full) as peer:
            await peer.answer(b"a")
            assert await task == BytesValue(value=b"a")

    async def test_a_server_that_stays_busy(self, channel, full, monkeypatch):
        monkeypatch.setattr(duplex, "_CONNECT_TIMEOUT", 0.0)
        await self.refused(channel, "it takes no connections")

    async def test_a_server_that_goes_away_meanwhile(self, channel, full):
        task = await started(receive(channel))
        full.close()
        with pytest.raises(Unavailable, match="connection refused"):
            await task

    async def test_no_more_files(self, channel):
        """Which looking after containerd would not help."""
        free = os.dup(0)
        os.close(free)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(errors.ResourceExhausted, match="too many open files") as error:
                await receive(channel)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "ulimit -n" in error.value.hint

    async def test_cancelled(self, channel, full):
        before = opened()
        task = await started(receive(channel))
        assert opened() > before
        await cancelled(task)
        assert opened() == before

    async def test_a_channel_that_is_closed_meanwhile(self, channel, full):
        """A call must not outlive it, whether or not the server takes the connection then."""
        task = await started(receive(channel))
        await channel.close()
        loop = asyncio.get_running_loop()
        loop.add_reader(full, lambda: full.accept()[0].close())
        with pytest.raises(Unavailable, match="was closed"):
            await task
        loop.remove_reader(full)


@pytest.mark.usefixtures("descriptors")
class TestClose:
    async def test_while_an_answer_is_awaited(self, channel):
        async with connected(channel) as (call, peer):
            task = await started(call.receive())
            await channel.close()
            with pytest.raises(Unavailable, match=r"the connection to containerd at .* was closed"):
                await task
            await peer.eof()
            assert not call.is_open

    @both
    async def test_while_we_send(self, channel, how):
        async with sending(channel, how) as (call, peer, task):
            await channel.close()
            for again in (task, call.send([b"a"]), call.receive()):
                with pytest.raises(Unavailable, match="was closed"):
                    await again
            await peer.eof()

    async def test_all_calls(self, channel):
        with listening(channel.endpoint.socket_path) as listener:
            tasks = [await started(receive(channel)) for _ in range(3)]
            async with accepted(listener) as one, accepted(listener) as another:
                await channel.close()
                for task in tasks:
                    with pytest.raises(Unavailable, match="was closed"):
                        await task
                await one.eof()
                await another.eof()

    async def test_no_call_begins_after_it(self, channel):
        with listening(channel.endpoint.socket_path):
            await channel.close()
            with pytest.raises(Unavailable, match="was closed"):
                await receive(channel)

    async def test_a_call_that_has_ended_before(self, channel):
        """How it ended stays as it was."""
        async with connected(channel) as (call, peer):
            await peer.answer(b"a")
            await peer.end(answered=True)
            assert await call.receive() == BytesValue(value=b"a")
            assert await call.receive() is None
            await channel.close()
            assert await call.receive() is None


class StopError(Exception):
    """What a caller may raise."""


@pytest.mark.usefixtures("descriptors")
class TestLeaving:
    """Ends the connection: containerd lets go then of what it held for the call."""

    @asynccontextmanager
    async def using(self, channel, use):
        """A task that uses a call, and the server's end of it, which must see its end."""

        async def work():
            async with channel.duplex(METHOD, BytesValue) as call:
                calls.append(call)
                await use(call)

        calls = []
        with listening(channel.endpoint.socket_path) as listener:
            task = asyncio.create_task(work())
            async with accepted(listener) as peer:
                [call] = calls
                yield task, call, peer
                await peer.eof()
                assert not call.is_open

    async def test_after_a_good_end(self, channel):
        async def use(call):
            await call.finish()
            assert await call.receive() is None

        async with self.using(channel, use) as (task, _, peer):
            await peer.read_end()
            await peer.end()
            await task

    async def test_before_the_end(self, channel):
        async def use(call):
            await call.receive()

        async with self.using(channel, use) as (task, call, peer):
            await peer.answer(b"a")
            await task
            with pytest.raises(Unavailable, match="the call was ended"):
                await call.send([b"a"])

    async def test_by_an_error(self, channel):
        async def use(call):
            await call.receive()
            raise StopError

        async with self.using(channel, use) as (task, _, peer):
            await peer.answer(b"a")
            with pytest.raises(StopError):
                await task

    async def test_by_an_error_of_the_server(self, channel):
        async def use(call):
            await call.receive()

        async with self.using(channel, use) as (task, _, peer):
            await peer.end(5, "gone")
            with pytest.raises(errors.NotFound):
                await task

    async def test_by_a_cancellation(self, channel):
        async def use(call):
            await call.receive()

        async with self.using(channel, use) as (task, *_):
            await cancelled(task)

    @both
    async def test_while_something_is_unsent(self, channel, how):
        """Nobody sends it any more, and nothing holds it."""
        go = asyncio.Event()

        async def use(call):
            await go.wait()

        async with self.using(channel, use) as (task, call, peer):
            await cancelled(await stuck(how, call, peer))
            go.set()
            await task
