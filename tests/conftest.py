"""Fixtures that all tests share: an isolated environment, real servers, clean namespaces."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import uuid
from datetime import timedelta

import pytest
from blockbuster import blockbuster_ctx

from serpentine.containerd import Containerd, Endpoint
from tests.support.servers import ContainerdServer, Recording, RegistryServer, find_containerds

CONTAINERDS = find_containerds()

# What a developer's shell may hold and no test may see.
_FOREIGN = re.compile(
    r"(?i)^(SERPENTINE_|CONTAINERD_|DOCKER_|REGISTRY_AUTH_FILE$|XDG_|NO_COLOR$|"
    r"(http|https|all|no)_proxy$|SSL_CERT_|REQUESTS_CA)"
)


def pytest_report_header() -> list[str]:
    return [f"containerd: {', '.join(CONTAINERDS) or 'NONE'}"]


def pytest_terminal_summary(terminalreporter) -> None:
    """Say loudly what this machine could not test."""
    if not any(version.startswith("2.") for version in CONTAINERDS):
        terminalreporter.section("LEFT OUT")
        terminalreporter.line(
            "containerd 2.x is not on this machine (scripts/setup-tests builds it where Go is):"
            f" the integration tests ran with {', '.join(CONTAINERDS) or 'none'} only"
        )


def pytest_generate_tests(metafunc) -> None:
    if "containerd" in metafunc.fixturenames:
        versions = list(CONTAINERDS) or ["none"]
        metafunc.parametrize("containerd", versions, indirect=True, scope="session")


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path_factory):
    """Nothing of the developer's own environment counts, and nothing is written there."""
    home = tmp_path_factory.mktemp("home")
    for name in os.environ:
        if _FOREIGN.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("SERPENTINE_DATA_DIR", str(home / "data"))
    monkeypatch.setenv("SERPENTINE_RUN_DIR", str(home / "run"))
    return home


@pytest.fixture(scope="session")
def containerd(request):
    """Each real containerd of this machine, in turn."""
    if request.param == "none" or os.geteuid() != 0:
        pytest.fail("these tests need root and containerd: run 'make test' as root")
    with ContainerdServer(CONTAINERDS[request.param]) as server:
        yield server


@pytest.fixture
def namespace(containerd):
    """A namespace of this test's own; whatever the test left in it is removed."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    asyncio.run(_clean(containerd, name))


async def _clean(server: ContainerdServer, namespace: str) -> None:
    async with Containerd(Endpoint.parse(server.address), namespace=namespace) as client:
        for lease in await client.leases.all():
            await client.leases.delete(lease.id)
        for status in await client.content.list_statuses():
            await client.content.abort(status.ref)
        for image in await client.images.all():
            await client.images.delete(image.name)
        # The collector takes the rest: nothing holds it any more.
        last = "test-clean"
        await client.leases.create(last, expires=timedelta(minutes=1))
        await client.leases.delete(last, sync=True)


@pytest.fixture(scope="session")
def registry():
    """A real registry that lets everybody in."""
    _need("docker-registry")
    with RegistryServer() as server:
        yield server


@pytest.fixture(scope="session")
def registry_htpasswd():
    """A real registry that wants a user and a password."""
    _need("docker-registry", "htpasswd")
    with RegistryServer(htpasswd=("alice", "wonder land")) as server:
        yield server


@pytest.fixture
def recording(registry):
    """What the registry served during this test."""
    with Recording(registry) as seen:
        yield seen


def _need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found: run 'make test' as root")


@pytest.fixture(autouse=True)
def nothing_blocks():
    """A call that blocks the event loop fails the test, in the rooms that wait for others."""
    rooms = ["serpentine.pull", "serpentine.registry", "serpentine.containerd"]
    with blockbuster_ctx(scanned_modules=rooms) as watch:
        # grpcio and asyncio take locks that nobody holds for long.
        watch.functions["threading.Lock.acquire"].deactivate()
        yield
