"""Pulls with mirrors: asked in order, passed over when they fail, remembered when they are dead."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from serpentine.errors import RegistryNotFound
from serpentine.events import Received
from serpentine.registry import transport
from serpentine.settings import Settings
from tests.support.faulty import ALWAYS, Fault, FaultyRegistry, Where, layer_sizes
from tests.support.images import file, image, layer, noise


@pytest.fixture
def made():
    return image([layer([file(f"f{n}", noise(f"mirrors {n}", 900_000))]) for n in range(5)])


class Mirrored:
    """A registry with mirrors, as an engine is told of them."""

    def __init__(self, containerd, namespace, tmp_path, monkeypatch, **hosts):
        self.server, self.namespace, self.folder = containerd, namespace, tmp_path
        self.registry = FaultyRegistry(**hosts)
        self.received: list[Received] = []
        monkeypatch.setattr(transport, "CONNECT_TIMEOUT", 4.0)

    def settings(self, **more) -> Settings:
        mirrors = [host.api for name, host in self.registry.hosts.items() if "mirror" in name]
        return Settings(
            **{
                "address": self.server.address,
                "namespace": self.namespace,
                "data_dir": self.folder / "data",
                "stall_timeout": 0.5,
                "max_concurrent_downloads": 5,
                "mirrors": {self.registry.address: tuple(mirrors)},
                **more,
            }
        )

    async def pull(self, reference: str, **more):
        self.received.clear()

        def on_event(event):
            if isinstance(event, Received):
                self.received.append(event)

        async with self.server.connect(settings=self.settings(**more)) as engine:
            return await engine.pull_image(reference, on_event=on_event)

    async def forget(self, reference: str):
        async with self.server.connect(settings=self.settings()) as engine:
            await engine.remove_image(reference)

    def served(self) -> dict[str, int]:
        """Bytes of layers that each host sent, by what the events say."""
        names = {host.address: name for name, host in self.registry.hosts.items()}
        found: Counter[str] = Counter()
        for event in self.received:
            found[names[event.host]] += event.size
        return dict(found)

    def count(self, host: str) -> int:
        return len(self.registry.seen(host=host))


@pytest.fixture
def mirrored(containerd, namespace, tmp_path, monkeypatch):
    opened = Mirrored(containerd, namespace, tmp_path, monkeypatch, mirrors=2)
    with opened.registry:
        yield opened


async def test_the_first_one_serves_everything(mirrored, made):
    reference = mirrored.registry.add(made, "a/b", "1")
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"mirror1"}
    assert mirrored.count("mirror2") == mirrored.count("registry") == 0
    request = mirrored.registry.seen(host="mirror1", what="manifest")[0]
    assert request.target.endswith(f"?ns={mirrored.registry.address.replace(':', '%3A')}")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_one_that_refuses_is_passed_over(mirrored, made, status):
    """Trap 42."""
    reference = mirrored.registry.add(made, "a/b", "1")
    refuse = Fault("status", Where(host="mirror1"), status=status, times=ALWAYS)
    mirrored.registry.faults = [refuse]
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"mirror2"}
    assert mirrored.count("registry") == 0


@pytest.mark.parametrize("kind", ["reset", "silent"])
async def test_a_dead_one_is_not_asked_again(mirrored, made, kind):
    """Not for the next blobs, not by the next process; and again after a while."""
    reference = mirrored.registry.add(made, "a/b", "1")
    dead = Fault(kind, Where("connection", host="mirror1"), times=ALWAYS)
    mirrored.registry.faults = [dead]
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"mirror2"}
    connections = mirrored.registry.hosts["mirror1"].connections
    # Twice: both schemes that a loopback host may have.
    assert len(connections) <= 2
    asked = len(connections)
    await mirrored.forget(reference)
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"mirror2"}
    assert len(connections) == asked
    # When its time is over, it gets another chance.
    mirrored.registry.faults = []
    (note,) = (mirrored.folder / "data" / "registries").glob("*.json")
    noted = json.loads(note.read_text())
    assert noted["dead_until"] > 0
    assert noted["why"]
    note.write_text(json.dumps({**noted, "dead_until": 1.0}))
    await mirrored.forget(reference)
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"mirror1"}


async def test_all_dead_and_the_registry_serves(mirrored, made):
    reference = mirrored.registry.add(made, "a/b", "1")
    mirrored.registry.faults = [
        Fault("reset", Where("connection", host=name), times=ALWAYS)
        for name in ("mirror1", "mirror2")
    ]
    await mirrored.pull(reference)
    assert set(mirrored.served()) == {"registry"}


async def test_a_stalled_layer_goes_on_at_the_next_mirror(mirrored, made):
    """Done when 4: only that one is asked for again, from where it was; the rest stays there."""
    reference = mirrored.registry.add(made, "a/b", "1")
    stalled = next(iter(made.blobs))
    mirrored.registry.faults = [Fault("stall", Where("blob", 0, host="mirror1"), offset=400_000)]
    await mirrored.pull(reference)
    mirrored.registry.settle()
    served = mirrored.served()
    assert set(served) == {"mirror1", "mirror2"}
    assert sum(served.values()) == sum(layer_sizes(made))
    (again,) = mirrored.registry.seen(host="mirror2", what="blob")
    assert again.digest == stalled
    assert again.range == f"bytes={again.offset}-"
    assert again.offset > 0
    assert mirrored.registry.served_again(stalled) <= 1 << 20
    assert [e.offset for e in mirrored.received if e.digest == stalled] == [0, again.offset]


async def test_wrong_bytes_of_a_mirror_are_fetched_elsewhere(mirrored, made, contents):
    reference = mirrored.registry.add(made, "a/b", "1")
    flip = Fault("flip", Where("blob", 2, host="mirror1"), offset=100, times=ALWAYS)
    mirrored.registry.faults = [flip]
    state = await mirrored.pull(reference)
    now = await contents()
    assert state.snapshot_key in now.snapshots
    assert (now.leases, now.ingests) == ([], [])
    assert mirrored.served()["mirror1"] > 0
    assert len(mirrored.served()) == 2


async def test_a_document_that_is_wrong_is_fetched_elsewhere(mirrored, made):
    reference = mirrored.registry.add(made, "a/b", "1")
    flip = Fault("flip", Where("config", host="mirror1"), offset=10, times=ALWAYS)
    mirrored.registry.faults = [flip]
    await mirrored.pull(reference)
    assert mirrored.registry.seen(host="mirror2", what="config")


async def test_what_the_registry_does_not_have_is_its_own_word(mirrored, made):
    mirrored.registry.add(made, "a/b", "1")
    with pytest.raises(RegistryNotFound, match=f"{mirrored.registry.address} does not have|no tag"):
        await mirrored.pull(f"{mirrored.registry.address}/a/b:2")
    assert mirrored.count("mirror1") == mirrored.count("mirror2") == 1


async def test_hosts_toml(containerd, namespace, tmp_path, monkeypatch, made):
    """A mirror with a path, a certificate and a header of its own, that may not resolve tags."""
    opened = Mirrored(
        containerd, namespace, tmp_path, monkeypatch, mirrors=["/mirror/of"], tls=["mirror1"]
    )
    with opened.registry as registry:
        reference = registry.add(made, "a/b", "1")
        place = tmp_path / "certs.d" / registry.address
        place.mkdir(parents=True)
        registry.authority.cert_pem.write_to_path(str(place / "ca.pem"))
        mirror = registry.hosts["mirror1"].api
        (place / "hosts.toml").write_text(f"""
            [host."{mirror}"]
              capabilities = ["pull"]
              override_path = true
              ca = "ca.pem"
              [host."{mirror}".header]
                x-secret = "s3cr3t"
        """)
        await opened.pull(reference, mirrors={}, hosts_dir=tmp_path / "certs.d")
        assert set(opened.served()) == {"mirror1"}
        assert [r.method for r in registry.seen(host="registry")] == ["HEAD"]
        assert all(r.headers["x-secret"] == "s3cr3t" for r in registry.seen(host="mirror1"))
        assert not any("x-secret" in r.headers for r in registry.seen(host="registry"))


def test_a_broken_hosts_toml_is_one_line(command, made, tmp_path):
    with FaultyRegistry() as registry:
        reference = registry.add(made, "a/b", "1")
        place = tmp_path / registry.address
        place.mkdir()
        (place / "hosts.toml").write_text("[host")
        done = command("pull", "-q", reference, SERPENTINE_HOSTS_DIR=str(tmp_path))
        assert done.status == 2
        assert done.err.count("\n") == 1
        assert f"{place / 'hosts.toml'} is not valid TOML" in done.err
        assert not registry.seen()
