"""Our containerd in a real Docker and a real Podman: brought up, found again, mended, removed."""

from __future__ import annotations

import shutil

import pytest

from serpentine.daemon.container import CAPABILITIES
from tests.integration.daemon.conftest import error_of, until
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import busybox_layer, file, image, layer, noise, push

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def pulled(serpentine, registry):
    """A running daemon with an image in it; returns the image's reference."""
    made = image([layer([file("greeting", "hello")])])
    reference = push(registry, "container/one", "1", made)
    serpentine.done("pull", "--quiet", reference)
    return reference


def images(serpentine) -> list[str]:
    return serpentine.done("images", "-q").out.split()


def kill_containerd(serpentine) -> None:
    """Kill containerd inside its container, with nothing said."""
    ours = serpentine.ours
    ours.engine.run("exec", ours.names.containerd, "sh", "-c", "kill -9 $(pidof containerd)")
    until(lambda: not serpentine.state()["State"]["Running"])


def test_started_found_and_described(serpentine, ours):
    first = serpentine.done("daemon", "start", "--json")
    found = first.json
    assert (found["kind"], found["transport"]) == (ours.engine.kind, "socket")
    assert found["endpoint"] == f"unix://{ours.folder}/run/engine/containerd.sock"
    assert found["containerd_version"]
    assert found["snapshotter"] == "overlayfs"
    assert found["running"] is True
    assert ours.engine.kind.capitalize() in found["reason"]
    assert "starting containerd" in first.err

    state = serpentine.state()
    again = serpentine.done("daemon", "start", "--json")
    assert (again.json, again.err) == (found, "")
    status = serpentine.done("daemon", "status", "--json")
    assert (status.json, status.err) == (found, "")
    assert serpentine.state()["Id"] == state["Id"]
    assert serpentine.state()["State"]["StartedAt"] == state["State"]["StartedAt"]
    serpentine.assert_single()

    host = state["HostConfig"]
    assert host["Privileged"] is False
    given = {name.removeprefix("CAP_") for name in host["CapAdd"]}
    status = ours.engine.run(
        "exec", ours.names.containerd, "sh", "-c", "grep CapEff /proc/1/status; id -u"
    )
    assert status.split()[2] == "0"
    # Docker names what was added, Podman what its default lacks.
    assert given <= set(CAPABILITIES)
    assert int(status.split()[1], 16).bit_count() == len(CAPABILITIES)
    labels = state["Config"]["Labels"]
    assert labels["io.serpentine.owner"] == ours.names.owner
    assert labels["io.serpentine.transport"] == "socket"


def test_one_that_was_stopped_is_started(serpentine, ours, pulled):
    before = serpentine.id
    ours.engine.run("stop", ours.names.containerd)
    down = serpentine("daemon", "status", "--json")
    assert (down.status, down.json["running"]) == (1, False)
    assert down.json["kind"] == ours.engine.kind
    assert images(serpentine) == [pulled]

    assert serpentine.done("daemon", "stop", "--json").json == {"stopped": True}
    assert serpentine.state()["State"]["Running"] is False
    second = serpentine.done("daemon", "stop")
    assert (second.out, second.err) == ("", "our own containerd is not running\n")
    assert "ended with status" not in serpentine.done("daemon", "start").err
    assert images(serpentine) == [pulled]
    assert serpentine.id == before
    serpentine.assert_single()


def test_one_that_crashed_is_started_and_its_last_words_are_shown(serpentine, ours, pulled):
    before = serpentine.id
    kill_containerd(serpentine)
    last = ours.engine.run("logs", "--tail", "1", ours.names.containerd, check=False).strip()
    started = serpentine.done("daemon", "start")
    assert "containerd had ended with status 137, starting it again" in started.err
    assert last
    assert last in started.err
    assert images(serpentine) == [pulled]
    assert serpentine.id == before


