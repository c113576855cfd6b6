"""A registry that misbehaves on purpose, down to the bytes on the wire, and notes all it does.

It can be several hosts at once, each on a port of its own at 127.0.0.1: the registry, mirrors, a
content network that the registry's blobs are redirected to, and a token server.  What goes wrong
is a plan, a list of faults; without one it behaves as the real docker-registry does (the contract
tests hold it to that).  It runs in a thread with an event loop of its own, so that it serves the
tests of a process and the commands that they start alike::

    with FaultyRegistry(mirrors=1) as registry:
        reference = registry.add(image, "a/b", "1")
        registry.faults = [Fault("reset", Where("blob", 0), offset=5000)]
        ...
        assert registry.served_again(layer.digest) <= 1024 * 1024

HTTP is framed by hand, because a library would not let us send what is wrong.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import gzip
import hashlib
import hmac
import itertools
import json
import math
import random
import re
import secrets
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import trustme

from tests.support.images import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Image, sha256

REGISTRY, CONTENT, TOKEN = "registry", "content", "token"
# As ``times`` of a fault: each time.
ALWAYS = 0

CHUNK = 64 * 1024
MAX_HEAD = 64 * 1024
# Small, so that what is counted as served is not far from what has arrived.
SEND_BUFFER = 128 * 1024
SERVICE = "faulty"
METADATA_ADDRESS = "169.254.169.254"

# What each kind does, as a person reads it in a schedule.
KINDS = {
    # --- the body breaks at an offset; with offset None, or for HEAD, before the answer
    "reset": "connection reset",
    "close": "connection closed, though Content-Length says more",
    "stall": "nothing more comes",  # seconds: for so long, else until the client leaves
    "trickle": "one byte at a time",  # seconds: between them, 1 by default
    # --- it ends cleanly, but too early
    "short": "chunked, and ends cleanly too early",
    "short-length": "Content-Length is of the part only, and ends cleanly too early",
    # --- the answer is another one
    "status": "answers an error",  # status; seconds: Retry-After, date: as a date
    "unauthorized": "all tokens have expired: 401",
    "slow": "the answer takes its time",  # seconds
    "silent": "no answer at all",
    # --- ranges: these wait for a request with one
    "ignore-range": "Range ignored: 200 with everything",
    "wrong-range": "206 from another offset",  # offset: where it begins instead
    "range-refused": "416",
    # --- headers
    "no-length": "no Content-Length, ends by closing",
    "chunked": "no Content-Length, chunked",
    "encoding": "Content-Encoding: gzip said, and not done",
    "gzip": "Content-Encoding: gzip said and done, though not asked for",
    "no-digest": "no Docker-Content-Digest",
    # --- redirects
    "expired": "redirect to the content network with a signature that has expired",
    "redirect-loop": "redirect to itself",
    "redirect-http": "redirect to plain HTTP",
    "redirect-private": "redirect to a link-local address",  # location: another one
    # --- the bytes are not the right ones
    "flip": "one byte is wrong",
    "extra": "more bytes after the end",  # count
    # --- the connection, before any request: reset, close and silent too
    "tls": "the TLS greeting is refused",
    "tls-certificate": "a certificate of another authority for another name",
}
_BREAKS = frozenset({"reset", "close", "stall", "trickle"})
_RANGES = frozenset({"ignore-range", "wrong-range", "range-refused"})
# Faults of a body that there has to be: these wait for a GET that is answered with content.
_BODIES = frozenset({"short", "short-length", "encoding", "gzip", "chunked", "flip", "extra"})
_CONNECTION = frozenset({"reset", "close", "silent", "tls", "tls-certificate"})
_TLS = frozenset({"tls", "tls-certificate"})
_WHATS = frozenset(
    {"any", "head", "manifest", "config", "blob", "token", "ping", "other", "connection"}
)


def _repr(value: object) -> str:
    """Return what makes the same value again, without what is the default."""
    parts: list[str] = []
    for position, one in enumerate(fields(value)):
        given = getattr(value, one.name)
        if given == one.default and type(given) is type(one.default):
            continue
        plain = position == len(parts) and position < 2
        parts.append(repr(given) if plain else f"{one.name}={given!r}")
    return f"{type(value).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Where:
    """Which requests a fault may meet.

    what: ``any`` request, ``head`` (HEAD of anything), ``manifest`` (an index too), ``config``,
        ``blob`` (a layer), ``token``, ``ping`` (``/v2/``), or ``connection``: before a request.
    number: for blobs, the layer's position in its manifest, from 0; None is any.
    host: ``registry``, ``mirror1``, ``mirror2``, ..., ``content``, ``token``; "" is any.
    nth: the first of the requests that match which it meets, from 1.  If another fault has that
        one already, the next.
    """

    what: str = "any"
    number: int | None = None
    host: str = ""
    nth: int = 1

    def __post_init__(self) -> None:
        assert self.what in _WHATS, self.what
        assert self.nth >= 1

    def __str__(self) -> str:
        what = self.what if self.number is None else f"{self.what} {self.number}"
        return f"{what} at {self.host or 'any host'}" + (f", no. {self.nth}" * (self.nth > 1))

    __repr__ = _repr


@dataclass(frozen=True, repr=False)
class Fault:
    """One thing that goes wrong.

    kind: one of ``KINDS``.
    offset: a byte of the blob or document, not of the response; if a response begins after it,
        its first byte.  None is before the answer's first byte.
    seconds: a wait; for ``status`` what Retry-After says, None for no such header.
    status: what ``status`` answers.  date: Retry-After as an HTTP date (full seconds, rounded up).
    count: of extra bytes.  location: where ``redirect-private`` leads to.
    times: how often, ``ALWAYS`` for each time.
    """

    kind: str
    where: Where = Where()
    offset: int | None = 0
    seconds: float | None = None
    status: int = 503
    date: bool = False
    count: int = 16
    location: str = ""
    times: int = 1

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert (self.where.what == "connection") <= (self.kind in _CONNECTION), self
        assert (self.kind in _TLS) <= (self.where.what == "connection"), self

    @property
    def spoils(self) -> bool:
        """Whether a client can take wrong bytes for right ones, and has to fetch a blob again."""
        return self.kind in ("flip", "gzip")

    def __str__(self) -> str:
        text = KINDS[self.kind]
        if self.kind == "status":
            text = f"answers {self.status}"
            if self.seconds is not None:
                text += f" with Retry-After of {self.seconds:g} s{' as a date' * self.date}"
        elif self.seconds is not None:
            text += f" ({self.seconds:g} s)"
        if self.kind in _BREAKS | {"short", "short-length", "flip", "wrong-range"}:
            text += " before the answer" if self.offset is None else f" at byte {self.offset}"
        if self.location:
            text += f" ({self.location})"
        often = {1: "", ALWAYS: ", always"}.get(self.times, f", {self.times} times")
        return f"{self.where}: {text}{often}"

    __repr__ = _repr


def describe(faults: Iterable[Fault]) -> str:
    """Return a plan for people, a line for each fault."""
    return "\n".join(f"- {fault}" for fault in faults)


@dataclass(eq=False)
class Request:
    """A request as it came, and what became of it.  ``end`` is None while it is being served."""

    host: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    arrival: float
    what: str = "other"
    digest: str = ""
    status: int | None = None
    # Where in the blob or document the response's body begins, and how many of its bytes the
    # kernel took (and, before a reset, has delivered).  If the client leaves in the middle, up
    # to one chunk of 64 KiB may be missing in the count.
    offset: int = 0
    sent: int = 0
    end: float | None = None
    fault: Fault | None = None
    left: bool = False

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class Host:
    """One of the hosts; ``latency`` (seconds) and ``bandwidth`` (bytes per second and
    connection) may be changed at any time."""

    def __init__(
        self, role: str, root: str, *, tls: bool, latency: float, bandwidth: float | None
    ) -> None:
        self.role = role
        self.root = root
        self.tls = tls
        self.latency = latency
        self.bandwidth = bandwidth
        self.port = 0
        # When each connection came, with or without a request.
        self.connections: list[float] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    @property
    def api(self) -> str:
        """Where its API begins: what a mirror is configured with under ``override_path``."""
        return f"{self.url}{self.root}"


@dataclass
class _State:
    """A fault of the plan, and what became of it so far."""

    fault: Fault
    seen: int = 0
    fired: int = 0


@dataclass
class _Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    # ``length``, ``chunked`` or ``close``.
    framing: str = "length"
    # What Content-Length says, if not the body's length; the connection is closed after it.
    length: int | None = None

    def announced(self) -> int:
        return len(self.body) if self.length is None else self.length


class _Left(Exception):
    """The client has gone."""


class FaultyRegistry:
    """The hosts, from ``with`` on; nothing of them is left after it.

    mirrors: how many, or the root of each one's API: ``/v2`` is usual, a mirror with
        ``override_path`` has any other.
    content: blobs are served by a content network, with a signature that ends after
        ``signed_for`` seconds.
    tokens: the registry (not the mirrors) wants tokens, which live for ``token_lifetime``
        seconds; ``login`` is the user and password that the token server wants, if any.
    tls: all hosts, or the named ones, speak TLS; ``authority`` is whom to trust.
    """

    def __init__(
        self,
        *,
        mirrors: int | Sequence[str] = 0,
        content: bool = False,
        tokens: bool = False,
        tls: bool | Sequence[str] = False,
        faults: Iterable[Fault] = (),
        latency: float = 0.0,
        bandwidth: float | None = None,
        signed_for: float = 300.0,
        token_lifetime: float = 300.0,
        login: tuple[str, str] | None = None,
    ) -> None:
        roots = ["/v2"] * mirrors if isinstance(mirrors, int) else list(mirrors)
        roles = {REGISTRY: "/v2"} | {f"mirror{n}": root for n, root in enumerate(roots, 1)}
        roles |= {CONTENT: ""} if content else {}
        roles |= {TOKEN: ""} if tokens else {}
        self.hosts = {
            role: Host(
                role,
                root,
                tls=role in tls if isinstance(tls, Sequence) else tls,
                latency=latency,
                bandwidth=bandwidth,
            )
            for role, root in roles.items()
        }
        self.signed_for = signed_for
        self.token_lifetime = token_lifetime
        self.login = login
        self.requests: list[Request] = []
        self.faults = list(faults)
        self.authority = trustme.CA() if any(host.tls for host in self.hosts.values()) else None
        self._manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self._blobs: dict[str, bytes] = {}
        self._repositories: dict[str, set[str]] = {}
        self._numbers: dict[str, set[int]] = {}
        self._configs: set[str] = set()
        self._tokens: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._secret = secrets.token_bytes(16)
        self._counter = itertools.count(1)
        self._sockets: dict[str, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._trouble: list[BaseException] = []

    # --- setting it up -----------------------------------------------------------------------

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for role, host in self.hosts.items():
                listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                listening.setblocking(False)
                self._sockets[role] = listening
                host.port = listening.getsockname()[1]
            self._contexts = {
                role: self._context(self.authority, "127.0.0.1")
                for role, host in self.hosts.items()
                if host.tls
            }
            self._thread = threading.Thread(target=self._run, name="faulty-registry")
            self._thread.start()
            self._ready.wait()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop
        assert self._stop
        assert self._thread
        # Unless it has ended by itself, which it tells below.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        for listening in self._sockets.values():
            listening.close()
        if self._trouble:
            raise AssertionError("the faulty registry itself failed") from self._trouble[0]

    @staticmethod
    def _context(authority: trustme.CA | None, name: str) -> ssl.SSLContext:
        assert authority
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        return context

    @property
    def address(self) -> str:
        """The registry's ``host:port``."""
        return self.hosts[REGISTRY].address

    @property
    def url(self) -> str:
        return self.hosts[REGISTRY].url

    def add(self, image: Image, repository: str, tag: str) -> str:
        """Serve an image, at the registry and all mirrors; return its reference."""
        known = self._repositories.setdefault(repository, set())
        for child in image.manifests:
            self.add(child, repository, child.digest)
        for digest, data in image.blobs.items():
            self.add_blob(data, repository, digest)
            known.add(digest)
        for name in (tag, image.digest):
            self._manifests[repository, name] = (image.media_type, image.data)
        document = _document(image)
        for number, layer in enumerate(document.get("layers") or []):
            self._numbers.setdefault(layer["digest"], set()).add(number)
        if config := document.get("config"):
            self._configs.add(config["digest"])
        return f"{self.address}/{repository}:{tag}"

    def add_blob(self, data: bytes, repository: str, digest: str | None = None) -> str:
        """Serve a blob, under its digest unless another is given; return that."""
        digest = digest or sha256(data)
        self._blobs[digest] = data
        self._repositories.setdefault(repository, set()).add(digest)
        return digest

    @property
    def faults(self) -> list[Fault]:
        """The plan.  Setting it begins anew: nothing has been counted."""
        return [state.fault for state in self._plan]

    @faults.setter
    def faults(self, faults: Iterable[Fault]) -> None:
        self._plan = [_State(fault) for fault in faults]

    # --- asking what happened ----------------------------------------------------------------

    @property
    def fired(self) -> list[Fault]:
        """The faults that happened, as often as they did; connections' among them."""
        return [state.fault for state in self._plan for _ in range(state.fired)]

    def settle(self, timeout: float = 5.0) -> None:
        """Wait until no request is being served: the record is complete then."""
        deadline = time.monotonic() + timeout
        while any(request.end is None for request in self.requests):
            assert time.monotonic() < deadline, "requests are still being served"
            time.sleep(0.002)

    def seen(self, pattern: str = "", *, host: str = "", what: str = "") -> list[Request]:
        """Return the requests whose ``METHOD target`` matches, to a host, of a kind."""
        return [
            request
            for request in self.requests
            if (not host or request.host == host)
            and (not what or request.what == what)
            and re.search(pattern, f"{request.method} {request.target}")
        ]

    def arrivals(self, host: str = REGISTRY) -> list[float]:
        """Return when requests came to a host, on ``time.monotonic()``."""
        return [request.arrival for request in self.requests if request.host == host]

    def ranges(self, digest: str, *, host: str = "") -> list[tuple[int, int]]:
        """Return which bytes of a blob were served, from and to, in the order of requests."""
        size = len(self._blobs[digest])
        return [
            (request.offset, min(request.offset + request.sent, size))
            for request in self.requests
            if request.digest == digest
            and (not host or request.host == host)
            and request.status in (200, 206)
            and request.sent > 0
            and request.offset < size
        ]

    def served(self, digest: str, *, host: str = "") -> int:
        """Return how many bytes of a blob were served, each as often as it was."""
        return sum(end - start for start, end in self.ranges(digest, host=host))

    def served_again(self, digest: str) -> int:
        """Return how many bytes of a blob were served after they had been already."""
        once, reached = 0, 0
        for start, end in sorted(self.ranges(digest)):
            once += max(0, end - max(start, reached))
            reached = max(reached, end)
        return self.served(digest) - once

    # --- connections -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - told where the test ends
            self._trouble.append(error)
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._accept(self.hosts[role], listening, group))
                for role, listening in self._sockets.items()
            ]
            self._ready.set()
            await self._stop.wait()
            for task in tasks:
                task.cancel()
            for task in list(self._serving):
                task.cancel()

    async def _accept(self, host: Host, listening: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(listening)
            host.connections.append(time.monotonic())
            task = group.create_task(self._connection(host, accepted))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _connection(self, host: Host, accepted: socket.socket) -> None:
        """Serve one connection; clients that go are what this is about, and no trouble."""
        try:
            with accepted, contextlib.suppress(_Left, OSError, EOFError):
                accepted.setblocking(False)
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                context = self._contexts.get(host.role)
                if (fault := self._connection_fault(host)) is not None:
                    if fault.kind != "tls-certificate":
                        await self._break_connection(accepted, fault.kind)
                        return
                    context = self._context(trustme.CA(), "elsewhere.example")
                if await self._greets(accepted) != (context is not None):
                    await self._wrong_scheme(accepted, context is None)
                    return
                await self._streams(host, accepted, context)
        except Exception as error:  # noqa: BLE001 - told where the test ends
            self._trouble.append(error)

    def _connection_fault(self, host: Host) -> Fault | None:
        return self._choose(
            lambda fault: fault.where.what == "connection" and fault.where.host in ("", host.role)
        )

    async def _break_connection(self, accepted: socket.socket, kind: str) -> None:
        loop = asyncio.get_running_loop()
        if kind == "reset":
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "silent":
            while await loop.sock_recv(accepted, CHUNK):
                pass
        else:
            # Read first: closing with unread bytes would be a reset.
            await loop.sock_recv(accepted, CHUNK)
            if kind == "tls":
                # The alert handshake_failure (RFC 8446, section 6.2).
                await loop.sock_sendall(accepted, bytes.fromhex("15 0303 0002 02 28"))

    @staticmethod
    async def _greets(accepted: socket.socket) -> bool:
        """Tell whether a connection begins with a TLS greeting; nothing of it is consumed."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(accepted, lambda: readable.done() or readable.set_result(None))
        try:
            await readable
        finally:
            loop.remove_reader(accepted)
        first = accepted.recv(1, socket.MSG_PEEK)
        if not first:
            raise _Left
        return first == b"\x16"

    @staticmethod
    async def _wrong_scheme(accepted: socket.socket, greeted: bool) -> None:
        """Answer TLS on a plain port, and the reverse, as Go's servers do."""
        loop = asyncio.get_running_loop()
        await loop.sock_recv(accepted, CHUNK)
        said = "a TLS greeting to a plain port" if greeted else "an HTTP request to an HTTPS server"
        answer = f"HTTP/1.0 400 Bad Request\r\n\r\nClient sent {said}.\n"
        await loop.sock_sendall(accepted, answer.encode())

    async def _streams(
        self, host: Host, accepted: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_HEAD, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=context)
        # drain() then waits until the kernel has everything.
        if context is None:
            transport.set_write_buffer_limits(high=0)
        else:
            # Zero is a limit that Python's TLS takes for always reached.
            transport.set_write_buffer_limits(high=1, low=0)
            transport._ssl_protocol._transport.set_write_buffer_limits(high=0)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        line = _Line(host, next(self._counter), reader, writer)
        try:
            while await self._exchange(line):
                pass
            await line.close()
        finally:
            transport.abort()
            # abort() takes effect in the loop's next round, which must not find it closed.
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    # --- one request -------------------------------------------------------------------------

    async def _exchange(self, line: _Line) -> bool:
        """Serve one request; return whether the connection can serve another."""
        try:
            head = (await line.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return False
        first, *rest = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for one in rest:
            name, _, value = one.partition(":")
            headers[name.strip().lower()] = value.strip()
        arrival = time.monotonic()
        body = await line.reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(line.host.role, method, target, headers, body, line.number, arrival)
        self._classify(line.host, request)
        self.requests.append(request)
        try:
            return await self._serve(line, request)
        except (_Left, OSError):
            request.left = True
            raise
        finally:
            request.end = time.monotonic()

    def _classify(self, host: Host, request: Request) -> None:
        if host.role == TOKEN:
            request.what = "token" if request.path == "/token" else "other"
            return
        if request.path.rstrip("/") == host.root and host.root:
            request.what = "ping"
            return
        _, kind, name = self._split(host, request.path)
        if kind == "blobs":
            request.digest = name
            request.what = "config" if name in self._configs else "blob"
        elif kind == "manifests":
            request.what = "manifest"
        if request.method == "HEAD" and kind:
            request.what = "head"

    @staticmethod
    def _split(host: Host, path: str) -> tuple[str, str, str]:
        """Return repository, ``manifests`` or ``blobs``, and the name of a path of the API."""
        found = re.fullmatch(r"/(.+)/(manifests|blobs)/([^/]+)", path.removeprefix(host.root))
        ours = path.startswith(f"{host.root}/")
        return (found[1], found[2], found[3]) if found and ours else ("", "", "")

    def _choose(self, selects) -> Fault | None:
        """Count for all faults that a request matches; return the first whose turn it is."""
        chosen: _State | None = None
        for state in self._plan:
            fault = state.fault
            if not selects(fault):
                continue
            state.seen += 1
            due = fault.times == ALWAYS or state.fired < fault.times
            if chosen is None and due and state.seen >= fault.where.nth:
                chosen = state
        if chosen is None:
            return None
        chosen.fired += 1
        return chosen.fault

    def _selects(self, fault: Fault, request: Request, answer: _Answer) -> bool:
        where = fault.where
        if where.what != request.what and (where.what != "any"):
            return False
        if where.host not in ("", request.host):
            return False
        if where.number is not None and where.number not in self._numbers.get(request.digest, ()):
            return False
        has_body = request.method == "GET" and answer.status in (200, 206)
        if fault.kind == "flip":
            assert fault.offset is not None
            end = answer.start + len(answer.body)
            return has_body and answer.start <= fault.offset < end
        if fault.kind in _BODIES:
            return has_body
        if fault.kind in _RANGES:
            return request.method == "GET" and request.range is not None
        if fault.kind == "expired":
            return answer.status == 307
        if fault.kind == "no-digest":
            return answer.status in (200, 206)
        return True

    async def _serve(self, line: _Line, request: Request) -> bool:
        host = line.host
        answer = self._answer(host, request)
        fault = None
        # A request that only asks how to log in has no turn: it would be answered alike.
        if answer.status != 401:
            fault = self._choose(lambda fault: self._selects(fault, request, answer))
        request.fault = fault
        if host.latency:
            await line.wait(host.latency)
        if fault is not None:
            if fault.kind == "slow":
                await line.wait(1.0 if fault.seconds is None else fault.seconds)
            elif fault.kind == "silent":
                await line.wait(None)
            elif fault.kind in _BREAKS and (fault.offset is None or request.method == "HEAD"):
                await self._break(line, request, fault)
            else:
                answer = self._changed(host, request, fault, answer)
        await self._send(line, request, answer, fault)
        complete = request.method == "HEAD" or answer.announced() == len(answer.body)
        last = answer.framing == "close" or request.headers.get("connection") == "close"
        return complete and not last

    # --- what the right answer is ------------------------------------------------------------

    def _answer(self, host: Host, request: Request) -> _Answer:
        if host.role == TOKEN:
            return self._token(request)
        if host.role == CONTENT:
            return self._signed_blob(request)
        if request.method not in ("GET", "HEAD"):
            return _error(405, "UNSUPPORTED", "The operation is unsupported.")
        repository, kind, name = self._split(host, request.path)
        if host.role == REGISTRY and TOKEN in self.hosts and not self._let_in(request, repository):
            return self._challenge(repository)
        if request.what == "ping":
            return _Answer(200, b"{}", {"Content-Type": "application/json; charset=utf-8"})
        if kind == "manifests":
            return self._manifest(repository, name, request)
        if kind == "blobs":
            if name not in self._repositories.get(repository, ()):
                return _error(404, "BLOB_UNKNOWN", "blob unknown to registry", name)
            if host.role == REGISTRY and CONTENT in self.hosts and request.method == "GET":
                return _Answer(307, headers={"Location": self._signed(name, self.signed_for)})
            return self._blob(name, request)
        text = b"404 page not found\n"
        return _Answer(404, text, {"Content-Type": "text/plain; charset=utf-8"})

    def _manifest(self, repository: str, name: str, request: Request) -> _Answer:
        if (repository, name) not in self._manifests:
            detail = {"Name": repository, "Revision": name} if ":" in name else {"Tag": name}
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown", detail)
        media_type, data = self._manifests[repository, name]
        accepted = {one.partition(";")[0].strip() for one in _values(request.headers, "accept")}
        for kind, called in ((OCI_MANIFEST, "manifest"), (OCI_INDEX, "index")):
            if media_type == kind and kind not in accepted:
                said = f"OCI {called} found, but accept header does not support OCI {called}"
                said += "es" if called == "index" else "s"
                return _error(404, "MANIFEST_UNKNOWN", said)
        if media_type == DOCKER_LIST and media_type not in accepted and ":" not in name:
            # What a client that knows no lists gets: the image that was usual before them.
            for entry in json.loads(data)["manifests"]:
                platform = entry.get("platform", {})
                if (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
                    media_type, data = self._manifests[repository, entry["digest"]]
        digest = sha256(data)
        return _Answer(
            200,
            data,
            {
                "Content-Type": media_type,
                "Docker-Content-Digest": digest,
                "Etag": f'"{digest}"',
            },
        )

    def _blob(self, digest: str, request: Request) -> _Answer:
        data = self._blobs[digest]
        headers = {
            "Accept-Ranges": "bytes",
            "Cache-Control": "max-age=31536000",
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "Etag": f'"{digest}"',
        }
        try:
            part = parse_range(request.range, len(data))
        except ValueError as error:
            del headers["Accept-Ranges"]
            headers["Content-Type"] = "text/plain; charset=utf-8"
            if str(error).endswith("overlap"):
                headers["Content-Range"] = f"bytes */{len(data)}"
            # The real one announces the whole blob, says this, and closes the connection.
            return _Answer(416, f"{error}\n".encode(), headers, length=len(data))
        if part is None:
            return _Answer(200, data, headers)
        return _partial(data, *part, headers)

    # --- tokens and signatures ---------------------------------------------------------------

    def _challenge(self, repository: str = "") -> _Answer:
        if TOKEN in self.hosts:
            scope = f',scope="repository:{repository}:pull"' if repository else ""
            realm = f"{self.hosts[TOKEN].url}/token"
            how = f'Bearer realm="{realm}",service="{SERVICE}"{scope}'
        else:
            how = 'Basic realm="faulty"'
        answer = _error(401, "UNAUTHORIZED", "authentication required")
        answer.headers["WWW-Authenticate"] = how
        return answer

    def _let_in(self, request: Request, repository: str) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        until, scopes = self._tokens.get(token, (0.0, ()))
        if scheme != "Bearer" or until <= time.monotonic():
            return False
        return not repository or f"repository:{repository}:pull" in scopes

    def _token(self, request: Request) -> _Answer:
        if request.what != "token":
            return _Answer(404)
        if request.method == "POST":
            # Many token servers know only GET.
            return _Answer(405)
        if self.login is not None:
            pair = base64.b64encode(":".join(self.login).encode()).decode()
            if request.headers.get("authorization") != f"Basic {pair}":
                return _error(401, "UNAUTHORIZED", "authentication required")
        query = parse_qs(urlsplit(request.target).query)
        scopes = tuple(one for scope in query.get("scope", []) for one in scope.split())
        token = f"token-{len(self._tokens) + 1}"
        self._tokens[token] = (time.monotonic() + self.token_lifetime, scopes)
        answer = {"token": token, "expires_in": math.ceil(self.token_lifetime)}
        body = json.dumps(answer).encode()
        return _Answer(200, body, {"Content-Type": "application/json"})

    def _signed(self, digest: str, lifetime: float) -> str:
        # Exact: rounded up, one that has just ended would still hold.
        until = repr(time.monotonic() + lifetime)
        query = {"expires": until, "signature": self._signature(digest, until)}
        return f"{self.hosts[CONTENT].url}/data/blobs/{digest}?{urlencode(query)}"

    def _signature(self, digest: str, until: str) -> str:
        return hmac.new(self._secret, f"{digest} {until}".encode(), hashlib.sha256).hexdigest()

    def _signed_blob(self, request: Request) -> _Answer:
        query = dict(parse_qsl(urlsplit(request.target).query))
        until = query.get("expires", "")
        right = query.get("signature") == self._signature(request.digest, until)
        if not right or float(until) <= time.monotonic() or "authorization" in request.headers:
            # Stores of objects refuse two kinds of authorization at once.
            said = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
            return _Answer(403, said, {"Content-Type": "application/xml"})
        answer = self._blob(request.digest, request)
        answer.headers.pop("Docker-Content-Digest", None)
        return answer

    # --- what the fault makes of it ----------------------------------------------------------

    def _changed(self, host: Host, request: Request, fault: Fault, answer: _Answer) -> _Answer:
        """Return another answer, where the fault is one of the answer and not of the wire."""
        data = self._blobs.get(request.digest, b"")
        headers = dict(answer.headers)
        at = max(0, min((fault.offset or 0) - answer.start, len(answer.body)))
        match fault.kind:
            case "status":
                return self._status(fault)
            case "unauthorized":
                self._tokens.clear()
                repository, *_ = self._split(host, request.path)
                return self._challenge(repository)
            case "ignore-range":
                headers.pop("Content-Range", None)
                return _Answer(200, data, headers)
            case "wrong-range":
                other = min(fault.offset or 0, len(data) - 1)
                if other == answer.start:
                    other = other - 1 if other else min(1, len(data) - 1)
                return _partial(data, other, len(data), headers)
            case "range-refused":
                return _Answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
            case "no-length":
                return replace(answer, framing="close")
            case "chunked":
                return replace(answer, framing="chunked")
            case "short":
                return replace(answer, framing="chunked", body=answer.body[:at])
            case "short-length":
                return replace(answer, body=answer.body[:at])
            case "encoding":
                return replace(answer, headers={**headers, "Content-Encoding": "gzip"})
            case "gzip":
                packed = gzip.compress(answer.body, 1, mtime=0)
                return replace(answer, body=packed, headers={**headers, "Content-Encoding": "gzip"})
            case "no-digest":
                headers.pop("Docker-Content-Digest", None)
                return replace(answer, headers=headers)
            case "flip":
                body = bytearray(answer.body)
                body[at] ^= 0xFF
                return replace(answer, body=bytes(body))
            case "extra":
                return replace(answer, body=answer.body + b"+" * fault.count)
            case "expired":
                return _Answer(307, headers={"Location": self._signed(request.digest, -1.0)})
            case "redirect-loop":
                return _Answer(307, headers={"Location": request.target})
            case "redirect-http":
                location = f"http://{host.address}{request.target}"
                return _Answer(307, headers={"Location": location})
            case "redirect-private":
                scheme = "https" if host.tls else "http"
                location = fault.location or f"{scheme}://{METADATA_ADDRESS}/latest/meta-data/"
                return _Answer(307, headers={"Location": location})
        return answer

    def _status(self, fault: Fault) -> _Answer:
        if fault.status == 401:
            return self._challenge()
        code = {403: "DENIED", 404: "MANIFEST_UNKNOWN", 429: "TOOMANYREQUESTS"}
        answer = _error(fault.status, code.get(fault.status, "UNKNOWN"), "on purpose")
        if fault.seconds is not None:
            after = f"{fault.seconds:g}"
            if fault.date:
                after = formatdate(math.ceil(time.time() + fault.seconds), usegmt=True)
            answer.headers["Retry-After"] = after
        return answer

    # --- the wire ----------------------------------------------------------------------------

    async def _send(
        self, line: _Line, request: Request, answer: _Answer, fault: Fault | None
    ) -> None:
        request.status = answer.status
        request.offset = answer.start
        lines = [f"HTTP/1.1 {answer.status} {_reason(answer.status)}"]
        headers = {**answer.headers, "Date": formatdate(usegmt=True)}
        if line.host.root:
            headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        if answer.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif answer.framing == "length":
            headers["Content-Length"] = str(answer.announced())
        if answer.framing == "close" or request.headers.get("connection") == "close":
            headers["Connection"] = "close"
        lines += [f"{name}: {value}" for name, value in headers.items()]
        await line.write("\r\n".join([*lines, "", ""]).encode())
        if request.method == "HEAD":
            return
        chunked = answer.framing == "chunked"
        if fault is not None and fault.kind in _BREAKS:
            at = max(0, min((fault.offset or 0) - answer.start, len(answer.body)))
            await self._send_body(line, request, answer.body[:at], chunked=chunked)
            await self._break(line, request, fault, answer.body[at:])
        else:
            await self._send_body(line, request, answer.body, chunked=chunked)
        if chunked:
            await line.write(b"0\r\n\r\n")

    async def _send_body(
        self, line: _Line, request: Request, body: bytes, *, chunked: bool
    ) -> None:
        bandwidth = line.host.bandwidth
        step = CHUNK if bandwidth is None else max(1, min(CHUNK, int(bandwidth / 50)))
        begun = time.monotonic()
        view = memoryview(body)
        for place in range(0, len(body), step):
            part = view[place : place + step]
            if chunked:
                await line.write(b"%x\r\n%b\r\n" % (len(part), part))
            else:
                await line.write(part)
            request.sent += len(part)
            if bandwidth is not None:
                ahead = begun + (place + len(part)) / bandwidth - time.monotonic()
                if ahead > 0:
                    await line.wait(ahead)

    async def _break(self, line: _Line, request: Request, fault: Fault, rest: bytes = b"") -> None:
        """Let a connection break; returns only if it goes on after all."""
        if fault.kind == "reset":
            request.sent = max(0, request.sent - await line.delivered())
            line.reset()
            raise EOFError
        if fault.kind == "close":
            await line.close()
            raise EOFError
        if fault.kind == "stall":
            await line.wait(fault.seconds)
            await self._send_body(line, request, rest, chunked=False)
            return
        between = 1.0 if fault.seconds is None else fault.seconds
        for place in range(len(rest)):
            await line.write(rest[place : place + 1])
            request.sent += 1
            await line.wait(between)


@dataclass
class _Line:
    """A connection with its streams."""

    host: Host
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def write(self, data: bytes | memoryview) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def wait(self, seconds: float | None) -> None:
        """Wait so long, or for ever with None; raise as soon as the client leaves."""
        try:
            async with asyncio.timeout(seconds):
                # No client sends its next request before this one's answer.
                await self.reader.read(1)
        except TimeoutError:
            return
        raise _Left

    async def delivered(self) -> int:
        """Wait until the other side's kernel has all bytes; return how many it has not.

        Only a while: a client that does not read takes no more.
        """
        connection = self.writer.get_extra_info("socket")
        deadline = time.monotonic() + 2.0
        while True:
            unsent = struct.unpack(
                "i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
            )[0]
            if not unsent or time.monotonic() > deadline:
                return unsent
            await asyncio.sleep(0.001)

    def reset(self) -> None:
        """Close so that the other side gets RST."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


# --- small things ----------------------------------------------------------------------------


def parse_range(value: str | None, size: int) -> tuple[int, int] | None:
    """Read a Range header as Go's ServeContent does, which docker-registry uses.

    Returns from and to (exclusive), or None for everything: no header, or several ranges, which
    nobody asks a registry for.  Raises ValueError for what is answered with 416.
    """
    if not value:
        return None
    unit, equals, text = value.partition("=")
    if unit != "bytes" or not equals:
        raise ValueError("invalid range")
    found: list[tuple[int, int]] = []
    missed = False
    for one in filter(None, (part.strip(" \t") for part in text.split(","))):
        first, dash, last = (part.strip(" \t") for part in one.partition("-"))
        if not dash or not re.fullmatch(r"[0-9]*", first + last) or not first + last:
            raise ValueError("invalid range")
        if not first:
            found.append((max(0, size - int(last)), size))
        elif int(first) >= size:
            missed = True
        elif last and int(first) > int(last):
            raise ValueError("invalid range")
        else:
            found.append((int(first), min(int(last) + 1, size) if last else size))
    if missed and not found:
        if size == 0:
            return None
        raise ValueError("invalid range: failed to overlap")
    return found[0] if len(found) == 1 else None


def _partial(data: bytes, start: int, end: int, headers: Mapping[str, str]) -> _Answer:
    where = f"bytes {start}-{end - 1}/{len(data)}"
    return _Answer(206, data[start:end], {**headers, "Content-Range": where}, start)


def _error(status: int, code: str, message: str, detail: object = None) -> _Answer:
    entry = {"code": code, "message": message} | ({"detail": detail} if detail else {})
    # To the byte as Go writes it: HEAD tells the length.
    body = json.dumps({"errors": [entry]}, separators=(",", ":")).encode() + b"\n"
    return _Answer(status, body, {"Content-Type": "application/json; charset=utf-8"})


def _values(headers: Mapping[str, str], name: str) -> list[str]:
    return [one.strip() for one in headers.get(name, "").split(",")]


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _document(image: Image) -> dict:
    """Return an image's document, or nothing for what is none: tests make such, too."""
    try:
        document = json.loads(image.data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


# --- schedules -------------------------------------------------------------------------------


def layer_sizes(image: Image) -> list[int]:
    """Return the sizes of an image's layers; of an index, those of its first image."""
    while image.manifests:
        image = image.manifests[0]
    return [layer["size"] for layer in _document(image).get("layers") or []]


def random_schedule(
    seed: object,
    image: Image,
    *,
    hosts: Sequence[str] = (REGISTRY,),
    tls: bool = False,
    faults: tuple[int, int] = (1, 5),
) -> list[Fault]:
    """Return a plan for an image that depends on the seed (and the other arguments) only.

    hosts: the roles that there are.  tls: whether they speak TLS.  faults: how many, from and to.
    """
    chance = random.Random(f"{seed}")
    sizes = layer_sizes(image)
    return [
        _random_fault(chance, sizes, chance.choice(list(hosts)), hosts, tls)
        for _ in range(chance.randint(*faults))
    ]


def _random_fault(
    chance: random.Random, sizes: Sequence[int], host: str, hosts: Sequence[str], tls: bool
) -> Fault:
    # Layers are most of a pull, so they meet most faults.
    whats = ["connection", "config"] + ["blob"] * 6
    if host == TOKEN:
        whats = ["connection", "token", "token", "token"]
    elif host != CONTENT:
        whats += ["head", "manifest"]
    what = chance.choice(whats)
    number = None
    size = 400  # about as long as documents are
    if what == "blob" and sizes:
        number = chance.randrange(len(sizes))
        size = sizes[number]
    redirected = host == REGISTRY and CONTENT in hosts and what in ("blob", "config")
    kind = chance.choice(_kinds(what, host, redirected, tls))
    more: dict[str, object] = {}
    if kind == "status":
        statuses = [408, 429, 429, 429, 500, 502, 503, 504]
        statuses += [403, 405] if what == "head" else []
        statuses += [401, 404] if host.startswith("mirror") else []
        statuses += [403] if host == CONTENT else []
        more["status"] = chance.choice(statuses)
        if more["status"] in (429, 503):
            more["seconds"] = chance.choice([None, 0, 1])
            more["date"] = more["seconds"] is not None and chance.random() < 0.5
    elif kind == "slow":
        more["seconds"] = round(chance.uniform(0.1, 1.0), 1)
    elif kind in _BREAKS | {"short", "short-length", "flip", "wrong-range"} and what not in (
        "connection",
        "head",
    ):
        inside = chance.randrange(size) if size else 0
        edges = [0, min(1, size), max(0, size - 1)]
        edges += [size] if kind in ("reset", "stall") else []
        edges += [None] if kind in _BREAKS and kind != "trickle" else []
        # An empty blob has no byte to be wrong.
        more["offset"] = inside if chance.random() < 0.7 else chance.choice(edges)
    elif kind == "extra":
        more["count"] = chance.choice([1, 16, 100_000])
    nth = chance.choice([1, 1, 1, 2, 3])
    times = chance.choice([1] * 8 + [2, 3])
    if host.startswith("mirror") and chance.random() < 0.2:
        times = ALWAYS  # a mirror may be dead for good; there is the registry
    return Fault(kind, Where(what, number, host, nth), times=times, **more)


def _kinds(what: str, host: str, redirected: bool, tls: bool) -> list[str]:
    """Return what can go wrong with such a request, often what is often."""
    if what == "connection":
        return ["reset", "close", "silent"] + ["tls", "tls-certificate"] * tls
    kinds = ["reset", "close", "stall", "silent", "slow", "status", "status", "status"]
    if what == "token":
        return kinds
    if host != CONTENT:
        kinds += ["redirect-loop", "redirect-private"] + ["redirect-http"] * tls
        kinds += ["unauthorized"] * (host == REGISTRY)
    if redirected:
        return [*kinds, "expired", "expired"]
    if what == "head":
        return [*kinds, "no-digest", "no-length"]
    kinds += ["short", "short-length", "no-length", "chunked", "encoding", "gzip", "flip", "extra"]
    if what == "manifest":
        return [*kinds, "no-digest"]
    kinds += ["reset", "close", "stall", "trickle"]
    return kinds if what == "config" else [*kinds, *sorted(_RANGES)]
