"""The registry client against a registry that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import ssl
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import trustme

from serpentine.errors import (
    AuthenticationError,
    DigestMismatch,
    DocumentTooLarge,
    InvalidSetting,
    RateLimited,
    RegistryError,
    RegistryNotFound,
    RegistryProtocolError,
    RegistryUnreachable,
    SizeMismatch,
    TransferError,
)
from serpentine.events import Retrying
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.registry import Credential, CredentialStore, RegistryClient
from serpentine.registry import source as source_module
from tests.support.fake_proxy import TunnelProxy
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.faulty import ALWAYS, Fault, FaultyRegistry, Where
from tests.support.images import OCI_MANIFEST, file, image, layer, noise

DATA = noise("blob", 700_000)
MADE = image([layer([file("a", noise("client", 100_000))])])


class Store(CredentialStore):
    """Knows one credential for every host."""

    def __init__(self, credential: Credential | None = None) -> None:
        super().__init__([], {})
        self.credential = credential

    async def find(self, registry, repository):
        return self.credential


@pytest.fixture
def fake():
    with FakeRegistry() as registry:
        registry.add("a/b", "1", MADE)
        registry.blobs[str(Digest.of(DATA))] = DATA
        yield registry


@pytest.fixture
def other():
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def waits(monkeypatch):
    """Record the waits between tries instead of waiting."""
    recorded = []

    class Asyncio:
        @staticmethod
        async def sleep(seconds: float) -> None:
            recorded.append(seconds)

    monkeypatch.setattr(source_module, "asyncio", Asyncio)
    return recorded


@pytest.fixture
async def client():
    async with RegistryClient(credentials=Store(Credential("u", "s3cr3t", source="f"))) as made:
        yield made


def repo(client, fake, reference="a/b:1", **more):
    return client.repository(Reference.parse(f"{fake.address}/{reference}"), **more)


def blob(data: bytes = DATA, size: int | None = None, **more) -> Descriptor:
    return Descriptor(
        media_type="x", digest=Digest.of(data), size=len(data) if size is None else size, **more
    )


async def read(repository, descriptor, offset=0) -> bytes:
    parts = []
    async with repository.open_blob(descriptor, offset=offset) as body:
        async for chunk in body:
            parts.append(chunk)
        assert body.offset == descriptor.size
    return b"".join(parts)


def told(error) -> str:
    """Return all that an error shows to anybody."""
    return f"{error} {error!r} {error.hint} {getattr(error, 'host', '')}"


class TestResolve:
    async def test_one_head(self, client, fake):
        resolved = await repo(client, fake).resolve()
        assert str(resolved.descriptor.digest) == MADE.digest
        assert resolved.descriptor.media_type == OCI_MANIFEST
        assert resolved.body is None
        assert [s.method for s in fake.seen] == ["HEAD"]
        accepted = fake.seen[0].headers["accept"]
        for kind in ("manifest.v1+json", "index.v1+json", "manifest.v2+json", "list.v2+json"):
            assert kind in accepted
        # Schema 1 is taken, last of all, so that it can be told apart (and refused) here.
        assert "application/vnd.docker.distribution.manifest.v1+prettyjws;q=0.1" in accepted

    @pytest.mark.parametrize("status", [400, 403, 405, 501])
    async def test_head_refused(self, client, fake, status):
        """Trap 36."""
        fake.on("HEAD", Answer(status))
        resolved = await repo(client, fake).resolve()
        assert str(resolved.descriptor.digest) == MADE.digest
        assert resolved.body == MADE.data
        assert [s.method for s in fake.seen] == ["HEAD", "GET"]

    @pytest.mark.parametrize("headers", [{}, {"Docker-Content-Digest": ""}])
    async def test_head_without_a_digest(self, client, fake, headers):
        fake.on("HEAD", Answer(headers={"Content-Type": OCI_MANIFEST, **headers}, body=MADE.data))
        fake.on("GET .*manifests", Answer(headers={"Content-Type": OCI_MANIFEST}, body=MADE.data))
        resolved = await repo(client, fake).resolve()
        assert str(resolved.descriptor.digest) == MADE.digest
        assert resolved.body == MADE.data

    async def test_head_without_a_length(self, client, fake):
        fake.on("HEAD", Answer(headers={"Docker-Content-Digest": MADE.digest}, length=-1))
        assert (await repo(client, fake).resolve()).body == MADE.data

    async def test_a_lying_digest_header_on_get(self, client, fake):
        fake.on("HEAD", Answer(405))
        wrong = str(Digest.of(b"other"))
        fake.on("GET", Answer(body=MADE.data, headers={"Docker-Content-Digest": wrong}))
        with pytest.raises(DigestMismatch):
            await repo(client, fake).resolve()

    async def test_a_digest_header_that_is_none(self, client, fake):
        fake.on("HEAD", Answer(headers={"Docker-Content-Digest": "sha256:xyz"}))
        with pytest.raises(RegistryProtocolError, match="xyz"):
            await repo(client, fake).resolve()

    async def test_a_reference_by_digest_is_held_to_it(self, client, fake):
        other = Digest.of(b"other")
        reference = f"a/b@{other}"
        fake.on("HEAD", Answer(headers={"Docker-Content-Digest": MADE.digest}, body=b"x"))
        with pytest.raises(DigestMismatch):
            await repo(client, fake, reference).resolve()
        fake.on("HEAD", Answer(405))
        fake.on("GET", Answer(body=MADE.data))
        with pytest.raises(DigestMismatch):
            await repo(client, fake, reference).resolve()

    @pytest.mark.parametrize(
        ("code", "says"),
        [("NAME_UNKNOWN", "no repository a/b"), ("MANIFEST_UNKNOWN", "no tag 1 in a/b")],
    )
    async def test_what_is_not_there(self, client, fake, code, says):
        fake.on("HEAD", Answer(405))
        fake.on("GET", Answer(404, json.dumps({"errors": [{"code": code}]}).encode()))
        with pytest.raises(RegistryNotFound, match=says):
            await repo(client, fake).resolve()

    async def test_a_body_over_the_cap_where_head_tells_nothing(self, client, fake):
        fake.on("HEAD", Answer(405))
        fake.on("GET", Answer(body=bytes(5_000_000), length=-1))
        with pytest.raises(DocumentTooLarge):
            await repo(client, fake).resolve()

    async def test_a_document_over_the_cap(self, client, fake):
        headers = {"Docker-Content-Digest": MADE.digest}
        fake.on("HEAD", Answer(headers=headers, length=5_000_000))
        with pytest.raises(DocumentTooLarge):
            await repo(client, fake).resolve()
        assert not fake.requests("GET")


class TestDocuments:
    async def test_verified(self, client, fake):
        descriptor = blob(MADE.data)
        assert await repo(client, fake).fetch_document(descriptor, "manifests") == MADE.data

    async def test_another_digest(self, client, fake):
        fake.on("GET", Answer(body=bytes(len(MADE.data))))
        with pytest.raises(DigestMismatch, match=fake.address):
            await repo(client, fake).fetch_document(blob(MADE.data), "manifests")

    @pytest.mark.parametrize("body", [MADE.data[:-1], MADE.data + b" "])
    async def test_another_size(self, client, fake, body):
        fake.on("GET", Answer(body=body))
        with pytest.raises(SizeMismatch):
            await repo(client, fake).fetch_document(blob(MADE.data), "manifests")

    async def test_too_large_before_and_while_reading(self, client, fake):
        with pytest.raises(DocumentTooLarge):
            await repo(client, fake).fetch_document(blob(size=2**40), "blobs")
        assert fake.seen == []
        fake.on("GET", Answer(body=bytes(5_000_000), length=-1))
        with pytest.raises(DocumentTooLarge):
            await repo(client, fake).fetch_document(blob(size=10), "blobs")


class TestBlobs:
    async def test_whole_and_from_an_offset(self, client, fake):
        repository = repo(client, fake)
        assert await read(repository, blob()) == DATA
        assert await read(repository, blob(), 1000) == DATA[1000:]
        assert fake.seen[-1].headers["range"] == "bytes=1000-"
        assert await read(repository, blob(), len(DATA)) == b""

    async def test_a_range_that_is_ignored(self, client, fake):
        fake.on("GET", Answer(body=DATA))
        assert await read(repo(client, fake), blob(), 600_001) == DATA[600_001:]

    @pytest.mark.parametrize(
        "header", ["", "bytes 0-699999/700000", "bytes 1001-699999/700000", "items 1000-1/2"]
    )
    async def test_a_range_from_elsewhere(self, client, fake, header):
        fake.on("GET", Answer(206, DATA[1000:], {"Content-Range": header} if header else {}))
        with pytest.raises(TransferError, match="continues somewhere else"):
            await read(repo(client, fake), blob(), 1000)

    async def test_begins_again_where_it_should_continue(self, client, fake):
        fake.on("GET", Answer(body=DATA))
        async with repo(client, fake).open_blob(blob(), offset=600_001, most_skipped=600_001) as b:
            assert b"".join([chunk async for chunk in b]) == DATA[600_001:]
        with pytest.raises(TransferError, match="does not continue at byte 600001"):
            async with repo(client, fake).open_blob(blob(), offset=600_001, most_skipped=9) as b:
                [chunk async for chunk in b]

    async def test_a_range_of_unknown_total(self, client, fake):
        fake.on("GET", Answer(206, DATA[1000:], {"Content-Range": "bytes 1000-699999/*"}))
        assert await read(repo(client, fake), blob(), 1000) == DATA[1000:]

    async def test_a_range_refused_in_the_middle(self, client, fake):
        fake.on("GET", Answer(416))
        with pytest.raises(TransferError, match="refuses to continue"):
            await read(repo(client, fake), blob(), 1000)

    async def test_no_content_length(self, client, fake):
        """Trap 40."""
        fake.on("GET", Answer(body=DATA, length=-1))
        assert await read(repo(client, fake), blob()) == DATA

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(body=DATA[:1000]),
            Answer(body=DATA[:1000], length=-1),
            Answer(body=DATA, break_after=1000),
        ],
        ids=["short", "short and clean", "broken off"],
    )
    async def test_a_body_that_ends_early(self, client, fake, answer):
        fake.on("GET", answer)
        got = b""
        with pytest.raises(TransferError, match=fake.address):
            async with repo(client, fake).open_blob(blob()) as body:
                async for chunk in body:
                    got += chunk
        assert DATA.startswith(got)

    @pytest.mark.parametrize("length", [None, -1])
    async def test_a_body_that_goes_on(self, client, fake, length):
        fake.on("GET", Answer(body=DATA + b"x", length=length))
        with pytest.raises(SizeMismatch, match="longer than the 700000 bytes"):
            await read(repo(client, fake), blob())

    async def test_bytes_are_never_decoded(self, client, fake):
        """Trap 39: a layer that is sent with Content-Encoding is still the layer."""
        packed = gzip.compress(DATA)
        fake.on("GET", Answer(body=packed, headers={"Content-Encoding": "gzip"}))
        assert await read(repo(client, fake), blob(packed)) == packed
        assert fake.seen[-1].headers["accept-encoding"] == "identity"

    async def test_a_foreign_layer(self, client, fake):
        """Trap 43: from its own place, over TLS only."""
        fake.blobs.clear()
        with pytest.raises(RegistryNotFound):
            await read(repo(client, fake), blob(urls=["http://127.0.0.1:9/x"]))
        with pytest.raises(RegistryUnreachable):
            await read(repo(client, fake), blob(urls=["https://127.0.0.1:9/x"]))

    @pytest.fixture
    def elsewhere(self, client):
        """A host with foreign layers, whose certificate the client trusts."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(client.transport._verified)
        with FakeRegistry(tls=context) as host:
            yield host

    async def test_a_foreign_layer_comes_without_our_credentials(self, client, fake, elsewhere):
        challenge = Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        fake.on(".", lambda s: None if "authorization" in s.headers else challenge)
        fake.blobs.clear()
        digest = str(Digest.of(DATA))
        elsewhere.blobs[digest] = DATA
        foreign = blob(urls=[f"{elsewhere.url}/x/blobs/{digest}"])
        assert await read(repo(client, fake), foreign) == DATA
        assert await read(repo(client, fake), foreign, 1000) == DATA[1000:]
        assert await read(repo(client, fake), foreign, len(DATA)) == b""
        assert "authorization" in fake.seen[-1].headers
        assert not any("authorization" in seen.headers for seen in elsewhere.seen)

    @pytest.mark.parametrize(
        "url", ["https://127.0.0.1:9/x?s3cr3t", "https://[/s3cr3t", "https://"]
    )
    async def test_a_foreign_layer_that_cannot_be_had_names_the_image(self, client, fake, url):
        fake.blobs.clear()
        with pytest.raises(RegistryError, match=rf"{fake.address}/a/b:1: ") as caught:
            await read(repo(client, fake), blob(urls=[url]))
        assert "s3cr3t" not in told(caught.value)

    async def test_an_error_of_the_reader_is_not_the_registrys(self, client, fake):
        """Least of all one that would have us look elsewhere."""
        mine = RegistryNotFound("mine", image="x")
        with pytest.raises(RegistryNotFound) as caught:
            async with repo(client, fake).open_blob(blob(urls=["https://127.0.0.1:9/x"])):
                raise mine
        assert caught.value is mine

    async def test_a_range_with_numbers_beyond_reason(self, client, fake):
        fake.on("GET", Answer(206, DATA, {"Content-Range": f"bytes {'9' * 5000}-1/2"}))
        with pytest.raises(TransferError, match="continues somewhere else"):
            await read(repo(client, fake), blob(), 1000)

    async def test_a_chunk_that_is_cut(self, client, fake):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        fake.on("GET", Answer(raw=head + b"5\r\nab"))
        with pytest.raises(TransferError, match=r"not completed$"):
            await read(repo(client, fake), blob())

    async def test_a_range_past_the_descriptors_end(self, client, fake):
        fake.on("GET", Answer(206, DATA[1000:], {"Content-Range": "bytes 1000-700000/700001"}))
        with pytest.raises(SizeMismatch):
            await read(repo(client, fake), blob(), 1000)


