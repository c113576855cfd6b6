"""What is decided about our containers: how they are made, kept, replaced, reached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serpentine.daemon import container, envoy
from serpentine.daemon.api import BUILD_TAIL, EngineInfo, _Printed, read_info
from serpentine.daemon.candidates import Candidate
from serpentine.daemon.container import (
    CAPABILITIES,
    ContainerDaemon,
    Names,
    Verdict,
    containerd_container,
    envoy_container,
    judge,
    transport_for,
)
from serpentine.daemon.image import build_context
from serpentine.daemon.state import DaemonState
from serpentine.settings import Settings

DOCKER = EngineInfo("docker", "28", False, False, False, "2", "/var/lib/docker")
PODMAN = replace(DOCKER, kind="podman")
NAMES = Names("0123456789ab")
LIMITS = (("nofile", 1024, 1024), ("nproc", 100, 100))

OURS = {
    "io.serpentine.owner": "me",
    "io.serpentine.version": "1.2.3",
    "io.serpentine.fingerprint": "f",
    "io.serpentine.transport": "socket",
}


def found(status="running", *, labels=OURS, **more):
    """Return a container as an engine describes it."""
    state = {"Status": status, "Running": status == "running", "Paused": status == "paused"}
    return {"Config": {"Labels": labels}, "State": state | more}


class TestJudge:
    @pytest.mark.parametrize(
        ("there", "verdict"),
        [
            (None, Verdict.CREATE),
            (found("running"), Verdict.KEEP),
            (found("exited"), Verdict.START),
            (found("created"), Verdict.START),
            # Podman says of a paused one that it does not run, Docker that it does.
            (found("paused"), Verdict.RESUME),
            (found("paused", Running=True), Verdict.RESUME),
            (found("dead", Dead=True), Verdict.REPLACE),
            (found("removing"), Verdict.REPLACE),
            (found(labels=None), Verdict.REPLACE),
            (found(labels={}), Verdict.REPLACE),
            ({}, Verdict.REPLACE),
        ],
    )
    def test_by_its_state(self, there, verdict):
        assert judge(there, OURS) is verdict

    @pytest.mark.parametrize("status", ["running", "exited", "paused"])
    @pytest.mark.parametrize("name", ["fingerprint", "transport"])
    def test_one_of_another_configuration_is_replaced(self, status, name):
        labels = OURS | {f"io.serpentine.{name}": "another"}
        assert judge(found(status, labels=labels), OURS) is Verdict.REPLACE

    @pytest.mark.parametrize(
        ("version", "kept"),
        [
            ("1.2.4", True),
            ("1.10.0", True),
            ("2.0.0", True),
            ("1.2.3", False),
            ("1.2.2", False),
            ("0.99.99", False),
            ("", False),
            ("nonsense", False),
        ],
    )
    def test_one_of_a_newer_version_is_kept_whatever_its_configuration(self, version, kept):
        labels = OURS | {"io.serpentine.version": version, "io.serpentine.fingerprint": "another"}
        kinds = {"running": Verdict.KEEP, "exited": Verdict.START}
        for status, verdict in kinds.items():
            expected = verdict if kept else Verdict.REPLACE
            assert judge(found(status, labels=labels), OURS) is expected

    def test_one_of_a_newer_version_behind_another_transport_is_replaced(self):
        labels = OURS | {"io.serpentine.version": "9.0.0", "io.serpentine.transport": "envoy"}
        assert judge(found(labels=labels), OURS) is Verdict.REPLACE


class TestTransport:
    @pytest.mark.parametrize(
        ("wanted", "engine", "system", "running", "transport"),
        [
            (None, DOCKER, "linux", None, "socket"),
            (None, replace(DOCKER, is_desktop=True), "linux", None, "envoy"),
            (None, DOCKER, "darwin", None, "envoy"),
            (None, PODMAN, "darwin", None, "envoy"),
            (None, DOCKER, "win32", None, "envoy"),
            # What runs is kept.
            (None, DOCKER, "linux", "envoy", "envoy"),
            (None, DOCKER, "linux", "socket", "socket"),
            # What the user says is done.
            ("envoy", DOCKER, "linux", "socket", "envoy"),
            ("socket", DOCKER, "linux", "envoy", "socket"),
            ("socket", DOCKER, "darwin", None, "socket"),
        ],
    )
    def test_decision(self, wanted, engine, system, running, transport):
        settings = Settings(transport=wanted)
        assert transport_for(settings, engine, system=system, running=running) == transport


def containerd(engine=DOCKER, **more):
    values = {
        "transport": "socket",
        "run_dir": Path("/run/user/1000/serpentine/engine"),
        "ids": (1000, 100),
        "privileged": False,
        "limits": LIMITS,
        "labels": OURS,
    }
    return containerd_container(NAMES, "image:tag", engine, **(values | more))


def mounts(config):
    return {m["Target"]: (m["Type"], m["Source"]) for m in config["HostConfig"]["Mounts"]}


class TestContainerdContainer:
    @pytest.mark.parametrize("engine", [DOCKER, PODMAN])
    def test_it_has_what_it_needs_and_no_more(self, engine):
        config = containerd(engine)
        host = config["HostConfig"]
        assert config["Image"] == "image:tag"
        assert config["Labels"] == OURS
        assert "Privileged" not in host
        assert host["CapDrop"] == ["ALL"]
        assert set(host["CapAdd"]) == set(CAPABILITIES)
        assert not {"ALL", "SYS_MODULE", "SYS_RAWIO", "SYS_BOOT"} & set(host["CapAdd"])
        assert mounts(config) == {
            "/var/lib/containerd": ("volume", NAMES.data_volume),
            "/run/serpentine": ("bind", "/run/user/1000/serpentine/engine"),
            "/sys/fs/cgroup": ("bind", "/sys/fs/cgroup"),
        }
        # Nothing of the network is published; what is run there is not restarted behind our back.
        assert "PortBindings" not in host
        assert "NetworkMode" not in host
        assert host["RestartPolicy"] == {"Name": "no"}
        assert list(host["Tmpfs"]) == ["/run/containerd"]

    def test_the_socket_is_the_users(self):
        assert set(containerd()["Env"]) == {"SOCKET_UID=1000", "SOCKET_GID=100"}

    def test_in_a_rootless_engine_root_inside_is_the_user_outside(self):
        config = containerd(replace(PODMAN, rootless=True))
        assert set(config["Env"]) == {"SOCKET_UID=0", "SOCKET_GID=0"}
        assert "/sys/fs/cgroup" not in mounts(config)
        assert "CgroupnsMode" not in config["HostConfig"]

    def test_behind_envoy_the_socket_is_in_a_volume_and_envoys(self):
        config = containerd(transport="envoy")
        assert mounts(config)["/run/serpentine"] == ("volume", NAMES.run_volume)
        assert set(config["Env"]) == {f"SOCKET_UID={envoy.UID}", f"SOCKET_GID={envoy.UID}"}
        assert "/run/user" not in json.dumps(config)

    @pytest.mark.parametrize("engine", [DOCKER, PODMAN])
    def test_privileged_only_when_asked_for(self, engine):
        host = containerd(engine, privileged=True)["HostConfig"]
        assert host["Privileged"] is True
        assert not {"CapAdd", "CapDrop", "SecurityOpt"} & set(host)

    def test_with_remapped_users_those_of_the_host(self):
        assert containerd(replace(DOCKER, userns=True))["HostConfig"]["UsernsMode"] == "host"
        assert "UsernsMode" not in containerd()["HostConfig"]

    def test_podman_gets_limits_that_the_host_allows_and_no_limit_of_processes(self):
        host = containerd(PODMAN)["HostConfig"]
        assert host["Ulimits"] == [
            {"Name": "nofile", "Soft": 1024, "Hard": 1024},
            {"Name": "nproc", "Soft": 100, "Hard": 100},
        ]
        assert host["PidsLimit"] == -1
        assert "unmask=ALL" in host["SecurityOpt"]
        assert "Ulimits" not in containerd()["HostConfig"]

    def test_docker_keeps_no_endless_log(self):
        assert containerd()["HostConfig"]["LogConfig"]["Config"]["max-size"] == "10m"


class TestEnvoyContainer:
    @pytest.mark.parametrize("engine", [DOCKER, PODMAN])
    def test_it_can_do_nothing_but_pass_on(self, engine):
        config = envoy_container(NAMES, "envoy:1", engine, limits=LIMITS, labels=OURS)
        host = config["HostConfig"]
        assert config["Image"] == "envoy:1"
        assert config["User"] == f"{envoy.UID}:{envoy.UID}"
        assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
        assert "CapAdd" not in host
        (mount,) = host["Mounts"]
        assert (mount["Type"], mount["Source"]) == ("volume", NAMES.run_volume)
        assert mount["ReadOnly"] is True
        # One port, on loopback only, of the engine's choice.
        ((port, bindings),) = host["PortBindings"].items()
        assert port == f"{envoy.PORT}/tcp"
        assert bindings == [{"HostIp": "127.0.0.1", "HostPort": ""}]
        assert "Env" not in config


class TestNames:
    def test_the_same_for_the_same_user_and_directory_only(self):
        base = Names.of(Path("/data"), 1000)
        assert Names.of(Path("/data"), 1000) == base
        others = {Names.of(Path("/data"), 1001), Names.of(Path("/data2"), 1000)}
        assert len(others | {base}) == 3

    def test_containers_differ_and_volumes_differ(self):
        assert NAMES.containerd != NAMES.envoy
        assert NAMES.data_volume != NAMES.run_volume


class TestFingerprint:
    BASE = Settings(run_dir=Path("/run/a"), data_dir=Path("/var/a"))

    def fingerprint(self, **more):
        settings = replace(self.BASE, **more)
        daemon = ContainerDaemon(settings, Candidate("docker", "unix:///d.sock", "test"))
        return daemon.fingerprint(build_context(settings))

    @pytest.mark.parametrize(
        "more",
        [
            {"privileged": True},
            {"base_image": "another:1"},
            {"envoy_image": "another:1"},
            {"run_dir": Path("/run/b")},
        ],
        ids=str,
    )
    def test_changes_with_what_the_containers_are_made_of(self, more):
        assert self.fingerprint(**more) != self.fingerprint()

    @pytest.mark.parametrize(
        "more",
        [
            {"namespace": "another"},
            {"snapshotter": "native"},
            {"releases_url": "https://mirror.example"},
            {"docker_host": "unix:///another.sock"},
            {"daemon": "docker"},
            {"transport": "envoy"},
            {"insecure_registries": ("example.com",)},
        ],
        ids=str,
    )
    def test_does_not_change_with_what_they_are_not(self, more):
        assert self.fingerprint(**more) == self.fingerprint()

    def test_changes_with_the_sums_the_format_and_the_user(self, tmp_path, monkeypatch):
        sums = tmp_path / "sums"
        sums.write_text("# others\n")
        seen = {self.fingerprint(), self.fingerprint(releases_sums=sums)}
        monkeypatch.setattr(container, "FORMAT", container.FORMAT + 1)
        seen.add(self.fingerprint())
        monkeypatch.setattr(container, "_ids", lambda: (54321, 54321))
        seen.add(self.fingerprint())
        assert len(seen) == 4


class TestState:
    GOOD = DaemonState("docker", "socket", "unix:///d.sock", "1.2.3", "f")

    @pytest.mark.parametrize("state", [GOOD, replace(GOOD, transport="envoy", port=1234)])
    def test_written_and_read(self, tmp_path, state):
        path = tmp_path / "daemon.json"
        state.save(path)
        assert DaemonState.load(path) == state
        assert path.stat().st_mode & 0o777 == 0o600
        assert [p.name for p in tmp_path.iterdir()] == ["daemon.json"]

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"7",
            b"[" * 100_000,
            b"\xff\xfe",
            b"{}",
            *(
                json.dumps(
                    {
                        "kind": "docker",
                        "transport": "socket",
                        "api": "unix:///d.sock",
                        "version": "1",
                        "fingerprint": "f",
                    }
                    | change
                ).encode()
                for change in (
                    {"kind": "lxc"},
                    {"kind": None},
                    {"transport": "pigeon"},
                    {"transport": ["socket"]},
                    {"transport": "envoy"},
                    {"transport": "envoy", "port": "7"},
                    {"port": 7},
                    {"api": None},
                    {"version": 1},
                    {"fingerprint": []},
                    {"more": 1},
                )
            ),
        ],
        ids=lambda data: data[:120].decode(errors="replace"),
    )
    def test_what_cannot_be_understood_is_not_believed(self, tmp_path, data):
        path = tmp_path / "daemon.json"
        path.write_bytes(data)
        assert DaemonState.load(path) is None

    def test_none_and_a_directory(self, tmp_path):
        assert DaemonState.load(tmp_path / "none") is None
        assert DaemonState.load(tmp_path) is None


class TestWhatAnEngineSays:
    def test_its_kind_is_in_the_headers(self):
        assert read_info({"Server": "Docker/28"}, {}).kind == "docker"
        assert read_info({"Libpod-API-Version": "4.3.1"}, {}).kind == "podman"

    @pytest.mark.parametrize(
        ("info", "rootless", "userns", "desktop"),
        [
            ({}, False, False, False),
            ({"SecurityOptions": None}, False, False, False),
            ({"SecurityOptions": ["name=seccomp", "name=rootless"]}, True, False, False),
            ({"Rootless": True}, True, False, False),
            ({"SecurityOptions": ["name=userns"]}, False, True, False),
            ({"OperatingSystem": "Docker Desktop"}, False, False, True),
            ({"Name": "colima"}, False, False, True),
        ],
    )
    def test_its_kind_of_root(self, info, rootless, userns, desktop):
        said = read_info({}, info)
        assert (said.rootless, said.userns, said.is_desktop) == (rootless, userns, desktop)


class TestWhatABuilderPrints:
    def test_pieces_become_lines(self):
        """Podman sends what goes to stderr letter by letter, Docker in red."""
        lines = []
        printed = _Printed(lines.append)
        for piece in (
            "Step 1\n",
            *"curl: no\n",
            "\n  \n",
            "\x1b[91mone\ntwo\x1b[0m",
            " three\n",
            "x",
        ):
            printed.take(piece)
        assert lines == printed.tail == ["Step 1", "curl: no", "one", "two three"]
        printed.take("\n")
        assert lines[-1] == "x"

    def test_only_the_last_lines_are_kept(self):
        printed = _Printed(lambda _: None)
        printed.take("".join(f"{n}\n" for n in range(100)))
        assert printed.tail == [str(n) for n in range(100 - BUILD_TAIL, 100)]