def test_restart_and_logs(serpentine, ours, pulled):
    before = serpentine.state()
    again = serpentine.done("daemon", "restart", "--json").json
    assert again["running"] is True
    after = serpentine.state()
    assert after["Id"] == before["Id"]
    assert after["State"]["StartedAt"] != before["State"]["StartedAt"]
    assert images(serpentine) == [pulled]

    lines = serpentine.done("daemon", "logs", "-n", "3").out.splitlines()
    theirs = ours.engine.run("logs", "--tail", "3", ours.names.containerd, check=False)
    assert sorted(lines) == sorted(theirs.splitlines())
    assert len(lines) == 3

    # Stopped, the last lines are still there.
    serpentine.done("daemon", "stop")
    assert serpentine.done("daemon", "logs", "-n", "1").out.count("\n") == 1
    assert serpentine.done("daemon", "restart", "--json").json["running"] is True
    assert serpentine.state()["Id"] == before["Id"]


def test_another_configuration_replaces_it_and_the_images_stay(serpentine, pulled):
    before = serpentine.id
    serpentine.environ["SERPENTINE_ENVOY_IMAGE"] = "localhost/another:1"
    other = serpentine.done("daemon", "start")
    assert "another configuration" in other.err
    after = serpentine.id
    assert after != before
    assert images(serpentine) == [pulled]
    assert serpentine.id == after
    serpentine.assert_single()


def test_another_transport_replaces_it_and_the_images_stay(serpentine, ours, pulled):
    before = serpentine.id
    found = serpentine.done("--transport", "envoy", "daemon", "start", "--json").json
    assert (found["kind"], found["transport"]) == (ours.engine.kind, "envoy")
    assert found["endpoint"].startswith("127.0.0.1:")
    assert serpentine.id != before
    # What runs is kept, unless another one is asked for.
    assert images(serpentine) == [pulled]
    assert serpentine.done("daemon", "status", "--json").json == found
    serpentine.assert_single(envoy=True)

    assert serpentine.done("--transport", "socket", "images", "-q").out.split() == [pulled]
    serpentine.assert_single()


def test_removed_with_and_without_its_images(serpentine, ours, pulled):
    assert serpentine.done("daemon", "remove", "--json").json == {"removed": True}
    assert ours.engine.containers() == []
    assert ours.engine.volumes() == [ours.names.data_volume]
    assert not (ours.folder / "data" / "daemon.json").exists()
    assert images(serpentine) == [pulled]

    assert serpentine.done("daemon", "remove", "--volumes").err == ""
    serpentine.assert_nothing()
    assert not (ours.folder / "run" / "engine").exists()
    again = serpentine.done("daemon", "remove", "--volumes")
    assert again.err == "there is no containerd of our own to remove\n"
    assert images(serpentine) == []


def test_found_and_removed_without_anything_remembered(serpentine, ours, pulled):
    shutil.rmtree(ours.folder / "data")
    before = serpentine.id
    assert images(serpentine) == [pulled]
    assert serpentine.id == before
    shutil.rmtree(ours.folder / "data")
    assert serpentine.done("daemon", "remove", "--volumes", "--json").json == {"removed": True}
    serpentine.assert_nothing()


@pytest.mark.parametrize("engine_server", ["docker"], indirect=True)
def test_upgrade_builds_from_the_newest_base(serpentine, ours, registry):
    """Only Docker: a Podman takes no base image from a registry without TLS."""
    old, base = ours.environ["SERPENTINE_BASE_IMAGE"], f"{registry.address}/container/base:1"
    run = ours.engine.run
    run("tag", old, base)
    try:
        serpentine.environ["SERPENTINE_BASE_IMAGE"] = base
        reference = push(registry, "container/one", "1", image([layer([file("a", "b")])]))
        serpentine.done("pull", "--quiet", reference)
        before = serpentine.state()

        # A newer one is published; here is still the old one.
        dockerfile = ours.folder / "Dockerfile"
        dockerfile.write_text(f"FROM {old}\nRUN touch /newer\n")
        with dockerfile.open("rb") as file_:
            run("build", "--quiet", "--tag", base, "-", stdin=file_)
        run("push", "--quiet", base)
        run("tag", old, base)
        upgraded = serpentine.done("daemon", "upgrade")
        assert "building the image" in upgraded.err
        assert "another configuration" not in upgraded.err
        after = serpentine.state()
        assert after["Id"] != before["Id"]
        assert after["Image"] != before["Image"]
        run("exec", ours.names.containerd, "test", "-e", "/newer")
        assert images(serpentine) == [reference]
        serpentine.assert_single()
        # The image that it ran from is not kept for ever.
        assert "No such" in run("image", "inspect", before["Image"], check=False)
    finally:
        run("rmi", base, check=False)


