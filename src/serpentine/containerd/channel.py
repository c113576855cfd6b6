"""The connection: a gRPC channel, and calls by method path that carry namespace and lease."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from serpentine.containerd._errors import translate, why_ended
from serpentine.containerd._http2 import Buffer
from serpentine.containerd.duplex import Duplex, SocketDuplex, has_sockets
from serpentine.containerd.endpoint import Endpoint
from serpentine.errors import ContainerdError, DaemonPermission, DaemonUnreachable, Unavailable

__all__ = ["UNARY_TIMEOUT", "Channel", "unreachable"]

# Every call but those that work on data answers in milliseconds; a minute means stuck.
UNARY_TIMEOUT = 60.0

_MAX_MESSAGE = 16 * 1024 * 1024

_OPTIONS: Sequence[tuple[str, Any]] = (
    # Python's own limit is 4 MiB; containerd sends lists that are longer (trap 12).
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # A local socket is there or not: no use in waiting a second before the next look.  Leave
    # min_reconnect_backoff_ms alone: it is the time limit of each attempt to connect, and a
    # small one cuts off a daemon that is busy or far away.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # HTTP_PROXY would capture even loopback (trap 57).
    ("grpc.enable_http_proxy", 0),
    # Two clients of one process must not share a connection: closing one would wait for the
    # other's streams, and a broken one would break both.
    ("grpc.use_local_subchannel_pool", 1),
)
# The percent-encoded path that grpcio would send is refused by strict servers (trap 57).
_UNIX_OPTIONS: Sequence[tuple[str, Any]] = (("grpc.default_authority", "localhost"),)
# Apply and Write have no time limit: without a sign of life they would wait for ever for a
# machine that is gone.  Go's gRPC ends a connection that asks more often than every 5 minutes.
_TCP_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.keepalive_time_ms", 6 * 60 * 1000),
    ("grpc.keepalive_timeout_ms", 20 * 1000),
    ("grpc.http2.max_pings_without_data", 0),
)


_M = TypeVar("_M", bound=Message)


class Channel:
    """A lazily made gRPC channel to an endpoint, for one namespace."""

    def __init__(self, endpoint: Endpoint, namespace: str) -> None:
        self.endpoint = endpoint
        self.namespace = namespace
        self._channel: grpc.aio.Channel | None = None
        self._duplexes: set[SocketDuplex[Any]] = set()
        self._closed = False

    def open(self) -> grpc.aio.Channel:
        """Return the gRPC channel; it connects by itself when first used.

        Raises Unavailable once it was closed.
        """
        if self._closed:
            raise self._closed_error()
        if self._channel is None:
            address = self.endpoint.address
            options = [*_OPTIONS, *(_UNIX_OPTIONS if self.endpoint.socket_path else _TCP_OPTIONS)]
            if self.endpoint.server_name is not None:
                options.append(("grpc.ssl_target_name_override", self.endpoint.server_name))
            if self.endpoint.root_certificates is not None:
                credentials = grpc.ssl_channel_credentials(self.endpoint.root_certificates)
                self._channel = grpc.aio.secure_channel(address, credentials, options=options)
            else:
                self._channel = grpc.aio.insecure_channel(address, options=options)
        return self._channel

    async def close(self) -> None:
        """Close the connection for good; calls under way raise Unavailable."""
        channel, self._channel, self._closed = self._channel, None, True
        for duplex in self._duplexes:
            duplex.fail(self._closed_error())
        if channel is not None:
            await channel.close()

    def _closed_error(self) -> Unavailable:
        return Unavailable(f"the connection to containerd at {self.endpoint} was closed")

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Tell the end of a call by ``close`` apart from a cancellation of the caller's task.

        grpcio raises CancelledError for both, and for the use of a call that was cancelled before.
        A task group takes that of a task which nobody cancelled for a quiet end, and the failure
        would be lost.
        """
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            if self._closed:
                raise self._closed_error() from None
            raise Unavailable("a call to containerd was used after it had been ended") from None

    def metadata(self, lease: str | None = None) -> tuple[tuple[str, str], ...]:
        """Return what goes with each call: the namespace always (trap 1), a lease if given."""
        held = (("containerd-lease", lease),) if lease else ()
        return (("containerd-namespace", self.namespace), *self.endpoint.metadata, *held)

    async def unary(
        self,
        method: str,
        request: Message,
        answer: type[_M],
        *,
        lease: str | None = None,
        timeout: float | None = UNARY_TIMEOUT,
    ) -> _M:
        """Call a method with one request and one answer; ``timeout`` in seconds or None."""
        call = self.open().unary_unary(
            method,
            request_serializer=_serialize,
            response_deserializer=answer.FromString,
        )
        try:
            with self._calling():
                response = await call(request, metadata=self.metadata(lease), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise translate(error.code(), error.details()) from error
        assert isinstance(response, answer)
        return response

    async def stream(
        self, method: str, request: Message, answer: type[_M], *, timeout: float | None = None
    ) -> AsyncGenerator[_M, None]:
        """Call a method with one request and many answers; ``aclose`` ends the call."""
        make = self.open().unary_stream(
            method,
            request_serializer=_serialize,
            response_deserializer=answer.FromString,
        )
        call = make(request, metadata=self.metadata(), timeout=timeout)
        try:
            with self._calling():
                async for response in call:
                    yield response
        except grpc.aio.AioRpcError as error:
            raise translate(error.code(), error.details()) from error
        finally:
            call.cancel()

    @asynccontextmanager
    async def duplex(
        self, method: str, answer: type[_M], *, lease: str | None = None
    ) -> AsyncIterator[Duplex[_M]]:
        """Open a method with many requests and many answers; leaving the context ends it."""
        path = self.endpoint.socket_path
        if path is not None and has_sockets():
            if self._closed:
                raise self._closed_error()
            own = await SocketDuplex.open(path, method, self.metadata(lease), answer)
            self._duplexes.add(own)
            try:
                if self._closed:  # while it connected
                    raise self._closed_error()
                yield own
            finally:
                self._duplexes.discard(own)
                own.cancel()
            return
        make: grpc.aio.StreamStreamMultiCallable[bytes, _M] = self.open().stream_stream(
            method,
            request_serializer=None,
            response_deserializer=answer.FromString,
        )
        call: _GrpcDuplex[_M] = _GrpcDuplex(make(metadata=self.metadata(lease)))
        try:
            with self._calling():
                yield call
        finally:
            call.cancel()

    async def wait_connected(self, timeout: float) -> None:
        """Wait until the connection stands, ``timeout`` seconds at most.

        Raises DaemonUnreachable then, or DaemonPermission where that is the reason.
        """
        try:
            async with asyncio.timeout(timeout):
                await self.open().channel_ready()
        except TimeoutError:
            self.probe_socket()
            raise unreachable(self.endpoint, "no containerd answers there") from None

    def probe_socket(self) -> None:
        """Find out, without waiting, why a unix socket does not open.

        gRPC reports every failure to connect alike; the system's own answer tells apart what
        the user must do.  Raises DaemonUnreachable or DaemonPermission; silent if it opens.
        """
        path = self.endpoint.socket_path
        family = getattr(socket, "AF_UNIX", None)  # Python has none on Windows
        if path is None or family is None:
            return
        probe = socket.socket(family, socket.SOCK_STREAM)
        try:
            probe.setblocking(False)
            probe.connect(path)
        except PermissionError:
            raise DaemonPermission(
                f"permission denied: {path}",
                address=path,
                hint="run as a user who may open containerd's socket (usually root)",
            ) from None
        except FileNotFoundError:
            raise unreachable(self.endpoint, "there is no such socket") from None
        except BlockingIOError:
            return  # the server's queue is full: it is there
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                why = "nothing listens there"
            else:
                why = os.strerror(error.errno or 0).lower()
            raise unreachable(self.endpoint, why) from None
        finally:
            probe.close()


class _GrpcDuplex(Generic[_M]):
    """A call of grpcio's, see ``Duplex``."""

    def __init__(self, call: grpc.aio.StreamStreamCall[Any, _M]) -> None:
        self._call = call

    @property
    def is_open(self) -> bool:
        return not self._call.done()

    async def send(self, parts: Sequence[Buffer]) -> None:
        try:
            await self._call.write(b"".join(parts))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            # The server has ended the call (InvalidStateError is grpcio's word for writing to
            # one): its status tells why.
            raise await self.error() from error

    async def receive(self) -> _M | None:
        try:
            answer = await self._call.read()
        except grpc.RpcError as error:
            raise await self.error() from error
        if answer is not grpc.aio.EOF:
            return answer  # type: ignore[return-value]
        if await self._call.code() is not grpc.StatusCode.OK:
            raise await self.error()
        return None

    async def finish(self) -> None:
        try:
            await self._call.done_writing()
        except grpc.RpcError as error:
            raise await self.error() from error

    async def error(self) -> ContainerdError:
        return why_ended(await self._call.code(), await self._call.details())

    def cancel(self) -> None:
        self._call.cancel()


def unreachable(endpoint: Endpoint, why: str) -> DaemonUnreachable:
    """Return the error for an endpoint that cannot be used."""
    return DaemonUnreachable(
        f"cannot reach containerd at {endpoint}: {why}",
        address=str(endpoint),
        hint="check the address, and that containerd runs",
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
