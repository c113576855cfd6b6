"""Fixtures that all tests share: an isolated environment, real servers, clean namespaces."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from serpentine.containerd import Containerd
from tests.support.engines import (
    ContainedContainerd,
    DockerServer,
    Mirror,
    OurDaemon,
    PodmanServer,
)
from tests.support.servers import ContainerdServer, Recording, RegistryServer, find_containerds
from tests.support.tasks import RUNC, end_task

# The same examples each time.  No limit per example: that would time the machine, and each test
# has a limit of its own.
hypothesis.settings.register_profile("serpentine", deadline=None, derandomize=True)
hypothesis.settings.load_profile("serpentine")

CONTAINERDS = find_containerds()
# The newest, in a container of ours behind Envoy.
ENVOY = "envoy"
# The suites that must hold on every way to reach a containerd.
_EVERYWHERE = (
    "test_pull",
    "test_pull_bad_input",
    "test_pull_cancel",
    "test_foreign_images",
    "test_upkeep_everywhere",
)

# May use the container engines of the tests, like the group docker; no such group need exist.
ENGINE_GROUP = 54321

# What a developer's shell may hold and no test may see.
_FOREIGN = re.compile(
    r"(?i)^(SERPENTINE_|CONTAINERD_|CONTAINER_|DOCKER_|REGISTRY_AUTH_FILE$|XDG_|NO_COLOR$|"
    r"(http|https|all|no)_proxy$|SSL_CERT_|REQUESTS_CA)"
)


def pytest_report_header() -> list[str]:
    return [f"containerd: {', '.join(CONTAINERDS) or 'NONE'}"]


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also in the background of a shell.

    A job there inherits SIGINT as ignored, and so would all of its children.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
        if metafunc.module.__name__.rpartition(".")[2] in _EVERYWHERE:
            versions.append(ENVOY)
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
    # Not the Docker that the developer may have.
    monkeypatch.setenv("SERPENTINE_DAEMON", "embedded")
    return home


@pytest.fixture(scope="session")
def containerd(request):
    """Each real containerd of this machine, in turn."""
    if request.param == "none" or os.geteuid() != 0:
        pytest.fail("these tests need root and containerd: run 'make test' as root")
    if request.param == ENVOY:
        yield request.getfixturevalue("envoy_containerd")
        return
    with ContainerdServer(CONTAINERDS[request.param]) as server:
        yield server


def newest() -> Path:
    """Return the directory of the newest containerd that is there."""
    return Path(CONTAINERDS[max(CONTAINERDS)]).parent


@pytest.fixture(scope="session")
def mirror():
    """The releases that our image is built of, on loopback; other users may read its sums."""
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    folder.chmod(0o755)
    with Mirror(folder, newest()).serving() as served:
        yield served
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def docker():
    """A real Docker, with the images that ours are made from; root's and a group's."""
    _need("dockerd", "docker", "iptables", "debootstrap")
    with DockerServer(group=ENGINE_GROUP) as server:
        yield server.with_images()


@pytest.fixture(scope="session")
def podman():
    """A real Podman, the same."""
    _need("podman")
    with PodmanServer(group=ENGINE_GROUP) as server:
        yield server.with_images()


@pytest.fixture(scope="session")
def envoy_containerd(mirror):
    """Our containerd in Docker, behind Envoy: for whole suites, so never stopped by a test.

    In a Docker of its own: other tests count what theirs holds, and remove it.
    """
    _need("dockerd", "docker", "iptables", "debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    with DockerServer(group=ENGINE_GROUP) as server:
        daemon = OurDaemon(server.with_images(), mirror, folder)
        yield ContainedContainerd(daemon, newest(), transport="envoy")
    shutil.rmtree(folder)


@pytest.fixture(params=["docker", "podman"])
def engine_server(request):
    """Each container engine, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def ours(engine_server, mirror):
    """A user of a container engine who has nothing yet; what they bring up is removed."""
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    daemon = OurDaemon(engine_server, mirror, folder)
    yield daemon
    names = daemon.names
    engine_server.run("rm", "-f", names.containerd, names.envoy, check=False)
    engine_server.run("volume", "rm", "-f", names.data_volume, names.run_volume, check=False)
    shutil.rmtree(folder)


@pytest.fixture
def namespace(containerd):
    """A namespace of this test's own; whatever the test left in it is removed."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    asyncio.run(_clean(containerd, name))


async def _clean(server: ContainerdServer, namespace: str) -> None:
    async with Containerd(server.endpoint, namespace=namespace) as client:
        tasks = {task.id for task in await client.tasks.all()}
        for name in tasks | {container.id for container in await client.containers.all()}:
            await end_task(client, name)
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
    with suppress(OSError):
        (RUNC / namespace).rmdir()  # stays empty, where containerd is on this machine


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
    rooms = [f"serpentine.{room}" for room in ("pull", "registry", "containerd", "upkeep")]
    with blockbuster_ctx(scanned_modules=rooms) as watch:
        # grpcio and asyncio take locks that nobody holds for long.
        watch.functions["threading.Lock.acquire"].deactivate()
        yield