def test_an_upgrade_that_fails_leaves_what_there_was(serpentine, ours, pulled, mirror):
    """The base image of the tests is in no registry that could have a newer one."""
    before = serpentine.state()
    missing = ours.folder / "sums"
    text = mirror.sums.read_text()
    missing.write_text(text.replace("runc.amd64", "runc.amd64-of-tomorrow"))
    serpentine.environ["SERPENTINE_RELEASES_SUMS"] = str(missing)
    assert "cannot build" in serpentine.refused("daemon", "upgrade")
    assert "cannot build" in serpentine.refused("images")
    del serpentine.environ["SERPENTINE_RELEASES_SUMS"]
    assert serpentine.state()["Id"] == before["Id"]
    assert serpentine.state()["State"]["StartedAt"] == before["State"]["StartedAt"]
    assert images(serpentine) == [pulled]
    serpentine.assert_single()


@pytest.mark.timeout(180)
def test_twenty_at_once_end_with_one(serpentine, ours):
    """Done when 6."""
    processes = [serpentine.start("images", "--json") for _ in range(20)]
    found = [serpentine.wait(process, 150) for process in processes]
    assert [(f.status, f.out) for f in found] == [(0, found[0].out)] * 20, found
    serpentine.assert_single()
    created = {serpentine.done("daemon", "status", "--json").json["endpoint"] for _ in range(2)}
    assert len(created) == 1


class TestInTheMiddleOfPulls:
    """Done when 4: whatever is killed, the pulls end, and the next command mends it."""

    @pytest.fixture
    def pulls(self, serpentine):
        """Return a function that kills in the middle of two pulls and looks what becomes."""
        with FakeRegistry() as fake:
            self.count = 0

            def survive(kill, *, envoy: bool = False) -> None:
                self.count += 1
                gate = fake.gate()
                references, layers = [], []
                for name in ("a", "b"):
                    big = layer([file("big", noise((self.count, name), 1 << 20))])
                    made = image([busybox_layer(), big])
                    repository = f"kill/{name}{self.count}"
                    references.append(fake.add(repository, "1", made))
                    path = f"{repository}/blobs/{big.digest}"
                    layers.append(f"GET /v2/{path}")
                    answer = Answer(body=big.blob, gate=gate)
                    fake.on(path, lambda _, a=answer, g=gate: None if g.is_set() else a)
                running = [
                    serpentine.start("pull", "--progress", "json", reference)
                    for reference in references
                ]
                until(lambda: all(fake.requests(layer) for layer in layers))
                kill()
                gate.set()
                for process in running:
                    ended = serpentine.wait(process, 40)
                    assert ended.status in (0, 1)
                    if ended.status:
                        told = error_of(ended)
                        assert "try again" in told, told
                for reference in references:
                    serpentine.done("pull", "--quiet", reference)
                assert set(references) <= set(images(serpentine))
                serpentine.assert_single(envoy=envoy)

            yield survive

    def test_behind_a_socket(self, serpentine, ours, pulls):
        name, run = ours.names.containerd, ours.engine.run
        pulls(lambda: kill_containerd(serpentine))
        pulls(lambda: run("rm", "-f", name))
        if ours.engine.kind == "docker":  # slower in Podman, and no different
            pulls(lambda: run("kill", name))

    def test_behind_envoy(self, serpentine, ours, pulls):
        serpentine.environ["SERPENTINE_TRANSPORT"] = "envoy"
        names, run = ours.names, ours.engine.run
        pulls(lambda: run("kill", names.envoy), envoy=True)
        if ours.engine.kind == "docker":
            pulls(lambda: kill_containerd(serpentine), envoy=True)
            pulls(lambda: run("rm", "-f", names.envoy, names.containerd), envoy=True)
