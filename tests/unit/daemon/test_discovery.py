"""Which ways to have a containerd come into question, and what is said when there is none."""

import pytest

from serpentine.daemon import discovery
from serpentine.daemon.candidates import USUAL, Candidate
from serpentine.daemon.discovery import Host, Option, find, options
from serpentine.errors import DaemonNotFound
from serpentine.events import ignore
from serpentine.settings import Settings, load

ROOT = Host("linux", True, containerd="/usr/bin/containerd", runc="/usr/sbin/runc")
USER = Host("linux", False, containerd=None, runc=None, podman="/usr/bin/podman")
MAC = Host("darwin", False, containerd=None, runc=None)
WINDOWS = Host("win32", False, containerd=None, runc=None)


def kinds(settings, host, **more):
    """Return the kinds in order, each once for its usual places."""
    found = options(settings, host, **more)
    return list(dict.fromkeys((o.kind, o.candidate is not None) for o in found if not o.problem))


class TestOrder:
    def test_docker_then_podman_then_with_root_a_child_process(self):
        assert kinds(Settings(), ROOT) == [
            ("docker", True),
            ("podman", True),
            ("embedded", False),
        ]

    def test_without_root_no_child_process(self):
        assert kinds(Settings(), USER) == [("docker", True), ("podman", True)]
        last = options(Settings(), USER)[-1]
        assert last.kind == "podman"
        assert "podman on the PATH" in last.candidate.source

    def test_a_podman_that_we_must_serve_comes_after_the_child_process(self):
        host = Host("linux", True, containerd="/c", runc="/r", podman="/p")
        assert [o.kind for o in options(Settings(), host)][-2:] == ["embedded", "podman"]

    @pytest.mark.parametrize("daemon", ["docker", "podman", "embedded"])
    def test_a_kind_that_was_asked_for_is_the_only_one(self, daemon):
        found = options(Settings(daemon=daemon), ROOT)
        assert {o.kind for o in found} == {daemon}

    def test_who_names_a_docker_gets_that_or_an_error(self):
        found = options(Settings(docker_host="unix:///mine.sock"), ROOT)
        assert [(o.kind, o.candidate.url) for o in found] == [("docker", "unix:///mine.sock")]

    def test_who_names_a_podman_gets_that_or_an_error(self):
        found = options(Settings(podman_host="unix:///mine.sock"), USER)
        assert [(o.kind, o.candidate.url) for o in found] == [("podman", "unix:///mine.sock")]

    def test_on_a_mac_docker_and_the_machine_of_podman(self):
        found = options(Settings(), MAC, machine="unix:///machine.sock")
        usable = [o for o in found if not o.problem]
        assert usable[-1].candidate.url == "unix:///machine.sock"
        assert "containerd does not run on darwin" in found[-1].problem

    def test_on_windows_a_pipe(self):
        found = options(Settings(), WINDOWS)
        assert found[0].candidate.url == "npipe:////./pipe/docker_engine"
        assert kinds(Settings(), WINDOWS) == [("docker", True)]


class TestEmbedded:
    @pytest.mark.parametrize(
        ("host", "named"),
        [
            (Host("linux", True, None, "/r"), "containerd not found"),
            (Host("linux", True, "/c", None), "runc not found"),
            (Host("linux", True, None, None), "containerd and runc not found"),
            (Host("linux", False, "/c", "/r"), "only root"),
            (Host("darwin", True, "/c", "/r"), "darwin"),
            (Host("win32", False, None, None), "win32"),
        ],
    )
    def test_what_is_in_the_way_is_named(self, host, named):
        (option,) = options(Settings(daemon="embedded"), host)
        assert named in option.problem

    def test_it_has_no_envoy(self):
        (option,) = options(Settings(daemon="embedded", transport="envoy"), ROOT)
        assert "Envoy needs Docker or Podman" in option.problem


class TestFind:
    async def test_an_address_wins_and_its_source_is_told(self):
        environ = {"CONTAINERD_ADDRESS": "/x.sock"}
        found = await find(load({}, environ), on_event=ignore)
        assert (found.kind, found.transport) == ("address", "socket")
        assert "CONTAINERD_ADDRESS" in found.reason
        found = await find(load({"address": "/y.sock"}, environ), on_event=ignore)
        assert found.reason == "an address was given"
        assert found.endpoint.socket_path == "/y.sock"

    async def test_all_that_was_tried_is_named_with_a_remedy(self, monkeypatch, tmp_path):
        # Not the usual places: a Docker may be there on the machine of the test.
        there = [
            Option("docker", Candidate("docker", f"unix://{tmp_path}/docker.sock", USUAL)),
            Option("embedded", problem="only root can start one"),
        ]
        monkeypatch.setattr(discovery, "options", lambda *_, **__: there)
        settings = Settings(data_dir=tmp_path / "data", run_dir=tmp_path / "run")
        with pytest.raises(DaemonNotFound) as caught:
            await find(settings, on_event=ignore)
        text = str(caught.value)
        assert "embedded: only root can start one" in text
        assert f"docker: no socket at {tmp_path}/docker.sock" in text
        assert "Docker" in caught.value.hint
        assert "--address" in caught.value.hint
        assert not list(tmp_path.iterdir())

    async def test_an_engine_that_was_named_and_is_not_there(self, tmp_path):
        settings = Settings(
            docker_host=f"unix://{tmp_path}/no.sock",
            data_dir=tmp_path / "data",
            run_dir=tmp_path / "run",
        )
        with pytest.raises(DaemonNotFound, match=r"no\.sock: there is no such socket"):
            await find(settings, on_event=ignore)
