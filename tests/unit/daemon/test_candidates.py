"""Where a Docker or a Podman is looked for, on each system."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from serpentine.daemon.api import ping
from serpentine.daemon.candidates import (
    Candidate,
    docker_candidates,
    machine_url,
    podman_candidates,
)
from serpentine.errors import DaemonFailed, DaemonUnreachable
from serpentine.settings import Settings, load

HOME = Path("/home/me")


def urls(found):
    return [candidate.url for candidate in found]


class TestDocker:
    def test_on_linux_the_usual_sockets(self):
        found = docker_candidates(Settings(), {"XDG_RUNTIME_DIR": "/run/user/7"}, HOME, "linux")
        assert urls(found)[:2] == ["unix:///var/run/docker.sock", "unix:///run/user/7/docker.sock"]
        assert f"unix://{HOME}/.docker/desktop/docker.sock" in urls(found)
        assert all(c.is_guess and not c.is_remote and not c.problem for c in found)
        assert not any(
            "/run/user" in url for url in urls(docker_candidates(Settings(), {}, HOME, "linux"))
        )

    def test_on_a_mac_those_of_its_engines(self):
        found = urls(docker_candidates(Settings(), {}, HOME, "darwin"))
        for engine in (".docker/run", ".colima/default", ".orbstack/run", ".rd"):
            assert f"unix://{HOME}/{engine}/docker.sock" in found

    def test_on_windows_the_pipe(self):
        (found,) = docker_candidates(Settings(), {}, HOME, "win32")
        assert found.url == "npipe:////./pipe/docker_engine"
        assert found.path is None
        assert not found.is_guess

    @pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
    def test_a_named_one_is_the_only_one_and_its_source_is_told(self, system):
        settings = load({}, {"DOCKER_HOST": "unix:///mine.sock", "HOME": "/nowhere"})
        (found,) = docker_candidates(settings, {}, HOME, system)
        assert found == Candidate("docker", "unix:///mine.sock", "DOCKER_HOST")
        assert found.path == "/mine.sock"
        assert not found.is_guess


class TestContexts:
    @pytest.fixture
    def folder(self, tmp_path):
        return tmp_path / ".docker"

    def make(self, folder, name, host):
        path = folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
        path.mkdir(parents=True)
        text = json.dumps({"Name": name, "Endpoints": {"docker": {"Host": host}}})
        (path / "meta.json").write_text(text)

    def look(self, folder, settings=None, environ=None):
        return docker_candidates(settings or Settings(), environ or {}, folder.parent, "linux")

    def test_the_current_one(self, folder):
        self.make(folder, "mine", "unix:///mine.sock")
        (folder / "config.json").write_text('{"currentContext": "mine"}')
        (found,) = self.look(folder)
        assert (found.url, found.context, found.problem) == ("unix:///mine.sock", None, None)
        assert "current context" in found.source
        assert "mine" in found.source

    def test_one_that_was_chosen_wins_over_the_current_one(self, folder):
        self.make(folder, "mine", "unix:///mine.sock")
        self.make(folder, "other", "unix:///other.sock")
        (folder / "config.json").write_text('{"currentContext": "mine"}')
        (found,) = self.look(folder, load({}, {"DOCKER_CONTEXT": "other", "HOME": "/nowhere"}))
        assert found.url == "unix:///other.sock"
        assert found.source == "DOCKER_CONTEXT: other"

    def test_a_named_host_wins_over_both(self, folder):
        self.make(folder, "mine", "unix:///mine.sock")
        settings = Settings(docker_host="unix:///named.sock", docker_context="mine")
        assert urls(self.look(folder, settings)) == ["unix:///named.sock"]

    def test_its_files_of_tls_are_found_by_its_name(self, folder):
        self.make(folder, "tls", "tcp://127.0.0.1:2376")
        (found,) = self.look(folder, Settings(docker_context="tls"))
        assert (found.url, found.context) == ("tcp://127.0.0.1:2376", "tls")

    def test_one_of_another_machine(self, folder):
        self.make(folder, "far", "ssh://me@192.0.2.1")
        (found,) = self.look(folder, Settings(docker_context="far"))
        assert found.is_remote

    def test_one_that_does_not_exist(self, folder):
        (found,) = self.look(folder, Settings(docker_context="none"))
        assert found.problem == "there is no context 'none'"

    def test_docker_config_says_where_they_are(self, tmp_path, folder):
        other = tmp_path / "elsewhere"
        self.make(other, "mine", "unix:///mine.sock")
        (other / "config.json").write_text('{"currentContext": "mine"}')
        found = self.look(folder, environ={"DOCKER_CONFIG": str(other)})
        assert urls(found) == ["unix:///mine.sock"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            '{"currentContext": 7}',
            '{"currentContext": ""}',
            '{"currentContext": "default"}',
            "{}",
        ],
    )
    def test_without_a_current_one_the_usual_places(self, folder, text):
        folder.mkdir()
        (folder / "config.json").write_text(text)
        assert self.look(folder)[0].is_guess

    @pytest.mark.parametrize("host", [7, None, "nonsense"])
    def test_one_whose_host_is_none(self, folder, host):
        self.make(folder, "odd", host)
        (found,) = self.look(folder, Settings(docker_context="odd"))
        assert "no address" in found.problem


class TestPodman:
    def test_on_linux_the_users_own_then_the_systems(self):
        environ = {"XDG_RUNTIME_DIR": "/run/user/7"}
        found = podman_candidates(Settings(), environ, "linux", is_root=False)
        assert urls(found) == [
            "unix:///run/user/7/podman/podman.sock",
            "unix:///run/podman/podman.sock",
        ]
        assert all(c.is_guess for c in found)

    def test_for_root_the_systems(self):
        environ = {"XDG_RUNTIME_DIR": "/run/user/0"}
        found = podman_candidates(Settings(), environ, "linux", is_root=True)
        assert urls(found) == ["unix:///run/podman/podman.sock"]

    @pytest.mark.parametrize("system", ["darwin", "win32"])
    def test_elsewhere_its_machine(self, system):
        assert podman_candidates(Settings(), {}, system, is_root=False) == []
        found = podman_candidates(Settings(), {}, system, is_root=False, machine="unix:///m.sock")
        assert [(c.url, c.source) for c in found] == [("unix:///m.sock", "podman machine")]

    def test_a_named_one_is_the_only_one(self):
        settings = Settings(podman_host="unix:///p.sock")
        found = podman_candidates(settings, {}, "darwin", is_root=False, machine="unix:///m.sock")
        assert urls(found) == ["unix:///p.sock"]

    @pytest.mark.parametrize(
        ("machines", "url"),
        [
            ([{"ConnectionInfo": {"PodmanSocket": {"Path": "/tmp/p.sock"}}}], "unix:///tmp/p.sock"),
            (
                [{"ConnectionInfo": {"PodmanSocket": None, "PodmanPipe": {"Path": r"\\.\pipe\p"}}}],
                "npipe:////./pipe/p",
            ),
            (
                [{"ConnectionInfo": {}}, {"ConnectionInfo": {"PodmanSocket": {"Path": "/2"}}}],
                "unix:///2",
            ),
            ([], None),
            ([{}], None),
            (["x"], None),
            ({}, None),
            (None, None),
            ([{"ConnectionInfo": {"PodmanSocket": {}}}], None),
        ],
    )
    def test_what_its_machine_says(self, machines, url):
        assert machine_url(machines) == url


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "remote"),
        [
            ("", False),
            ("unix:///a.sock", False),
            ("npipe:////./pipe/x", False),
            ("tcp://127.0.0.1:2375", False),
            ("tcp://localhost:2375", False),
            ("http://[::1]:2375", False),
            ("tcp://192.0.2.1:2375", True),
            ("https://docker.example", True),
            ("tcp://127.0.0.1.example:2375", True),
            # Its own loopback is not ours, whatever it is called.
            ("ssh://me@localhost", True),
            ("tcp://[half", True),
        ],
    )
    async def test_of_another_machine_are_known_before_they_are_contacted(self, url, remote):
        candidate = Candidate("docker", url, "test")
        assert candidate.is_remote is remote
        if remote:
            with pytest.raises(DaemonFailed, match="is on another machine") as caught:
                await ping(candidate)
            assert caught.value.hint

    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            "/var/run/docker.sock",
            "unix://",
            "tcp://",
            "ftp://127.0.0.1",
            "tcp://[half",
            "tcp://127.0.0.1:99999",
            "tcp://127.0.0.1:x",
        ],
    )
    async def test_that_are_none_are_said_to_be_none(self, url):
        named = (
            *docker_candidates(Settings(docker_host=url), {}, HOME, "linux"),
            *podman_candidates(Settings(podman_host=url), {}, "linux", is_root=False),
        )
        assert len(named) == 2
        for found in named:
            assert found.url == ""
            with pytest.raises(DaemonUnreachable, match="which is no address") as caught:
                await ping(found)
            assert repr(url) in str(caught.value)