class TestRedirects:
    async def test_to_another_host_without_authorization_with_range(self, client, fake, other):
        """Trap 36."""
        other.blobs = fake.blobs
        fake.on(
            "GET .*blobs",
            lambda s: Answer(307, headers={"Location": f"{other.url}{s.path}?signed=s3cr3t-sig"}),
        )
        fake.on(
            ".",
            lambda s: (
                None
                if "authorization" in s.headers
                else Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            ),
        )
        assert await read(repo(client, fake), blob(), 1000) == DATA[1000:]
        (seen,) = other.seen
        assert "authorization" not in seen.headers
        assert seen.headers["range"] == "bytes=1000-"
        assert fake.seen[-1].headers["authorization"].startswith("Basic")

    async def test_a_challenge_costs_no_second_connection(self, client, fake):
        challenge = Answer(401, b"log in" * 50, {"WWW-Authenticate": 'Basic realm="x"'})
        fake.on(".", lambda s: None if "authorization" in s.headers else challenge)
        await repo(client, fake).fetch_document(blob(MADE.data), "manifests")
        assert [bool(s.headers.get("authorization")) for s in fake.seen] == [False, True]
        assert len({s.client for s in fake.seen}) == 1

    async def test_on_the_same_host_with_authorization(self, client, fake):
        path = f"/elsewhere/blobs/{Digest.of(DATA)}"
        fake.on("GET /v2", Answer(302, headers={"Location": path}))
        challenge = Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        fake.on(".", lambda s: None if "authorization" in s.headers else challenge)
        assert await read(repo(client, fake), blob()) == DATA
        assert "authorization" in fake.seen[-1].headers

    async def test_a_refusal_over_there_is_no_reason_to_log_in(self, client, fake, other):
        fake.on("GET", Answer(307, headers={"Location": f"{other.url}/x?sig=s3cr3t-sig"}))
        other.on(".", Answer(401, headers={"WWW-Authenticate": 'Basic realm="evil"'}))
        with pytest.raises(AuthenticationError) as caught:
            await read(repo(client, fake), blob())
        # The way there is good for a while only: each try asks the registry for it anew.
        assert len(other.seen) == len(fake.seen) == 4
        assert all("authorization" not in request.headers for request in other.seen)
        assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"

    async def test_a_loop_ends(self, client, fake):
        fake.on("GET", lambda s: Answer(302, headers={"Location": s.path}))
        with pytest.raises(RegistryProtocolError, match="more than 10 times"):
            await read(repo(client, fake), blob())
        assert len(fake.seen) < 15

    @pytest.mark.parametrize(
        "location",
        [
            "ftp://x/y",
            "javascript:x",
            "https://[x/?sig=s3cr3t",
            "http://u:s3cr3t@127.0.0.1:99999/?sig=s3cr3t",
            "http://127.0.0.1:abc/?sig=s3cr3t",
            "http://a b/?sig=s3cr3t",
            "http://\u00e9..x/?sig=s3cr3t",
        ],
    )
    async def test_to_nowhere(self, client, fake, location):
        fake.on("GET", Answer(302, headers={"Location": location}))
        with pytest.raises(RegistryProtocolError, match="redirects to nowhere") as caught:
            await read(repo(client, fake), blob())
        assert "s3cr3t" not in told(caught.value)

    async def test_without_a_location(self, client, fake):
        fake.on("GET", Answer(302))
        with pytest.raises(RegistryProtocolError, match="redirects to nowhere"):
            await read(repo(client, fake), blob())
        assert len(fake.seen) == 1, "not to itself, again and again"

    @pytest.mark.parametrize(
        "raw",
        [
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        ],
        ids=["ssh", "long header", "no number", "big number"],
    )
    async def test_a_signature_is_in_no_error(self, client, fake, other, raw):
        """aiohttp's own texts hold the whole URL."""
        fake.on("GET", Answer(307, headers={"Location": f"{other.url}/x?sig=s3cr3t"}))
        other.on(".", Answer(raw=raw))
        with pytest.raises(RegistryProtocolError, match="no valid HTTP: ") as caught:
            await read(repo(client, fake), blob())
        assert other.seen[0].path == "/x?sig=s3cr3t"
        assert "s3cr3t" not in told(caught.value)
        assert len(str(caught.value)) < 200

    async def test_there_and_back_does_not_bring_authorization_back_by_itself(
        self, client, fake, other
    ):
        """What another host made of our request is not signed by us."""
        challenge = Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        fake.on("GET /v2", lambda s: None if "authorization" in s.headers else challenge)
        await repo(client, fake).fetch_document(blob(MADE.data), "manifests")
        fake.on("GET .*blobs", Answer(307, headers={"Location": f"{other.url}/there"}))
        other.on("GET /there", Answer(307, headers={"Location": f"{fake.url}/back"}))
        with pytest.raises(RegistryNotFound):
            await read(repo(client, fake), blob())
        (back,) = fake.requests("/back")
        assert "authorization" not in back.headers


