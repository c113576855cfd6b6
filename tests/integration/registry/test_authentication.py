"""Logging in: tokens that a real registry checks, and its own htpasswd."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest
import trustme

from serpentine.errors import AuthenticationError, RegistryUnreachable
from serpentine.model.reference import Reference
from serpentine.registry import CredentialStore, RegistryClient
from tests.support.images import file, image, layer, noise, push
from tests.support.servers import Recording, RegistryServer
from tests.support.token_server import TokenRegistry

MADE = image([layer([file("a", noise("auth", 200_000))])])


@pytest.fixture(scope="module")
def guarded():
    registry = TokenRegistry()
    with registry:
        push(registry.open, "auth/image", "1", MADE)
        yield registry


@pytest.fixture
def tokens(guarded):
    """The token server, as it is when nothing was changed, with an empty record."""
    server = guarded.tokens
    server.requests.clear()
    yield server
    server.lifetime, server.get_allowed, server.anonymous = 300, True, False


def docker_config(folder: Path, registry: str, **entry: str) -> dict[str, str]:
    if "username" in entry:
        pair = f"{entry.pop('username')}:{entry.pop('password')}"
        entry["auth"] = base64.b64encode(pair.encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {registry: entry}}))
    return {"DOCKER_CONFIG": str(folder), "HOME": str(folder), "PATH": "/usr/bin:/bin"}


@pytest.fixture
async def client(guarded, tmp_path):
    environ = docker_config(tmp_path, guarded.address, username="alice", password="wonder land")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as made:
        yield made


def repository(client, registry):
    return client.repository(Reference.parse(f"{registry.address}/auth/image:1"))


async def read(repo) -> bytes:
    """Read the image's layer."""
    from serpentine.model.documents import decode_document

    resolved = await repo.resolve()
    manifest = decode_document(
        await repo.fetch_document(resolved.descriptor, "manifests"), "", "test"
    )
    parts = []
    async with repo.open_blob(manifest.layers[0]) as body:
        async for chunk in body:
            parts.append(chunk)
    return b"".join(parts)


async def test_with_the_password(guarded, tokens, client):
    repo = repository(client, guarded)
    assert await read(repo) in MADE.blobs.values()
    (asked,) = tokens.requests
    assert (asked.method, asked.user, asked.status) == ("GET", "alice", 200)
    assert asked.scopes == ("repository:auth/image:pull",)
    # 401, the token, then HEAD, manifest and blob, each with the token at once.
    assert repo.requests == 5


async def test_one_token_however_many_want_it(guarded, tokens, client):
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(read(repository(client, guarded)))
    assert len(tokens.requests) == 1


async def test_by_post_where_get_is_not_allowed(guarded, tokens, client):
    tokens.get_allowed = False
    assert await read(repository(client, guarded))
    assert [(r.method, r.grant, r.status) for r in tokens.requests] == [
        ("GET", "", 405),
        ("POST", "password", 200),
    ]


async def test_with_an_identity_token(guarded, tokens, tmp_path):
    environ = docker_config(tmp_path, guarded.address, identitytoken="refresh-secret")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        assert await read(repository(client, guarded))
    assert [(r.method, r.grant, r.user) for r in tokens.requests] == [
        ("POST", "refresh_token", "alice")
    ]


async def test_anonymously_where_that_is_allowed(guarded, tokens, tmp_path):
    tokens.anonymous = True
    environ = {"HOME": str(tmp_path)}
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        assert await read(repository(client, guarded))
    assert [(r.method, r.user) for r in tokens.requests] == [("GET", None)]


async def test_without_credentials(guarded, tokens, tmp_path):
    environ = {"HOME": str(tmp_path)}
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        with pytest.raises(AuthenticationError, match="needs credentials") as caught:
            await repository(client, guarded).resolve()
    assert f"docker login {guarded.address}" in caught.value.hint
    assert len(tokens.requests) == 1, "it is asked once, not again and again"


async def test_with_a_wrong_password(guarded, tokens, tmp_path):
    environ = docker_config(tmp_path, guarded.address, username="alice", password="s3cr3t-wrong")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
            await repository(client, guarded).resolve()
    text = f"{caught.value} {caught.value.hint} {caught.value!r}"
    assert "alice" in text
    assert str(tmp_path) in text
    assert "s3cr3t" not in text


