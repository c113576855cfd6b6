"""Hosts that stand in for a registry: what they are told, what they are sent, and what not."""

from __future__ import annotations

import ssl

import pytest
import trustme

from serpentine.errors import RegistryProtocolError, RegistryUnreachable
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.registry import Credential, CredentialStore, Endpoints, RegistryClient
from serpentine.registry import transport as transport_module
from serpentine.registry.hosts import inner_kind
from tests.support.fake_registry import Answer, FakeRegistry

DATA = b"blob" * 1000
BLOB = Descriptor(media_type="x", digest=Digest.of(DATA), size=len(DATA))
BASIC = Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})


class Store(CredentialStore):
    """Has a login for every registry, and notes whose was wanted."""

    def __init__(self) -> None:
        super().__init__([], {})
        self.wanted: list[str] = []

    async def find(self, registry, repository):
        self.wanted.append(registry)
        return Credential("user", f"password of {registry}", source="test")


def holds(registry: FakeRegistry) -> FakeRegistry:
    registry.blobs[str(BLOB.digest)] = DATA
    return registry


@pytest.fixture
def mirror():
    with FakeRegistry() as registry:
        yield holds(registry)


@pytest.fixture
def own():
    with FakeRegistry() as registry:
        yield holds(registry)


@pytest.fixture
def configured(tmp_path):
    """Return a client of what a hosts.toml says for all registries."""

    def make(text: str, store: CredentialStore | None = None) -> RegistryClient:
        place = tmp_path / "_default"
        place.mkdir(exist_ok=True)
        (place / "hosts.toml").write_text(text)
        endpoints = Endpoints([tmp_path])
        return RegistryClient(credentials=store or Store(), endpoints=endpoints)

    return make


async def read(client: RegistryClient, registry: str) -> bytes:
    repository = client.repository(Reference.parse(f"{registry}/a/b:1"))
    async with repository.open_blob(BLOB) as body:
        return b"".join([part async for part in body])


async def test_another_server_gets_its_own_login_and_is_told_whose_it_is(mirror, configured):
    """The registry's password is for the registry, wherever hosts.toml sends us instead."""
    mirror.on("GET", lambda seen: None if "authorization" in seen.headers else BASIC)
    store = Store()
    async with configured(f'server = "{mirror.url}"', store) as client:
        assert await read(client, "docker.io") == DATA
    assert set(store.wanted) == {mirror.address}
    assert all(seen.path.endswith("?ns=docker.io") for seen in mirror.seen)


async def test_the_registrys_own_host_as_a_mirror_has_its_login(own, configured):
    own.on("GET", lambda seen: None if "authorization" in seen.headers else BASIC)
    store = Store()
    async with RegistryClient(
        credentials=store, endpoints=Endpoints(mirrors={own.address: [own.url]})
    ) as client:
        assert await read(client, own.address) == DATA
    assert set(store.wanted) == {own.address}
    assert not any("ns=" in seen.path for seen in own.seen)


async def test_plain_http_of_a_mirror_is_not_that_of_a_registry(mirror, configured, monkeypatch):
    """Asked by its own name, where nobody allowed that, the host has to speak TLS."""
    async with configured(f'[host."{mirror.url}"]') as client:
        assert await read(client, "docker.io") == DATA
        monkeypatch.setattr(transport_module, "schemes_for", lambda *_: ("https",))
        with pytest.raises(RegistryUnreachable, match="does not speak HTTPS"):
            await client.ping(mirror.address)


@pytest.mark.parametrize("location", ["same", "elsewhere"])
async def test_headers_on_a_redirect(mirror, own, configured, location):
    """They are for the host, by whatever path, and for nobody else, by whatever way."""
    target = own.url if location == "elsewhere" else ""
    digest = BLOB.digest
    mirror.on("GET /v2", Answer(307, headers={"Location": "/moved"}))
    mirror.on("GET /moved", Answer(307, headers={"Location": f"{target}/blobs/{digest}"}))
    async with configured(f"""
        [host."{mirror.url}"]
          [host."{mirror.url}".header]
            x-secret = "s3cr3t"
            authorization = "Custom s3cr3t"
    """) as client:
        assert await read(client, "docker.io") == DATA
    for seen in mirror.seen:
        assert seen.headers["x-secret"] == "s3cr3t"
        assert seen.headers["authorization"] == "Custom s3cr3t"
    assert all("s3cr3t" not in str(seen.headers) for seen in own.seen)
    assert len(mirror.seen) + len(own.seen) == 3


def bearer(server: str) -> Answer:
    return Answer(401, headers={"WWW-Authenticate": f'Bearer realm="{server}/token"'})


def with_tokens(registry: FakeRegistry) -> None:
    registry.on("GET /v2", lambda s: None if "authorization" in s.headers else bearer(registry.url))
    registry.on("GET /token", Answer(body=b'{"token": "t"}'))


async def test_certificates_count_for_the_token_server_too(configured, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "_default.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FakeRegistry(tls=context) as registry:
        with_tokens(holds(registry))
        async with configured(f"""
            server = "{registry.url}"
            ca = "{tmp_path / "_default.pem"}"
        """) as client:
            assert await read(client, registry.address) == DATA
        assert registry.requests("GET /token")


async def test_a_certificate_without_a_server(configured, tmp_path):
    """What stands at the top is for the registry itself."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FakeRegistry(tls=context) as registry:
        holds(registry)
        async with configured(f'ca = "{tmp_path / "ca.pem"}"') as client:
            assert await read(client, registry.address) == DATA


@pytest.mark.parametrize("answer", [Answer(503), Answer(429), Answer(reset=True)])
async def test_a_mirror_whose_token_server_fails_is_passed_over_at_once(
    mirror, own, configured, answer
):
    mirror.on("GET /v2", bearer(mirror.url))
    mirror.on("GET /token", answer)
    async with configured(f'[host."{mirror.url}"]') as client:
        assert await read(client, own.address) == DATA
    # Once more at most: aiohttp does that by itself, of a connection that was kept.
    assert len(mirror.requests("GET /token")) <= 2
    assert own.seen


async def test_a_public_registry_does_not_send_us_for_a_token_within_the_network(
    mirror, own, monkeypatch
):
    monkeypatch.setattr(
        transport_module, "inner_kind", lambda host: "" if host == own.address else inner_kind(host)
    )
    own.on("GET", bearer(mirror.url))
    async with RegistryClient(credentials=Store()) as client:
        with pytest.raises(RegistryProtocolError, match="an address within a network"):
            await read(client, own.address)
    assert mirror.seen == []