class TestRetries:
    async def test_what_passes_is_tried_again(self, client, fake, waits):
        for status in (500, 502, 503, 504, 408, 429):
            answers = [Answer(status)]
            fake.on("HEAD", lambda _, a=answers: a.pop() if a else None)
            events = []
            await repo(client, fake, on_event=events.append).resolve()
            assert [type(event) for event in events] == [Retrying]
        assert len(waits) == 6

    async def test_what_stays_ends(self, client, fake, waits):
        fake.on("HEAD", Answer(503))
        with pytest.raises(RegistryUnreachable, match="503"):
            await repo(client, fake).resolve()
        assert len(fake.seen) == 4
        assert len(waits) == 3
        assert waits == sorted(waits)

    async def test_retry_after_is_obeyed(self, client, fake, waits):
        answers = [Answer(429, headers={"Retry-After": "7"})]
        fake.on("HEAD", lambda _: answers.pop() if answers else None)
        await repo(client, fake).resolve()
        assert 7 <= waits[0] <= 8

    async def test_too_long_a_retry_after_is_told(self, client, fake, waits):
        fake.on("HEAD", Answer(429, headers={"Retry-After": "3600"}))
        with pytest.raises(RateLimited) as caught:
            await repo(client, fake).resolve()
        assert caught.value.retry_after == 3600
        assert "3600" in caught.value.hint
        assert (len(fake.seen), waits) == (1, [])

    async def test_a_document_that_breaks_off(self, client, fake, monkeypatch):
        monkeypatch.setattr("serpentine.registry.client.BODY_DELAYS", (0.0, 0.0))
        broken = [Answer(length=100_000, break_after=0)] * 2
        fake.on("GET", lambda _: broken.pop() if broken else None)
        repository = repo(client, fake)
        assert await repository.fetch_document(blob(MADE.data), "manifests") == MADE.data
        assert not broken
        fake.on("GET", Answer(length=100_000, break_after=0))
        with pytest.raises(TransferError, match=fake.address):
            await repository.fetch_document(blob(MADE.data), "manifests")

    async def test_a_host_that_was_silent_gets_more_time(self, waits):
        """A connection that died is given up soon; who is slow to answer is heard in the end."""
        silent = Fault("silent", Where("head"), times=3)
        with FaultyRegistry(faults=[silent]) as registry:
            reference = Reference.parse(registry.add(MADE, "a/b", "1"))
            async with RegistryClient(credentials=Store(), read_timeout=0.8) as client:
                await client.repository(reference).resolve()
            asked = [one.arrival for one in registry.requests if one.what == "head"]
        between = [later - before for before, later in pairwise(asked)]
        for measured, least in zip(between, (0.2, 0.4, 0.8), strict=True):
            assert least <= measured < least + 0.2

    async def test_waiting_for_a_host_that_asked_for_it_is_told(self, client, fake):
        await asyncio.to_thread(client.transport.memory.close, fake.address, 1.2)
        events = []
        began = time.monotonic()
        await repo(client, fake, on_event=events.append).resolve()
        assert time.monotonic() - began >= 1.2
        [told] = events
        assert told.text == f"waiting 1 seconds for {fake.address}, which asked for it"

    async def test_one_whose_wait_is_over_can_be_asked(self, fake, tmp_path):
        """The hint names what keeps us from it."""
        async with RegistryClient(credentials=Store(), memory=tmp_path / "m") as client:
            await asyncio.to_thread(client.transport.memory.close, fake.address, 7200)
            with pytest.raises(RateLimited, match="wait for 7200 seconds") as caught:
                await repo(client, fake).resolve()
            Path(caught.value.hint.rpartition(" ")[2]).unlink()
            await repo(client, fake).resolve()

    async def test_a_document_that_comes_too_slowly(self, monkeypatch):
        """One byte a second comes in time, each; all of them never."""
        monkeypatch.setattr("serpentine.registry.client.BODY_DELAYS", ())
        trickle = Fault("trickle", Where("config"), seconds=0.05, times=ALWAYS)
        with FaultyRegistry(faults=[trickle]) as registry:
            reference = registry.add(MADE, "a/b", "1")
            store = Store(Credential("u", "s3cr3t", source="f"))
            async with RegistryClient(credentials=store, read_timeout=0.4) as client:
                repository = client.repository(Reference.parse(reference))
                digest = json.loads(MADE.data)["config"]["digest"]
                config = blob(MADE.blobs[digest])
                began = time.monotonic()
                with pytest.raises(TransferError, match="bytes a second"):
                    await repository.fetch_document(config, "blobs")
                assert time.monotonic() - began < 5

    @pytest.mark.parametrize(
        "broken", [Answer(raw=b""), Answer(reset=True)], ids=["closed", "reset"]
    )
    async def test_a_connection_that_breaks_before_the_answer(self, client, fake, waits, broken):
        repository = repo(client, fake)
        await repository.resolve()  # by now the scheme is known
        answers = [broken] * 2  # aiohttp itself tries once more on a connection that it kept
        fake.on("GET", lambda _: answers.pop() if answers else None)
        assert await repository.fetch_document(blob(MADE.data), "manifests") == MADE.data
        assert len(waits) == 1
        fake.on("GET", broken)
        with pytest.raises(RegistryUnreachable, match=fake.address):
            await repository.fetch_document(blob(MADE.data), "manifests")
        assert len(waits) == 1 + 3

    async def test_a_rate_limit_that_stays_and_tells_no_time(self, client, fake, waits):
        fake.on("HEAD", Answer(429))
        with pytest.raises(RateLimited) as caught:
            await repo(client, fake).resolve()
        assert caught.value.retry_after is None
        assert "log in" in caught.value.hint
        assert (len(fake.seen), len(waits)) == (4, 3)

    async def test_what_is_final_is_not_tried_again(self, client, fake, waits):
        for status in (400, 404, 418):
            fake.on("GET", Answer(status))
            with pytest.raises(RegistryError):
                await repo(client, fake).fetch_document(blob(MADE.data), "blobs")
        assert (len(fake.seen), waits) == (3, [])


