"""One look at a registry on loopback: what counts as an answer, and what is left to the client."""

from __future__ import annotations

import pytest

from serpentine.errors import InvalidSetting
from serpentine.model.digest import Digest
from serpentine.model.reference import Reference
from serpentine.registry import look as module
from serpentine.registry.endpoints import Endpoints
from serpentine.registry.look import is_near, look, read_head
from serpentine.registry.memory import HostMemory
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import image, layer

DIGEST = Digest.of(b"x")
TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def registry():
    with FakeRegistry() as server:
        yield server


@pytest.fixture
def made(registry):
    made = image([layer([])])
    registry.add("a/b", "1", made)
    return made


async def ask(registry, text="a/b:1", *, endpoints=None, memory=None):
    reference = Reference.parse(f"{registry.address}/{text}")
    return await look(
        reference, endpoints or Endpoints(), memory or HostMemory(), user_agent="serpentine/0"
    )


@pytest.mark.parametrize(
    ("host", "near"),
    [
        ("127.0.0.1:5000", True),
        ("localhost:5000", True),
        ("[::1]:5000", True),
        ("127.0.0.1", False),  # HTTPS would be asked first, at another port
        ("127.0.0.1:99999", False),
        ("10.0.0.1:5000", False),
        ("docker.io", False),
    ],
)
def test_near_is_loopback_with_a_port(host, near):
    assert is_near(host) is near


async def test_one_head_as_the_client_would_send_it(registry, made):
    found = await ask(registry)
    assert (str(found.digest), found.size) == (made.digest, len(made.data))
    assert found.media_type == made.media_type
    (seen,) = registry.seen
    assert (seen.method, seen.path) == ("HEAD", "/v2/a/b/manifests/1")
    assert seen.headers["host"] == registry.address
    assert TYPE in seen.headers["accept"]
    assert seen.headers["user-agent"] == "serpentine/0"
    assert "authorization" not in seen.headers


async def test_by_digest_it_must_be_that_one(registry, made):
    assert str((await ask(registry, f"a/b@{made.digest}")).digest) == made.digest
    other = Answer(body=b"y", headers={"Docker-Content-Digest": str(Digest.of(b"y"))})
    registry.on("HEAD", other)
    assert await ask(registry, f"a/b@{made.digest}") is None


@pytest.mark.parametrize(
    "answer",
    [
        Answer(401, headers={"WWW-Authenticate": "Basic"}),
        Answer(307, headers={"Location": "http://127.0.0.1:1/"}),
        Answer(404),
        Answer(429, headers={"Retry-After": "1"}),
        Answer(reset=True),
        Answer(raw=b""),
        Answer(raw=b"\x15\x03\x01\x00\x02\x02\x46"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20_000),
    ],
    ids=lambda answer: str(answer.status if answer.raw is None else answer.raw[:4]),
)
async def test_whatever_else_comes_is_left_to_the_client(registry, made, answer):
    registry.on("HEAD", answer)
    assert await ask(registry) is None


async def test_a_registry_that_is_slow_is_left_to_the_client(registry, made, monkeypatch):
    gate = registry.gate()

    def wait(_):
        gate.wait(10)

    registry.on("HEAD", wait)
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    assert await ask(registry) is None
    gate.set()


async def test_nobody_there(registry, made):
    reference = Reference.parse("127.0.0.1:1/a:1")
    assert await look(reference, Endpoints(), HostMemory(), user_agent="x") is None


async def test_what_is_configured_and_what_was_asked_for_counts(registry, made):
    host = registry.address
    for url in ("http://127.0.0.1:1", f"https://{host}"):
        assert await ask(registry, endpoints=Endpoints(mirrors={host: [url]})) is None
    memory = HostMemory()
    memory.close(host, 60)
    assert await ask(registry, memory=memory) is None
    assert registry.seen == []


async def test_a_configuration_that_is_wrong_is_told(registry, tmp_path):
    folder = tmp_path / registry.address
    folder.mkdir()
    (folder / "hosts.toml").write_text("[")
    with pytest.raises(InvalidSetting):
        await ask(registry, endpoints=Endpoints([tmp_path]))


def head(*lines: str, status="HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join([status, *lines, "", ""]).encode("latin-1")


GOOD = (f"Docker-Content-Digest: {DIGEST}", "Content-Length: 7", f"content-type: {TYPE}; q=1")


def test_the_head_of_an_answer():
    found = read_head(head(*GOOD))
    assert (found.digest, found.size, found.media_type) == (DIGEST, 7, TYPE)
    assert read_head(head(*GOOD, status="HTTP/1.0 200")) == found
    assert read_head(head(*GOOD), DIGEST) == found


@pytest.mark.parametrize(
    "text",
    [
        head(*GOOD[1:]),
        head(GOOD[0], GOOD[2]),
        head(GOOD[0], "Content-Length: 0"),
        head(GOOD[0], "Content-Length: ²"),
        head(GOOD[0], "Content-Length: 99999999"),
        head("Docker-Content-Digest: sha256:1", GOOD[1]),
        head(*GOOD, GOOD[0]),
        head(*GOOD, " continued: 1"),
        head(*GOOD, "no colon"),
        head(*GOOD, "RateLimit-Remaining: 7;w=60"),
        head(*GOOD, status="HTTP/1.1 204 No Content"),
        head(*GOOD, status="HTTP/2 200"),
        head(*GOOD, status="SSH-2.0"),
        b"\r\n\r\n",
    ],
)
def test_what_leaves_a_question_open_is_no_answer(text):
    assert read_head(text) is None
