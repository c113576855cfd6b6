"""The registry that misbehaves on purpose: each fault does on the wire what it says."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import pytest

from tests.support.faulty import (
    ALWAYS,
    KINDS,
    METADATA_ADDRESS,
    Fault,
    FaultyRegistry,
    Where,
    describe,
    layer_sizes,
    parse_range,
    random_schedule,
)
from tests.support.images import OCI_MANIFEST, Layer, attestation, image, index, noise, sha256

# How long a client waits before it says that nothing comes, where that is what has to happen;
# elsewhere a busy machine may take its time.
QUIET = 0.25
PATIENT = 10.0


def made_of(*sizes: int):
    blobs = [noise(f"faulty-{n}", size) for n, size in enumerate(sizes)]
    return image([Layer(blob, sha256(blob), "application/x") for blob in blobs])


IMAGE = made_of(300_000, 50_000)
LAYERS = [one["digest"] for one in json.loads(IMAGE.data)["layers"]]
FIRST, SECOND = (IMAGE.blobs[digest] for digest in LAYERS)
CONFIG = json.loads(IMAGE.data)["config"]["digest"]
MANIFEST = "/v2/a/b/manifests/1"
BLOB = f"/v2/a/b/blobs/{LAYERS[0]}"


@dataclass
class Got:
    """What came: ``end`` is complete, closed, reset or quiet, or before an answer refused."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: str = ""
    after: float = 0.0

    @property
    def code(self) -> str:
        return json.loads(self.body)["errors"][0]["code"]