class TestLogin:
    """The registry is its own token server here."""

    @pytest.fixture
    def bearer(self, fake):
        """Only the token in ``current`` is let in; a token request gives the next one."""
        state = {"current": "t1", "issued": []}

        def guard(seen):
            if seen.headers.get("authorization") == f"Bearer {state['current']}":
                return None
            realm = f'Bearer realm="{fake.url}/token",service="s"'
            return Answer(401, b"{}", {"WWW-Authenticate": realm})

        def issue(seen):
            state["issued"].append(seen)
            return Answer(body=json.dumps({"token": f"t{len(state['issued'])}"}).encode())

        fake.on(" /v2/", guard)
        fake.on("GET /token", issue)
        return state

    async def test_a_token_that_went_stale_is_renewed_once(self, client, fake, bearer):
        repository = repo(client, fake)
        await repository.resolve()
        bearer["current"] = "t2"
        await repository.resolve()
        assert [s.path.partition("?")[0] for s in fake.seen[3:]] == [
            "/v2/a/b/manifests/1",
            "/token",
            "/v2/a/b/manifests/1",
        ]

    async def test_a_fresh_token_that_is_refused_ends_it(self, client, fake, bearer):
        repository = repo(client, fake)
        bearer["current"] = "never"
        for tokens in (1, 2):  # first without any token, then with one that is in the cache
            with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
                await repository.resolve()
            assert "s3cr3t" not in told(caught.value)
            assert len(bearer["issued"]) == tokens
            assert len(fake.requests("/v2/")) == 2 * tokens

    async def test_a_registry_token_that_is_refused_ends_it(self, fake, bearer):
        credential = Credential(registry_token="s3cr3t-token", source="f")
        async with RegistryClient(credentials=Store(credential)) as client:
            with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
                await repo(client, fake).resolve()
        assert len(fake.seen) == 2
        assert bearer["issued"] == []
        assert "s3cr3t" not in told(caught.value)

    async def test_the_password_goes_to_the_token_server_only(self, client, fake, bearer):
        await repo(client, fake).resolve()
        for seen in fake.seen:
            basic = seen.headers.get("authorization", "").startswith("Basic")
            assert basic == seen.path.startswith("/token")

    async def test_a_token_server_that_is_busy(self, client, fake, bearer, waits):
        answers = [Answer(503), Answer(429, headers={"Retry-After": "3"})]
        fake.on("GET /token", lambda _: answers.pop(0) if answers else None)
        await repo(client, fake).resolve()
        assert len(waits) == 2
        assert 3 <= waits[1] <= 4
        fake.on("GET /token", Answer(429, headers={"Retry-After": "3600"}))
        with pytest.raises(RateLimited) as caught:
            await repo(client, fake, "c/d:1").resolve()
        assert caught.value.retry_after == 3600

    async def test_a_token_answer_without_end(self, client, fake, bearer):
        fake.on("GET /token", Answer(body=b'{"token":"' + b"x" * 1_000_000 + b'"}'))
        with pytest.raises(RegistryProtocolError, match="gave no token"):
            await repo(client, fake).resolve()

    @pytest.mark.parametrize("status", [401, 403])
    async def test_refused_with_words(self, client, fake, status):
        said = b'{"errors":[{"code":"DENIED","message":"requested access is denied"}]}'
        fake.on("HEAD", Answer(status, headers={"WWW-Authenticate": 'Basic realm="x"'}))
        fake.on("GET", Answer(status, said, {"WWW-Authenticate": 'Basic realm="x"'}))
        with pytest.raises(AuthenticationError) as caught:
            await repo(client, fake).resolve()
        assert ("requested access is denied" in str(caught.value)) == (status == 403)
        assert "s3cr3t" not in told(caught.value)


