"""A registry that misbehaves on purpose: for faults that a real one cannot be asked for.

It runs in a thread, so that tests of the library and of the command line can use it alike.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.images import Image, sha256

PIECE = 16 * 1024


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    client: tuple[str, int] = ("", 0)


@dataclass
class Answer:
    """What to answer; ``length`` None means the body's, -1 none at all (chunked or closed)."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    # Close the connection after this many bytes of the body, as if the server had died.
    break_after: int | None = None
    # Send these bytes in place of all of the above, and close: anything but HTTP, or nothing.
    raw: bytes | None = None
    # Cut the connection without any answer.
    reset: bool = False
    # Set by the test; the body stops after its first half until it is set.
    gate: threading.Event | None = None


Hook = Callable[[Seen], Answer | None]


class FakeRegistry:
    """Serves what was added, unless a hook answers first.  The latest hook is asked first."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[Seen] = []
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.hooks: list[tuple[str, Hook]] = []
        self.tls = tls
        # Bytes a second of each body; None for no limit.
        self.pace: float | None = None
        # Bodies that are being sent, and the most that were at once.
        self.sending = self.most_sending = 0
        self._count = threading.Lock()
        self._gates: list[threading.Event] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._serve(self)

            do_HEAD = do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        # Clients that break off are what many tests are about.
        self._server.handle_error = lambda *_: None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self._gates:
            gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def gate(self) -> threading.Event:
        """Return an event that is set at the latest when the registry closes."""
        gate = threading.Event()
        self._gates.append(gate)
        return gate

    def add(self, repository: str, tag: str, made: Image) -> str:
        """Serve an image; return its reference."""
        for child in made.manifests:
            self.add(repository, child.digest, child)
        self.blobs |= made.blobs
        for name in (tag, made.digest):
            self.manifests[f"{repository}/manifests/{name}"] = (made.media_type, made.data)
        return f"{self.address}/{repository}:{tag}"

    def on(self, pattern: str, hook: Hook | Answer) -> None:
        """Let a hook (or a fixed answer) see requests whose ``METHOD path`` matches."""
        self.hooks.insert(0, (pattern, hook if callable(hook) else lambda _, a=hook: a))

    def requests(self, pattern: str) -> list[Seen]:
        """Return the requests so far whose ``METHOD path`` matches."""
        return [s for s in self.seen if re.search(pattern, f"{s.method} {s.path}")]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {k.lower(): v for k, v in handler.headers.items()}
        seen = Seen(handler.command, handler.path, headers, body, handler.client_address)
        self.seen.append(seen)
        answer = self._answer(seen)
        if answer.reset:
            # Without lingering, close() sends RST and not FIN.
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            os.close(handler.connection.detach())
            handler.close_connection = True
            return
        if answer.raw is not None:
            handler.wfile.write(answer.raw)
            handler.close_connection = True
            return
        length = len(answer.body) if answer.length is None else answer.length
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            for one in value.split("\n"):
                handler.send_header(name, one)
        if length >= 0:
            handler.send_header("Content-Length", str(length))
        else:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if answer.gate is not None:
            half = len(answer.body) // 2
            handler.wfile.write(answer.body[:half])
            handler.wfile.flush()
            answer.gate.wait(30)
            handler.wfile.write(answer.body[half:])
        elif answer.break_after is not None:
            handler.wfile.write(answer.body[: answer.break_after])
            handler.close_connection = True
        elif self.pace is not None:
            self._send_slowly(handler, answer.body, self.pace)
        else:
            handler.wfile.write(answer.body)

    def _send_slowly(self, handler: BaseHTTPRequestHandler, body: bytes, pace: float) -> None:
        with self._count:
            self.sending += 1
            self.most_sending = max(self.most_sending, self.sending)
        try:
            for start in range(0, len(body), PIECE):
                handler.wfile.write(body[start : start + PIECE])
                time.sleep(PIECE / pace)
        finally:
            with self._count:
                self.sending -= 1

    def _answer(self, seen: Seen) -> Answer:
        for pattern, hook in self.hooks:
            if re.search(pattern, f"{seen.method} {seen.path}"):
                answer = hook(seen)
                if answer is not None:
                    return answer
        path = seen.path.partition("?")[0].removeprefix("/v2/")
        if path in self.manifests:
            media_type, data = self.manifests[path]
            kind = {"Content-Type": media_type, "Docker-Content-Digest": sha256(data)}
            return Answer(body=data, headers=kind)
        digest = path.rpartition("/blobs/")[2]
        if digest in self.blobs:
            return self._blob(self.blobs[digest], seen.headers.get("range"))
        return Answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}')

    @staticmethod
    def _blob(data: bytes, asked: str | None) -> Answer:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if not found:
            return Answer(body=data, headers={"Accept-Ranges": "bytes"})
        start = int(found[1])
        end = min(int(found[2]) + 1, len(data)) if found[2] else len(data)
        if start >= len(data):
            return Answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
        where = f"bytes {start}-{end - 1}/{len(data)}"
        return Answer(206, data[start:end], {"Content-Range": where})