class Client:
    """One connection, by hand: what a library would make of it is not seen."""

    def __init__(self, host, *, authority=None, quiet: float = PATIENT) -> None:
        self._socket = socket.create_connection(("127.0.0.1", host.port), timeout=10)
        self._quiet = quiet
        if authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            authority.configure_trust(context)
            try:
                self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1")
            except OSError:
                self._socket.close()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, target: str, method: str = "GET", **headers: str) -> Got:
        lines = [f"{method} {target} HTTP/1.1", "Host: x", f"Accept: {OCI_MANIFEST}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        begun = time.monotonic()
        got = Got()
        data = b""
        try:
            self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
            self._socket.settimeout(self._quiet)
            while b"\r\n\r\n" not in data:
                data += self._more()
            head, _, data = data.partition(b"\r\n\r\n")
            got.after = time.monotonic() - begun
            first, *rest = head.decode().split("\r\n")
            got.status = int(first.split()[1])
            for line in rest:
                name, _, value = line.partition(": ")
                assert name.lower() not in got.headers, "twice"
                got.headers[name.lower()] = value
            if method == "HEAD":
                got.end = "complete"
                return got
            got.body = data
            self._body(got)
        except TimeoutError:
            got.end = "quiet"
        except (ConnectionResetError, BrokenPipeError):
            got.end = "reset"
        except EOFError:
            got.end = "closed"
        return got

    def _more(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise EOFError
        return data

    def _body(self, got: Got) -> None:
        if got.headers.get("transfer-encoding") == "chunked":
            raw, got.body = got.body, b""
            while True:
                while b"\r\n" not in raw:
                    raw += self._more()
                size, _, raw = raw.partition(b"\r\n")
                while len(raw) < int(size, 16) + 2:
                    raw += self._more()
                got.body += raw[: int(size, 16)]
                raw = raw[int(size, 16) + 2 :]
                if int(size, 16) == 0:
                    assert raw == b""
                    got.end = "complete"
                    return
        length = int(got.headers.get("content-length", 2**60))
        while len(got.body) < length:
            got.body += self._more()
        assert len(got.body) == length, "bytes after the end of the answer"
        got.end = "complete"


def ask(host, target: str, method: str = "GET", *, authority=None, quiet=PATIENT, **headers) -> Got:
    with Client(host, authority=authority, quiet=quiet) as client:
        return client.ask(target, method, **headers)


@pytest.fixture
def faulty():
    with FaultyRegistry() as registry:
        registry.add(IMAGE, "a/b", "1")
        yield registry
        registry.settle()


@pytest.fixture
def host(faulty):
    return faulty.hosts["registry"]


class TestBreaks:
    @pytest.mark.parametrize(("kind", "end"), [("reset", "reset"), ("close", "closed")])
    @pytest.mark.parametrize("offset", [0, 1, 70_000, 299_999])
    def test_at_a_byte(self, faulty, host, kind, end, offset):
        faulty.faults = [Fault(kind, Where("blob", 0), offset=offset)]
        got = ask(host, BLOB)
        assert (got.status, got.end) == (200, end)
        assert got.headers["content-length"] == "300000"
        assert got.body == FIRST[:offset]
        # Once only.
        again = ask(host, BLOB, Range=f"bytes={offset}-")
        assert (again.status, again.end, again.body) == (206, "complete", FIRST[offset:])
        faulty.settle()
        assert [request.sent for request in faulty.requests] == [offset, 300_000 - offset]
        assert faulty.served(LAYERS[0]) == 300_000
        assert faulty.served_again(LAYERS[0]) == 0

    def test_after_the_last_byte(self, faulty, host):
        faulty.faults = [Fault("reset", Where("blob", 0), offset=300_000)]
        with Client(host) as client:
            assert client.ask(BLOB).body == FIRST
            assert client.ask(BLOB).end == "reset"

    @pytest.mark.parametrize(
        ("kind", "end"), [("reset", "reset"), ("close", "closed"), ("stall", "quiet")]
    )
    def test_before_the_answer(self, faulty, host, kind, end):
        for fault, method in [
            (Fault(kind, Where("blob"), offset=None), "GET"),
            (Fault(kind, Where("head")), "HEAD"),
        ]:
            faulty.faults = [fault]
            got = ask(host, BLOB, method, quiet=QUIET if end == "quiet" else PATIENT)
            assert (got.status, got.end) == (0, end)
        faulty.settle()
        assert {request.status for request in faulty.requests} == {None}

    def test_the_offset_is_one_of_the_blob(self, faulty, host):
        faulty.faults = [Fault("close", Where("blob"), offset=1000, times=2)]
        got = ask(host, BLOB, Range="bytes=400-")
        assert got.body == FIRST[400:1000]
        got = ask(host, BLOB, Range="bytes=5000-")
        assert (got.status, got.body, got.end) == (206, b"", "closed")
        faulty.settle()
        assert faulty.ranges(LAYERS[0]) == [(400, 1000)]

    def test_a_stall_lasts_until_the_client_leaves(self, faulty, host):
        faulty.faults = [Fault("stall", Where("blob"), offset=100_000)]
        got = ask(host, BLOB, quiet=QUIET)
        assert (got.end, got.body) == ("quiet", FIRST[:100_000])
        faulty.settle()
        (request,) = faulty.requests
        assert (request.sent, request.left) == (100_000, True)
        assert request.end - request.arrival >= QUIET

    def test_a_stall_may_end(self, faulty, host):
        faulty.faults = [Fault("stall", Where("blob"), offset=100_000, seconds=0.05)]
        got = ask(host, BLOB)
        assert (got.end, got.body) == ("complete", FIRST)
        faulty.settle()
        assert faulty.requests[0].end - faulty.requests[0].arrival >= 0.05

    def test_a_trickle(self, faulty, host):
        faulty.faults = [Fault("trickle", Where("blob"), offset=299_997, seconds=0.02)]
        got = ask(host, BLOB)
        assert (got.end, got.body) == ("complete", FIRST)
        faulty.settle()
        assert faulty.requests[0].end - faulty.requests[0].arrival >= 0.04
        faulty.faults = [Fault("trickle", Where("blob"), offset=1000)]
        got = ask(host, BLOB, quiet=QUIET)
        assert (got.end, got.body) == ("quiet", FIRST[:1001])
        faulty.settle()
        assert faulty.requests[1].sent == 1001

    @pytest.mark.parametrize("offset", [0, 70_000])
    def test_short_and_clean(self, faulty, host, offset):
        faulty.faults = [
            Fault("short", Where("blob"), offset=offset),
            Fault("short-length", Where("blob"), offset=offset),
        ]
        with Client(host) as client:
            got = client.ask(BLOB)
            assert "content-length" not in got.headers
            assert (got.end, got.body) == ("complete", FIRST[:offset])
            got = client.ask(BLOB)
            assert got.headers["content-length"] == str(offset)
            assert (got.end, got.body) == ("complete", FIRST[:offset])
            assert client.ask(BLOB).body == FIRST

    def test_a_document_too(self, faulty, host):
        faulty.faults = [
            Fault("close", Where("manifest"), offset=10),
            Fault("close", Where("config"), offset=11),
        ]
        assert ask(host, MANIFEST).body == IMAGE.data[:10]
        assert ask(host, f"/v2/a/b/blobs/{CONFIG}").body == IMAGE.blobs[CONFIG][:11]


class TestAnswers:
    @pytest.mark.parametrize("status", [400, 403, 404, 405, 408, 418, 429, 500, 502, 503, 504])
    def test_a_status(self, faulty, host, status):
        faulty.faults = [Fault("status", Where("manifest"), status=status)]
        with Client(host) as client:
            got = client.ask(MANIFEST)
            assert (got.status, got.end) == (status, "complete")
            assert got.code
            assert "retry-after" not in got.headers
            assert client.ask(MANIFEST).body == IMAGE.data

    def test_retry_after(self, faulty, host):
        faulty.faults = [
            Fault("status", Where("any"), status=429, seconds=7),
            Fault("status", Where("any"), status=503, seconds=1.5, date=True),
        ]
        assert ask(host, MANIFEST).headers["retry-after"] == "7"
        before = time.time()
        date = ask(host, MANIFEST).headers["retry-after"]
        assert date.endswith(" GMT")
        until = parsedate_to_datetime(date)
        assert until.tzinfo == UTC
        # Not before what was said, and a second after it at most.
        earliest = datetime.fromtimestamp(before + 1.5, UTC)
        assert 0 <= (until - earliest).total_seconds() <= 1.5

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_head_alone_may_be_refused(self, faulty, host, method):
        faulty.faults = [Fault("status", Where("head"), status=405, times=ALWAYS)]
        for _ in range(3):
            got = ask(host, MANIFEST, method)
            assert got.status == (405 if method == "HEAD" else 200)

    def test_slow(self, faulty, host):
        faulty.faults = [Fault("slow", Where("manifest"), seconds=0.05)]
        got = ask(host, MANIFEST)
        assert got.status == 200
        assert got.after >= 0.05

    def test_silent(self, faulty, host):
        faulty.faults = [Fault("silent", Where("any"))]
        assert ask(host, MANIFEST, quiet=QUIET).end == "quiet"
        faulty.settle()
        (request,) = faulty.requests
        assert (request.status, request.left) == (None, True)

    def test_without_a_digest(self, faulty, host):
        faulty.faults = [Fault("no-digest", Where("head"))]
        assert "docker-content-digest" not in ask(host, MANIFEST, "HEAD").headers
        assert ask(host, MANIFEST, "HEAD").headers["docker-content-digest"] == IMAGE.digest

    def test_without_a_length(self, faulty, host):
        faulty.faults = [Fault("no-length"), Fault("chunked"), Fault("no-length", Where("head"))]
        got = ask(host, BLOB)
        assert got.headers["connection"] == "close"
        assert (got.body, got.end) == (FIRST, "closed")
        with Client(host) as client:
            got = client.ask(BLOB)
            assert (got.body, got.end) == (FIRST, "complete")
            assert "content-length" not in got.headers
            got = client.ask(MANIFEST, "HEAD")
            assert got.status == 200
            assert "content-length" not in got.headers

    def test_content_encoding(self, faulty, host):
        faulty.faults = [Fault("encoding", Where("blob")), Fault("gzip", Where("blob"))]
        got = ask(host, BLOB)
        assert got.headers["content-encoding"] == "gzip"
        assert got.body == FIRST
        got = ask(host, BLOB)
        assert got.headers["content-encoding"] == "gzip"
        assert got.headers["content-length"] == str(len(got.body))
        assert gzip.decompress(got.body) == FIRST

    def test_wrong_bytes(self, faulty, host):
        faulty.faults = [Fault("flip", Where("blob", 0), offset=1000)]
        assert ask(host, BLOB, Range="bytes=1001-").body == FIRST[1001:], "it is not in there"
        got = ask(host, BLOB, Range="bytes=900-")
        different = [n for n, byte in enumerate(got.body, 900) if byte != FIRST[n]]
        assert different == [1000]
        assert ask(host, BLOB).body == FIRST

    def test_extra_bytes(self, faulty, host):
        faulty.faults = [Fault("extra", Where("blob", 0), count=3)]
        got = ask(host, BLOB)
        assert got.headers["content-length"] == "300003"
        assert got.body[:-3] == FIRST
        faulty.settle()
        assert faulty.ranges(LAYERS[0]) == [(0, 300_000)]


class TestRanges:
    def test_ignored(self, faulty, host):
        faulty.faults = [Fault("ignore-range", Where("blob"))]
        assert ask(host, BLOB).body == FIRST, "waits for a request with a range"
        got = ask(host, BLOB, Range="bytes=1000-")
        assert (got.status, got.body) == (200, FIRST)
        assert "content-range" not in got.headers
        faulty.settle()
        assert faulty.ranges(LAYERS[0]) == [(0, 300_000)] * 2
        assert faulty.served_again(LAYERS[0]) == 300_000

    @pytest.mark.parametrize(
        ("offset", "asked", "begins"), [(0, 1000, 0), (5000, 1000, 5000), (1000, 1000, 999)]
    )
    def test_from_another_offset(self, faulty, host, offset, asked, begins):
        faulty.faults = [Fault("wrong-range", Where("blob"), offset=offset)]
        got = ask(host, BLOB, Range=f"bytes={asked}-")
        assert got.status == 206
        assert got.headers["content-range"] == f"bytes {begins}-299999/300000"
        assert got.body == FIRST[begins:]
        faulty.settle()
        assert faulty.ranges(LAYERS[0]) == [(begins, 300_000)]

    def test_refused(self, faulty, host):
        faulty.faults = [Fault("range-refused", Where("blob"))]
        got = ask(host, BLOB, Range="bytes=1000-")
        assert (got.status, got.body) == (416, b"")
        assert got.headers["content-range"] == "bytes */300000"

    @pytest.mark.parametrize(
        ("value", "part"),
        [
            (None, None),
            ("bytes=0-", (0, 100)),
            ("bytes=5-9", (5, 10)),
            ("bytes=99-", (99, 100)),
            ("bytes=5-1000", (5, 100)),
            ("bytes=-7", (93, 100)),
            ("bytes=-1000", (0, 100)),
            ("bytes= 5 - 9 ", (5, 10)),
            ("bytes=5-9,11-12", None),
            ("bytes=", None),
        ],
    )
    def test_forms(self, value, part):
        assert parse_range(value, 100) == part

    @pytest.mark.parametrize(
        "value", ["bytes=100-", "items=0-", "bytes=x-", "bytes=-", "bytes=9-5", "bytes=5", "x"]
    )
    def test_what_is_answered_with_416(self, value):
        with pytest.raises(ValueError, match="invalid range"):
            parse_range(value, 100)


class TestWhere:
    def test_the_nth_and_how_often(self, faulty, host):
        faulty.faults = [Fault("status", Where("manifest", nth=2), times=2)]
        statuses = [ask(host, MANIFEST).status for _ in range(5)]
        assert statuses == [200, 503, 503, 200, 200]
        assert faulty.fired == faulty.faults * 2
        assert [bool(request.fault) for request in faulty.requests] == [
            status == 503 for status in statuses
        ]

    def test_two_for_one_request_take_turns(self, faulty, host):
        faulty.faults = [Fault("status", status=500), Fault("status", status=502)]
        assert [ask(host, MANIFEST).status for _ in range(3)] == [500, 502, 200]

    def test_a_blob_by_its_number(self, faulty, host):
        faulty.faults = [Fault("status", Where("blob", 1), times=ALWAYS)]
        assert ask(host, BLOB).status == 200
        assert ask(host, f"/v2/a/b/blobs/{LAYERS[1]}").status == 503
        assert ask(host, f"/v2/a/b/blobs/{CONFIG}").status == 200

    def test_a_new_plan_begins_anew(self, faulty, host):
        plan = [Fault("status")]
        for _ in range(2):
            faulty.faults = plan
            assert [ask(host, MANIFEST).status for _ in range(2)] == [503, 200]

    def test_what_cannot_be(self):
        for wrong in (
            lambda: Fault("unheard-of"),
            lambda: Where("blobs"),
            lambda: Fault("tls", Where("blob")),
            lambda: Fault("flip", Where("connection")),
        ):
            with pytest.raises(AssertionError):
                wrong()


class TestConnections:
    @pytest.mark.parametrize(
        ("kind", "end"), [("reset", "reset"), ("close", "closed"), ("silent", "quiet")]
    )
    def test_plain(self, faulty, host, kind, end):
        faulty.faults = [Fault(kind, Where("connection", nth=2))]
        assert ask(host, MANIFEST).status == 200
        try:
            got = ask(host, MANIFEST, quiet=QUIET if end == "quiet" else PATIENT)
        except ConnectionResetError:  # as early as that
            got = Got(end="reset")
        assert (got.status, got.end) == (0, end)
        assert ask(host, MANIFEST).status == 200
        assert len(faulty.requests) == 2
        assert len(host.connections) == 3

    def test_tls_on_a_plain_port_and_the_reverse(self):
        with FaultyRegistry(mirrors=1, tls=["mirror1"]) as faulty:
            plain, secure = faulty.hosts.values()
            with pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
                ask(plain, MANIFEST, authority=faulty.authority)
            got = ask(plain, "/v2/")
            assert got.status == 200
            with Client(secure) as client:
                client._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert client._socket.recv(100).startswith(b"HTTP/1.0 400")
        assert len(faulty.requests) == 1

    def test_tls_that_fails(self):
        with FaultyRegistry(tls=True) as faulty:
            faulty.add(IMAGE, "a/b", "1")
            host = faulty.hosts["registry"]
            faulty.faults = [
                Fault("tls", Where("connection")),
                Fault("tls-certificate", Where("connection")),
                Fault("close", Where("connection")),
                Fault("reset", Where("connection")),
            ]
            with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
                ask(host, MANIFEST, authority=faulty.authority)
            with pytest.raises(ssl.SSLCertVerificationError):
                ask(host, MANIFEST, authority=faulty.authority)
            with pytest.raises(ssl.SSLEOFError):
                ask(host, MANIFEST, authority=faulty.authority)
            with pytest.raises(ConnectionResetError), Client(host) as client:
                client._more()
            got = ask(host, MANIFEST, authority=faulty.authority)
            assert (got.status, got.body) == (200, IMAGE.data)
            assert len(faulty.requests) == 1

    @pytest.mark.parametrize("kind", ["reset", "close"])
    def test_breaks_within_tls(self, kind):
        with FaultyRegistry(tls=True) as faulty:
            faulty.add(IMAGE, "a/b", "1")
            faulty.faults = [Fault(kind, Where("blob"), offset=100_000)]
            got = ask(faulty.hosts["registry"], BLOB, authority=faulty.authority)
            # Python's TLS may call a reset the end.
            assert got.end in ("closed", "reset")
            assert got.body == FIRST[:100_000]
            faulty.settle()
            assert faulty.ranges(LAYERS[0]) == [(0, 100_000)]

    def test_latency_and_bandwidth(self, faulty, host):
        host.latency = 0.03
        assert ask(host, MANIFEST).after >= 0.03
        host.latency = 0.0
        host.bandwidth = 500_000
        begun = time.monotonic()
        assert ask(host, f"/v2/a/b/blobs/{LAYERS[1]}").body == SECOND
        # Fifty parts a second; after the last one nobody waits.
        assert time.monotonic() - begun >= 0.07

    def test_a_client_that_leaves_in_the_middle(self, faulty, host):
        host.bandwidth = 1_000_000
        with Client(host) as client:
            client._socket.sendall(f"GET {BLOB} HTTP/1.1\r\n\r\n".encode())
            client._socket.recv(1000)
        faulty.settle()
        (request,) = faulty.requests
        assert request.left
        assert 0 < request.sent < 300_000


class TestHosts:
    @pytest.fixture
    def several(self):
        with FaultyRegistry(mirrors=("/v2", "/v2/cache"), content=True) as registry:
            registry.add(IMAGE, "a/b", "1")
            yield registry

    def test_mirrors_have_the_same(self, several):
        first, second = several.hosts["mirror1"], several.hosts["mirror2"]
        assert ask(first, f"{MANIFEST}?ns=r.example").body == IMAGE.data
        assert ask(first, BLOB).body == FIRST
        assert ask(second, f"/v2/cache/a/b/blobs/{LAYERS[0]}").body == FIRST
        assert ask(second, BLOB).status == 404
        assert second.api == f"http://{second.address}/v2/cache"
        several.settle()
        assert several.served(LAYERS[0], host="mirror1") == 300_000
        assert several.served_again(LAYERS[0]) == 300_000
        assert len(several.arrivals("mirror2")) == 2
        assert several.arrivals("mirror2") == sorted(several.arrivals("mirror2"))

    @pytest.mark.parametrize(("status", "code"), [(404, "MANIFEST_UNKNOWN"), (401, "UNAUTHORIZED")])
    def test_a_mirror_that_has_nothing_to_say(self, several, status, code):
        several.faults = [Fault("status", Where(host="mirror1"), status=status, times=ALWAYS)]
        got = ask(several.hosts["mirror1"], MANIFEST)
        assert (got.status, got.code) == (status, code)
        assert ("www-authenticate" in got.headers) == (status == 401)
        assert ask(several.hosts["registry"], MANIFEST).status == 200

    def test_blobs_come_from_the_content_network(self, several):
        registry, content = several.hosts["registry"], several.hosts["content"]
        got = ask(registry, BLOB)
        assert got.status == 307
        location = got.headers["location"]
        assert location.startswith(f"{content.url}/")
        target = location.removeprefix(content.url)
        got = ask(content, target, Range="bytes=1000-")
        assert (got.status, got.body) == (206, FIRST[1000:])
        several.settle()
        assert several.ranges(LAYERS[0]) == [(1000, 300_000)]
        assert ask(content, target + "0").status == 403, "the signature is looked at"
        assert ask(content, target.partition("?")[0]).status == 403
        assert ask(content, target, Authorization="Bearer x").status == 403
        several.faults = [Fault("reset", Where("blob", 0, "content"), offset=7)]
        assert ask(registry, BLOB).status == 307
        assert ask(content, target).body == FIRST[:7]

    def test_a_redirect_that_has_expired(self, several):
        registry, content = several.hosts["registry"], several.hosts["content"]
        several.faults = [Fault("expired", Where("blob"))]
        for status in (403, 200):
            target = ask(registry, BLOB).headers["location"].removeprefix(content.url)
            assert ask(content, target).status == status
        several.signed_for = 0.0
        target = ask(registry, BLOB).headers["location"].removeprefix(content.url)
        assert ask(content, target).status == 403

    def test_a_loop(self, faulty, host):
        faulty.faults = [Fault("redirect-loop", times=2)]
        with Client(host) as client:
            for _ in range(2):
                got = client.ask(BLOB)
                assert (got.status, got.headers["location"]) == (307, BLOB)
            assert client.ask(BLOB).body == FIRST

    def test_to_a_private_address(self, faulty, host):
        faulty.faults = [
            Fault("redirect-private"),
            Fault("redirect-private", location="http://10.0.0.1/x"),
        ]
        assert METADATA_ADDRESS in ask(host, BLOB).headers["location"]
        assert ask(host, BLOB).headers["location"] == "http://10.0.0.1/x"

    def test_to_plain_http(self):
        with FaultyRegistry(tls=True) as faulty:
            faulty.add(IMAGE, "a/b", "1")
            host = faulty.hosts["registry"]
            faulty.faults = [Fault("redirect-http")]
            got = ask(host, BLOB, authority=faulty.authority)
            assert got.headers["location"] == f"http://{host.address}{BLOB}"


class TestTokens:
    @pytest.fixture
    def guarded(self):
        with FaultyRegistry(tokens=True) as registry:
            registry.add(IMAGE, "a/b", "1")
            registry.add(IMAGE, "c", "1")
            yield registry

    def token(self, registry, query="scope=repository:a/b:pull", **headers) -> str:
        got = ask(registry.hosts["token"], f"/token?{query}", **headers)
        assert got.status == 200, got
        return json.loads(got.body)["token"]

    def test_in_with_one_for_the_repository(self, guarded):
        registry = guarded.hosts["registry"]
        got = ask(registry, MANIFEST)
        assert (got.status, got.code) == (401, "UNAUTHORIZED")
        realm = f"{guarded.hosts['token'].url}/token"
        assert got.headers["www-authenticate"] == (
            f'Bearer realm="{realm}",service="faulty",scope="repository:a/b:pull"'
        )
        token = self.token(guarded)
        assert ask(registry, MANIFEST, Authorization=f"Bearer {token}").status == 200
        assert ask(registry, "/v2/c/manifests/1", Authorization=f"Bearer {token}").status == 401
        assert ask(registry, "/v2/", Authorization=f"Bearer {token}").status == 200
        assert ask(registry, MANIFEST, Authorization="Bearer x").status == 401

    def test_it_expires(self, guarded):
        guarded.token_lifetime = 0.0
        token = self.token(guarded)
        registry = guarded.hosts["registry"]
        assert ask(registry, MANIFEST, Authorization=f"Bearer {token}").status == 401

    def test_it_expires_in_the_middle(self, guarded):
        registry = guarded.hosts["registry"]
        guarded.faults = [Fault("unauthorized", Where("blob", nth=2))]
        token = self.token(guarded)
        statuses = [ask(registry, BLOB, Authorization=f"Bearer {token}").status for _ in range(3)]
        assert statuses == [200, 401, 401]
        token = self.token(guarded)
        assert ask(registry, BLOB, Authorization=f"Bearer {token}").status == 200

    def test_a_request_without_a_token_is_nobodys_turn(self, guarded):
        registry = guarded.hosts["registry"]
        guarded.faults = [Fault("status", Where("manifest"))]
        assert ask(registry, MANIFEST).status == 401
        token = self.token(guarded)
        assert ask(registry, MANIFEST, Authorization=f"Bearer {token}").status == 503

    def test_a_token_server_that_fails_or_is_slow(self, guarded):
        host = guarded.hosts["token"]
        guarded.faults = [
            Fault("status", Where("token"), status=500),
            Fault("slow", Where("token"), seconds=0.05),
        ]
        assert ask(host, "/token").status == 500
        assert ask(host, "/token").after >= 0.05

    def test_a_login(self):
        with FaultyRegistry(tokens=True, login=("alice", "pw")) as guarded:
            assert ask(guarded.hosts["token"], "/token").status == 401
            assert self.token(guarded, Authorization="Basic YWxpY2U6cHc=")


class TestRecord:
    def test_what_is_noted(self, faulty, host):
        before = time.monotonic()
        with Client(host) as client:
            client.ask(MANIFEST, "HEAD")
            client.ask(MANIFEST)
            client.ask(f"{BLOB}?x=y", Range="bytes=299000-")
            client.ask("/v2/")
            client.ask("/v2/none/manifests/1")
        faulty.settle()
        head, manifest, blob, ping, none = faulty.requests
        assert [r.what for r in faulty.requests] == ["head", "manifest", "blob", "ping", "manifest"]
        assert (head.method, head.sent, head.status) == ("HEAD", 0, 200)
        assert (manifest.path, manifest.sent) == (MANIFEST, len(IMAGE.data))
        assert (blob.path, blob.target, blob.digest) == (BLOB, f"{BLOB}?x=y", LAYERS[0])
        assert (blob.range, blob.offset, blob.sent) == ("bytes=299000-", 299_000, 1000)
        assert (ping.host, none.status) == ("registry", 404)
        assert len({r.connection for r in faulty.requests}) == 1
        for request in faulty.requests:
            assert before <= request.arrival <= request.end <= time.monotonic()
        assert faulty.seen("GET .*/blobs/") == [blob]
        assert faulty.seen(what="manifest") == [manifest, none]
        assert faulty.seen(host="mirror1") == []

    def test_bytes_served_again(self, faulty, host):
        for part in ("0-99", "50-149", "200-299", "0-399"):
            ask(host, BLOB, Range=f"bytes={part}")
        faulty.settle()
        assert faulty.ranges(LAYERS[0]) == [(0, 100), (50, 150), (200, 300), (0, 400)]
        assert faulty.served(LAYERS[0]) == 700
        assert faulty.served_again(LAYERS[0]) == 300

    def test_nothing_is_left(self):
        threads = threading.active_count()
        with FaultyRegistry(mirrors=1, tls=["mirror1"]) as faulty:
            faulty.add(IMAGE, "a/b", "1")
            faulty.faults = [Fault("stall", Where("blob")), Fault("silent", Where("connection"))]
            registry, mirror = faulty.hosts.values()
            silent = Client(registry)
            clients = [
                Client(registry, quiet=QUIET),
                Client(mirror, authority=faulty.authority, quiet=QUIET),
            ]
            for client in clients:
                client.ask(MANIFEST)
                client.ask(BLOB)
        assert threading.active_count() == threads
        assert all(request.end is not None for request in faulty.requests)
        for client in [silent, *clients]:
            with client:
                client._socket.settimeout(5)
                with pytest.raises((EOFError, OSError)):
                    client._more()
        with pytest.raises(ConnectionRefusedError):
            Client(registry)

    def test_its_own_failure_is_told(self):
        faulty = FaultyRegistry()
        with pytest.raises(AssertionError, match="itself failed"), faulty:
            client = Client(faulty.hosts["registry"])
            with client, pytest.raises((EOFError, OSError)):
                client._socket.sendall(b"nonsense\r\n\r\n")
                client._more()

    async def test_for_clients_in_the_same_loop_and_in_other_processes(self, faulty, host):
        reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
        writer.write(f"GET {BLOB} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        data = await reader.read()
        assert data.endswith(FIRST)
        writer.close()
        await writer.wait_closed()
        code = f"import urllib.request as u; u.urlopen('{host.url}{BLOB}').read()"
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=True)
        faulty.settle()
        assert faulty.served(LAYERS[0]) == 600_000


class TestSchedules:
    def test_the_same_for_the_same_seed(self):
        for seed in range(50):
            more = {"hosts": ("registry", "mirror1", "content", "token"), "tls": seed % 2 == 0}
            assert random_schedule(seed, IMAGE, **more) == random_schedule(seed, IMAGE, **more)
        assert len({repr(random_schedule(seed, IMAGE)) for seed in range(50)}) > 45

    def test_a_plan_can_be_read_and_pasted(self):
        scope = {"Fault": Fault, "Where": Where}
        for seed in range(300):
            plan = random_schedule(seed, IMAGE, hosts=("registry", "mirror1", "token"), tls=True)
            assert eval(repr(plan), scope) == plan
            assert len(describe(plan).splitlines()) == len(plan)
        assert repr(Fault("reset", Where("blob", 1), offset=5)) == (
            "Fault('reset', Where('blob', 1), offset=5)"
        )
        fault = Fault("status", Where("manifest", host="mirror1", nth=2), status=429, seconds=3)
        assert str(fault) == "manifest at mirror1, no. 2: answers 429 with Retry-After of 3 s"
        fault = Fault("stall", Where("blob", 0), offset=7, times=ALWAYS)
        assert str(fault) == "blob 0 at any host: nothing more comes at byte 7, always"

    def test_it_fits_the_image_and_the_hosts(self):
        hosts = ("registry", "mirror1", "content", "token")
        kinds = set()
        for seed in range(2000):
            for tls in (False, True):
                plan = random_schedule(seed, IMAGE, hosts=hosts, tls=tls)
                assert 1 <= len(plan) <= 5
                for fault in plan:
                    kinds.add(fault.kind)
                    assert fault.where.host in hosts
                    assert fault.times != ALWAYS or fault.where.host == "mirror1"
                    assert tls or not fault.kind.startswith("tls")
                    if fault.where.what == "blob":
                        size = (300_000, 50_000)[fault.where.number]
                        assert fault.offset is None or 0 <= fault.offset <= size
        assert kinds == set(KINDS)

    def test_how_many(self):
        assert {len(random_schedule(seed, IMAGE, faults=(2, 3))) for seed in range(50)} == {2, 3}

    def test_images_of_other_shapes(self):
        empty = image([])
        both = index([(IMAGE, IMAGE.descriptor("linux/amd64")), attestation(IMAGE)], docker=False)
        assert layer_sizes(both) == layer_sizes(IMAGE) == [300_000, 50_000]
        assert layer_sizes(empty) == []
        for seed in range(300):
            random_schedule(seed, empty)
            random_schedule(seed, made_of(0))

    def test_any_plan_is_carried_out(self):
        """Whatever is asked under whatever plan, the registry itself does not fail."""
        with FaultyRegistry(content=True, tokens=True, mirrors=1) as faulty:
            faulty.add(IMAGE, "a/b", "1")
            for seed in range(25):
                faulty.faults = random_schedule(seed, IMAGE, hosts=tuple(faulty.hosts))
                for target in ("/v2/", MANIFEST, BLOB):
                    for host in faulty.hosts.values():
                        try:
                            ask(host, target, quiet=0.01, Range="bytes=100-")
                        except ConnectionError:
                            continue
            faulty.settle()