class TestSchemes:
    async def test_plain_http_on_loopback_is_found_out_once(self, client, fake):
        repository = repo(client, fake)
        await repository.resolve()
        await read(repository, blob())
        assert repository.requests == 2
        assert len(fake.seen) == 2

    @pytest.fixture
    def authority(self):
        return trustme.CA()

    @pytest.fixture
    def secure(self, authority):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        with FakeRegistry(tls=context) as registry:
            registry.add("a/b", "1", MADE)
            yield registry

    async def test_an_unknown_authority_is_refused_even_on_loopback(self, client, secure):
        with pytest.raises(RegistryUnreachable, match="not trusted") as caught:
            await repo(client, secure).resolve()
        assert "SSL_CERT_FILE" in caught.value.hint
        assert secure.seen == []

    async def test_insecure_means_any_certificate(self, secure):
        async with RegistryClient(credentials=Store(), insecure=[secure.address]) as client:
            assert (await repo(client, secure).resolve()).descriptor
        async with RegistryClient(credentials=Store(), insecure=["127.0.0.1"]) as client:
            assert (await repo(client, secure).resolve()).descriptor

    async def test_a_certificate_for_another_name_is_refused(self, authority):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("other.example").configure_cert(context)
        with FakeRegistry(tls=context) as wrong:
            async with RegistryClient(credentials=Store()) as client:
                authority.configure_trust(client.transport._verified)
                with pytest.raises(RegistryUnreachable, match=r"not trusted: .*mismatch"):
                    await repo(client, wrong).resolve()
        assert wrong.seen == []

    async def test_a_redirect_without_tls_is_told_without_its_user(self, secure):
        secure.on(
            "GET", Answer(307, headers={"Location": "http://u:s3cr3t@r.example/x?sig=s3cr3t"})
        )
        async with RegistryClient(credentials=Store()) as client:
            client.transport._verified = client.transport._unverified
            with pytest.raises(RegistryProtocolError, match=r"to r\.example without TLS") as caught:
                await read(repo(client, secure), blob())
        assert "s3cr3t" not in told(caught.value)

    def test_ssl_cert_file_is_trusted(self, secure, authority, tmp_path):
        bundle = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(bundle))
        code = f"""
import asyncio
from serpentine.model.reference import Reference
from serpentine.registry import CredentialStore, RegistryClient
async def main():
    async with RegistryClient(credentials=CredentialStore([], {{}})) as client:
        ref = Reference.parse("{secure.address}/a/b:1")
        print((await client.repository(ref).resolve()).descriptor.digest)
asyncio.run(main())
"""
        environ = {**os.environ, "SSL_CERT_FILE": str(bundle)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30
        )
        assert done.stdout.strip() == MADE.digest, done.stderr

    async def test_tls_is_not_given_up_on_a_redirect(self, secure, fake):
        secure.on("GET", Answer(307, headers={"Location": f"{fake.url}/x"}))
        async with RegistryClient(credentials=Store()) as client:
            client.transport._verified = client.transport._unverified
            with pytest.raises(RegistryProtocolError, match="without TLS"):
                await read(repo(client, secure), blob())
        assert fake.seen == []

    async def test_not_on_loopback_plain_http_is_an_error_that_names_the_flag(self, fake):
        async with RegistryClient(credentials=Store()) as client:
            client.transport._insecure = frozenset()
            with pytest.raises(RegistryUnreachable) as caught:
                async with client.transport.send("GET", f"https://{fake.address}/", {}):
                    pass
        assert "does not speak HTTPS" in str(caught.value)
        assert f"--insecure-registry {fake.address}" in caught.value.hint


