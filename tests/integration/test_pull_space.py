"""A disk that is too small: told before the download, or in the middle, and gone on from there."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import uuid

import pytest

import serpentine
from serpentine.containerd import Containerd
from serpentine.errors import NoSpace
from serpentine.events import PullNotice
from serpentine.model.reference import Reference
from serpentine.pull.space import Need
from serpentine.settings import Settings
from tests.conftest import CONTAINERDS
from tests.integration.run.conftest import contained
from tests.support.faulty import FaultyRegistry
from tests.support.images import file, image, layer, noise
from tests.support.servers import ContainerdServer

MIB = 1 << 20
SIZE = 40


class SmallContainerd(ContainerdServer):
    """Its root directory is a disk of its own, of some MiB."""

    def start(self):
        self.root.mkdir()
        self._mount(f"size={SIZE}m")
        return super().start()

    def resize(self, size: int) -> None:
        self._mount(f"remount,size={size}m")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "spt", self.root], check=True)

    def release(self) -> None:
        super().release()
        subprocess.run(["umount", "-l", self.root], check=False)


@pytest.fixture(params=list(CONTAINERDS.values()), ids=list(CONTAINERDS))
def small(request):
    with SmallContainerd(request.param) as server:
        yield server


@pytest.fixture
def settings(small, tmp_path):
    return Settings(
        address=small.address, namespace=f"test-{uuid.uuid4().hex[:8]}", data_dir=tmp_path
    )


@pytest.fixture
def registry():
    with FaultyRegistry() as opened:
        yield opened


async def pull(settings, reference, **more):
    notices = []

    def on_event(event):
        if isinstance(event, PullNotice):
            notices.append(event.text)

    async with serpentine.connect(settings=settings) as engine:
        return await engine.pull_image(reference, on_event=on_event, **more), notices


async def left(small, settings):
    async with Containerd(small.endpoint, namespace=settings.namespace) as c:
        return (
            [lease.labels for lease in await c.leases.all()],
            [status.ref for status in await c.content.list_statuses()],
            [s.name for s in await c.snapshots("overlayfs").all()],
        )


async def test_what_cannot_fit_is_refused_before_the_download(small, settings, registry):
    made = image([layer([file("a", noise("space", 30 * MIB))])])
    reference = registry.add(made, "a/b", "1")
    with pytest.raises(NoSpace) as caught:
        await pull(settings, reference)
    text = str(caught.value)
    assert text.startswith(f"{reference} does not fit: it needs 31.5 MB")
    assert "are free where containerd keeps them" in text
    assert caught.value.hint.startswith("make room there")
    assert not registry.seen(what="blob")
    assert await left(small, settings) == ([], [], [])
    # With room, or when it is not to be looked at, it is another matter.
    small.resize(200)
    await pull(settings, reference)


async def test_what_may_not_fit_is_told(small, settings, registry):
    made = image([layer([file("a", noise("likely", 14 * MIB))])])
    reference = registry.add(made, "a/b", "1")
    _, notices = await pull(settings, reference)
    assert len(notices) == 1
    assert "the disk may become full" in notices[0]


def test_the_command_says_it_in_one_line(small, settings, registry, monkeypatch):
    made = image([layer([file("a", noise("line", 30 * MIB))])])
    reference = registry.add(made, "a/b", "1")
    done = subprocess.run(
        [sys.executable, "-m", "serpentine", "--address", small.address, "pull", "-q", reference],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "does not fit" in done.stderr


async def test_full_while_it_downloads(small, settings, registry):
    """Done when 6: a clear error, and with room nothing is fetched again."""
    made = image([layer([file(n, noise(n, 14 * MIB))]) for n in "abcd"])
    reference = registry.add(made, "a/b", "1")
    blind = Settings(
        address=settings.address,
        namespace=settings.namespace,
        data_dir=settings.data_dir,
        check_space=False,
    )
    with pytest.raises(NoSpace):
        await pull(blind, reference)
    leases, _, snapshots = await left(small, settings)
    assert [labels["io.serpentine/pull"] for labels in leases] == [reference]
    assert not [name for name in snapshots if name.startswith("extract")]
    small.resize(400)
    await pull(blind, reference)
    registry.settle()
    again = {digest: registry.served_again(digest) for digest in made.blobs}
    assert sum(again.values()) <= len(again) * MIB, again
    leases, ingests, snapshots = await left(small, settings)
    assert (leases, ingests, len(snapshots)) == ([], [], 4)


async def test_full_while_it_unpacks(small, settings, registry):
    """What compresses well is only seen to be too large when it is unpacked."""
    made = image([layer([file("a", noise("u", MIB))]), layer([file("b", bytes(100 * MIB))])])
    reference = registry.add(made, "a/b", "1")
    with pytest.raises(NoSpace):
        await pull(settings, reference)
    leases, _, snapshots = await left(small, settings)
    assert len(leases) == 1
    assert not [name for name in snapshots if name.startswith("extract")]
    small.resize(400)
    await pull(settings, reference)
    registry.settle()
    again = {r.digest: registry.served_again(r.digest) for r in registry.seen(what="blob")}
    assert len(again) == 2
    assert set(again.values()) == {0}, again
    leases, ingests, snapshots = await left(small, settings)
    assert (leases, ingests, len(snapshots)) == ([], [], 2)


@pytest.mark.parametrize("kind", ["docker", "docker-envoy"])
def test_in_a_container(request, mirror, kind):
    """Over the socket by its process, behind Envoy by its container; both know the volume."""
    with contained(request, mirror, kind) as server:

        async def work():
            async with server.connect(namespace="test-space") as engine:
                reference = Reference.parse("example.org/a/b:1")
                await engine._check_space(Need(1 << 20, 1 << 20, 1 << 20), reference, fail)
                with pytest.raises(NoSpace) as caught:
                    await engine._check_space(Need(1 << 50, 1 << 50, 1 << 50), reference, fail)
                roots = await engine.containerd.introspection.roots("overlayfs")
                return str(caught.value), roots

        def fail(event):
            raise AssertionError(event)

        text, roots = asyncio.run(work())
        daemon = server.daemon
        told = daemon.engine.run(
            *("exec", daemon.names.containerd, "stat", "-f", "-c", "%f %S", roots[-1])
        )
        blocks, size = map(int, told.split())
        there = float(re.search(r"([0-9.]+) GB are free", text)[1]) * 1e9
        assert there == pytest.approx(blocks * size, rel=0.05)