async def test_a_token_that_has_expired_is_renewed(guarded, tokens, client):
    repo = repository(client, guarded)
    await repo.resolve()
    # As the registry sees it the token is stale, and we do not know it.
    authenticator = client.authenticator
    ((key, cached),) = authenticator._headers.items()
    authenticator._headers[key] = type(cached)("Bearer stale", cached.until)
    assert await read(repository(client, guarded))
    assert len(tokens.requests) == 2


async def test_a_token_that_expires_between_two_requests(guarded, tokens, client):
    """By our clock it is good; the registry checks its own, and says 401."""
    tokens.lifetime = -120  # more than the leeway that the registry gives
    repo = repository(client, guarded)
    with pytest.raises(AuthenticationError, match="refused the credentials"):
        await repo.resolve()
    assert len(tokens.requests) == 1, "a fresh token that is refused is not renewed"
    ((key, cached),) = client.authenticator._headers.items()
    client.authenticator._headers[key] = type(cached)(cached.header, float("inf"))
    tokens.lifetime = 300
    assert await read(repo)
    assert len(tokens.requests) == 2


async def test_a_short_lived_token_is_renewed_before_it_is_used(guarded, tokens, client):
    tokens.lifetime = 1
    now = 1000.0
    client.authenticator._clock = lambda: now
    await repository(client, guarded).resolve()
    await repository(client, guarded).resolve()
    assert len(tokens.requests) == 1
    now += 1
    tokens.lifetime = 300
    await repository(client, guarded).resolve()
    assert len(tokens.requests) == 2


async def test_htpasswd(registry_htpasswd, tmp_path):
    registry = registry_htpasswd
    push(registry, "auth/image", "1", MADE)
    environ = docker_config(tmp_path, registry.address, username="alice", password="wonder land")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        repo = repository(client, registry)
        assert await read(repo)
        assert repo.requests == 4, "one 401, then never again"

    environ = docker_config(tmp_path, registry.address, username="alice", password="s3cr3t-wrong")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
            await repository(client, registry).resolve()
    assert "s3cr3t" not in f"{caught.value} {caught.value.hint}"

    async with RegistryClient(credentials=CredentialStore.from_environment({"HOME": "/x"})) as c:
        with pytest.raises(AuthenticationError, match="needs credentials"):
            await repository(c, registry).resolve()


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory):
    """A certificate, its key, and the authority that it is from."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    issued.cert_chain_pems[0].write_to_path(str(paths[0]))
    issued.private_key_pem.write_to_path(str(paths[1]))
    authority.cert_pem.write_to_path(str(paths[2]))
    return paths


@pytest.fixture(scope="module")
def secure(tls_files):
    with RegistryServer(tls=tls_files[:2], htpasswd=("alice", "wonder land")) as registry:
        push(registry, "auth/image", "1", MADE)
        yield registry


async def test_an_authority_that_ssl_cert_file_names(secure, tls_files, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_files[2]))
    environ = docker_config(tmp_path, secure.address, username="alice", password="wonder land")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        assert await read(repository(client, secure)) in MADE.blobs.values()
        assert client.transport.scheme(secure.address) == "https"


async def test_an_unknown_authority_gets_no_request(secure, tmp_path):
    environ = docker_config(tmp_path, secure.address, username="alice", password="s3cr3t")
    async with RegistryClient(credentials=CredentialStore.from_environment(environ)) as client:
        with (
            Recording(secure) as seen,
            pytest.raises(RegistryUnreachable, match="is not trusted") as caught,
        ):
            await repository(client, secure).resolve()
    assert seen.requests == []
    assert "SSL_CERT_FILE" in caught.value.hint
    assert f"--insecure-registry {secure.address}" in caught.value.hint


async def test_any_certificate_where_the_user_said_so(secure, tmp_path):
    environ = docker_config(tmp_path, secure.address, username="alice", password="wonder land")
    async with RegistryClient(
        credentials=CredentialStore.from_environment(environ), insecure=[secure.address]
    ) as client:
        assert await read(repository(client, secure))
        assert client.transport.scheme(secure.address) == "https"


def test_the_command_line_logs_in(guarded, tokens, command, tmp_path):
    environ = docker_config(tmp_path, guarded.address, username="alice", password="wonder land")
    reference = f"{guarded.address}/auth/image:1"
    done = command("pull", reference, DOCKER_CONFIG=environ["DOCKER_CONFIG"])
    assert done.status == 0
    assert len(tokens.requests) == 1
    assert "wonder land" not in done.out + done.err
    refused = command("pull", "-q", reference)
    assert refused.status == 1
    assert "docker login" in refused.err