class TestSurroundings:
    async def test_netrc_is_not_used(self, client, fake, monkeypatch, tmp_path):
        """Trap 41."""
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login n password s3cr3t-netrc\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        await repo(client, fake).resolve()
        assert "authorization" not in fake.seen[0].headers

    async def test_the_callers_proxy_is_used(self, client, fake, monkeypatch):
        """A plain proxy sees the whole URL of the request."""
        monkeypatch.setenv("http_proxy", f"http://pu:s3cr3t-proxy@{fake.address}")
        async with client.transport.send("GET", "http://registry.invalid/v2/x", {}) as response:
            assert response.status == 404
        assert fake.seen[0].path == "http://registry.invalid/v2/x"
        assert fake.seen[0].headers["proxy-authorization"].startswith("Basic")
        monkeypatch.setenv("no_proxy", "registry.invalid")
        with pytest.raises(RegistryUnreachable, match=r"cannot find the host registry\.invalid"):
            async with client.transport.send("GET", "http://registry.invalid/v2/x", {}):
                pass
        assert len(fake.seen) == 1

    async def test_a_proxy_that_is_down_is_named_without_its_password(self, client, monkeypatch):
        monkeypatch.setenv("https_proxy", "http://pu:s3cr3t-proxy@127.0.0.1:9")
        with pytest.raises(
            RegistryUnreachable, match=r"through the proxy 127\.0\.0\.1:9"
        ) as caught:
            async with client.transport.send("GET", "https://registry.invalid/v2/", {}):
                pass
        assert "s3cr3t" not in f"{caught.value} {caught.value.hint}"

    @pytest.fixture
    def tunnel(self):
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("registry.invalid").configure_cert(context)
        with FakeRegistry(tls=context) as registry, TunnelProxy(registry.address) as proxy:
            registry.add("a/b", "1", MADE)
            yield proxy, registry, authority

    async def test_tls_through_a_proxy(self, client, tunnel, monkeypatch):
        """The proxy sees the host and its own password, and nothing of ours."""
        proxy, registry, authority = tunnel
        authority.configure_trust(client.transport._verified)
        challenge = Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        registry.on(".", lambda s: None if "authorization" in s.headers else challenge)
        monkeypatch.setenv("HTTPS_PROXY", f"http://pu:pw@{proxy.address}")
        resolved = await client.repository(Reference.parse("registry.invalid/a/b:1")).resolve()
        assert str(resolved.descriptor.digest) == MADE.digest
        for seen in proxy.seen:
            assert seen.path == "registry.invalid:443"
            assert seen.headers["proxy-authorization"].startswith("Basic")
            assert "authorization" not in seen.headers
        assert registry.seen
        assert not any("proxy-authorization" in seen.headers for seen in registry.seen)

    async def test_a_proxy_does_not_make_certificates_right(self, client, tunnel, monkeypatch):
        proxy, registry, _ = tunnel
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        with pytest.raises(RegistryUnreachable, match=r"registry\.invalid is not trusted"):
            await client.repository(Reference.parse("registry.invalid/a/b:1")).resolve()
        assert registry.seen == []

    async def test_a_proxy_that_refuses(self, client, tunnel, monkeypatch):
        proxy, registry, _ = tunnel
        proxy.status = 407
        monkeypatch.setenv("HTTPS_PROXY", f"http://pu:s3cr3t@{proxy.address}")
        with pytest.raises(RegistryUnreachable, match=rf"the proxy {proxy.address}") as caught:
            await client.repository(Reference.parse("registry.invalid/a/b:1")).resolve()
        assert "s3cr3t" not in told(caught.value)
        assert registry.seen == []

    async def test_no_proxy_on_loopback_and_where_no_proxy_says(
        self, client, fake, tunnel, monkeypatch
    ):
        proxy, *_ = tunnel
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        await repo(client, fake).resolve()
        monkeypatch.setenv("NO_PROXY", ".invalid")
        with pytest.raises(RegistryUnreachable, match=r"cannot find the host registry\.invalid"):
            await client.repository(Reference.parse("registry.invalid/a")).resolve()
        assert proxy.seen == []

    async def test_a_proxy_whose_name_is_unknown_is_to_blame(self, client, monkeypatch):
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
        with pytest.raises(RegistryUnreachable, match=r"through the proxy proxy\.invalid:3128"):
            await client.repository(Reference.parse("registry.invalid/a")).resolve()

    @pytest.mark.parametrize(
        "proxy", ["socks5://u:s3cr3t@127.0.0.1:9", "http://[", "http://u:s3cr3t@127.0.0.1:99999"]
    )
    async def test_what_is_no_proxy(self, client, monkeypatch, proxy):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(InvalidSetting, match="HTTPS_PROXY") as caught:
            await client.repository(Reference.parse("registry.invalid/a")).resolve()
        assert "s3cr3t" not in told(caught.value)

    async def test_nothing_there(self, client):
        with pytest.raises(
            RegistryUnreachable, match=r"cannot connect to 127\.0\.0\.1:9"
        ) as caught:
            await client.repository(Reference.parse("127.0.0.1:9/a")).resolve()
        assert "refused" in str(caught.value)

    async def test_what_is_no_http(self, client, monkeypatch):
        import socket
        import threading

        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    with connection:
                        connection.recv(100)
                        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

            thread = threading.Thread(target=serve)
            thread.start()
            port = server.getsockname()[1]
            try:
                with pytest.raises(RegistryError, match=f"127.0.0.1:{port}"):
                    await client.repository(Reference.parse(f"127.0.0.1:{port}/a")).resolve()
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()

    async def test_counts_its_own_requests(self, client, fake):
        one, two = repo(client, fake), repo(client, fake)
        await one.resolve()
        await two.resolve()
        await two.fetch_document(blob(MADE.data), "manifests")
        assert (one.requests, two.requests) == (1, 2)
        assert json.loads(MADE.data)
