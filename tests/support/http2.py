"""HTTP/2 by hand: requests that no gRPC library would send, and a server that notes all it gets."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions

Headers = Sequence[tuple[str, str]]

TIMEOUT = 10.0


def frame(message: bytes) -> bytes:
    """Return a message the way gRPC sends it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def server_side() -> h2.connection.H2Connection:
    """Return the server's end of a connection, which has not said anything yet."""
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
    )
    connection.initiate_connection()
    # h2 changes settings with a second frame only; ours is to be the first.
    connection.clear_outbound_data_buffer()
    return connection


@dataclass
class Answer:
    """What came back; ``closed`` if the other side ended the connection before an answer."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    closed: bool = False

    def __str__(self) -> str:
        """Sum it up: the status of HTTP, then gRPC's where there is one."""
        if self.closed:
            return "closed"
        grpc = self.headers.get("grpc-status")
        return self.headers[":status"] + (f" grpc {grpc}" if grpc is not None else "")


def tls_context(
    ca: bytes, *, alpn: Sequence[str] = ("h2",), newest: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """Return a context that trusts one authority only; ``newest`` limits the version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if newest:
        context.maximum_version = newest
    return context


def ask(connection: socket.socket, headers: Headers, body: bytes) -> Answer:
    """Send one request as it is given, right or wrong, and wait for the answer."""
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding="utf-8",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    client = h2.connection.H2Connection(config)
    answer = Answer()
    try:
        client.initiate_connection()
        client.send_headers(1, list(headers))
        client.send_data(1, body, end_stream=True)
        connection.sendall(client.data_to_send())
        while data := connection.recv(65536):
            for event in client.receive_data(data):
                match event:
                    case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                        answer.headers |= dict(event.headers)
                    case h2.events.DataReceived():
                        answer.body += event.data
                    case h2.events.StreamEnded():
                        return answer
                    case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        answer.closed = True
                        return answer
            connection.sendall(client.data_to_send())
    except (ConnectionError, ssl.SSLError, h2.exceptions.ProtocolError):
        pass
    answer.closed = True
    return answer


def say(connection: socket.socket, data: bytes) -> bytes:
    """Send bytes and return all that comes back until the other side ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(data)
        while part := connection.recv(65536):
            got += part
    return got


class Recorder:
    """A gRPC server that notes every byte and header that reaches it, and answers with nothing.

    A call whose path ends in ``/Silent`` is held until ``release`` is called.
    """

    def __init__(self, path: Path) -> None:
        self.connections = 0
        self.raw = b""
        self.requests: list[list[tuple[str, str]]] = []
        self.held = threading.Event()
        self._free = threading.Event()
        self._ending = threading.Event()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._threads = [threading.Thread(target=self._accept)]

    def release(self) -> None:
        """Answer the silent call."""
        self._free.set()

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._server.close()

    def _accept(self) -> None:
        self._server.settimeout(0.05)
        while not self._ending.is_set():
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        server = h2.connection.H2Connection(config)
        server.initiate_connection()
        silent: list[int] = []
        with connection, selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            while not self._ending.is_set():
                connection.sendall(server.data_to_send())
                if self._free.is_set():
                    while silent:
                        self._answer(server, silent.pop())
                    connection.sendall(server.data_to_send())
                if not selector.select(0.05):
                    continue
                data = connection.recv(65536)
                if not data:
                    return
                self.raw += data
                for event in server.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        self.requests.append(list(event.headers))
                    if isinstance(event, h2.events.StreamEnded):
                        if dict(self.requests[-1])[":path"].endswith("/Silent"):
                            silent.append(event.stream_id)
                            self.held.set()
                        else:
                            self._answer(server, event.stream_id)

    @staticmethod
    def _answer(server: h2.connection.H2Connection, stream: int) -> None:
        server.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        server.send_data(stream, frame(b""))
        server.send_headers(stream, [("grpc-status", "0")], end_stream=True)


class Squatter:
    """Takes a port that was somebody else's, and notes every byte that it gets.

    ``raw`` has the bytes of each connection.  With ``tls`` it answers as a TLS server, and notes
    in ``plain`` what the bytes say.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.raw: list[bytes] = []
        self.plain = b""
        self._tls = tls
        self._ending = threading.Event()
        self._server = socket.create_server(("127.0.0.1", port))
        self._server.settimeout(0.05)
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._server.close()

    def _accept(self) -> None:
        while not self._ending.is_set():
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            self.raw.append(b"")
            connection.settimeout(0.05)
            with connection, contextlib.suppress(ConnectionError, ssl.SSLError):
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = self._tls and self._tls.wrap_bio(came, goes, server_side=True)
        while not self._ending.is_set():
            try:
                data = connection.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            self.raw[-1] += data
            if session is None:
                # What a server of HTTP/2 says first: whoever believes it goes on talking.
                connection.sendall(b"\0\0\0\4\0\0\0\0\0")
                continue
            came.write(data)
            try:
                with contextlib.suppress(ssl.SSLWantReadError):
                    session.do_handshake()
                    while more := session.read(65536):
                        self.plain += more
            finally:
                connection.sendall(goes.read())
