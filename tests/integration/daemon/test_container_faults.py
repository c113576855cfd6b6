"""What can go wrong with our containerd in Docker or Podman: one clear error, or recovery."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.daemon.conftest import error_of, until
from tests.support.engines import BASE, BASE_IMAGE, DockerServer, OurDaemon
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import busybox_layer, file, image, layer, noise, push

pytestmark = pytest.mark.timeout(120)

STRANGER = 54002

# Where the engines behave alike, one is enough: it is our own code that is looked at.
only_docker = pytest.mark.parametrize("engine_server", ["docker"], indirect=True)


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of a few bytes, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        if folder.is_mount():  # the server that used it may have let go of it
            subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file_, contextlib.suppress(OSError):
        while file_.write(bytes(4096)):
            pass


class TestNoEngine:
    def test_without_any_all_that_was_tried_is_named(self, tmp_path):
        """On a machine with nothing: no sockets, no programs."""
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "/bin/sh", "-c"),
                'mount -t tmpfs tmpfs /run && PATH=/nowhere exec "$0" -m serpentine.cli "$@"',
                *(sys.executable, "images"),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            env={k: v for k, v in os.environ.items() if k != "SERPENTINE_DAEMON"},
        )
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        for named in (
            "docker: no socket at /var/run/docker.sock, ",
            "podman: no socket at /run/podman/podman.sock",
            "embedded: containerd and runc not found",
            "start Docker or Podman",
            "--address",
        ):
            assert named in line
        assert not list(Path(os.environ["HOME"]).iterdir())

    @only_docker
    @pytest.mark.parametrize(
        "url", ["tcp://192.0.2.1:2375", "ssh://somebody@192.0.2.1", "https://192.0.2.1"]
    )
    def test_of_another_machine(self, serpentine, ours, url):
        """Refused before anything is sent there: an answer would be waited for until a time-out."""
        for variable, kind in (("DOCKER_HOST", "docker"), ("CONTAINER_HOST", "podman")):
            told = serpentine.refused(
                "images", timeout=4, **{variable: url, "SERPENTINE_DAEMON": kind}
            )
            assert f"{url} ({variable}) is on another machine" in told
            assert "to use an engine of this machine" in told
            assert "--address through a tunnel" in told
        assert not (ours.folder / "data").exists()

    @only_docker
    @pytest.mark.parametrize(
        ("url", "named"),
        [
            ("nonsense", "'nonsense', which is no address"),
            ("tcp://[half", "'tcp://[half', which is no address"),
            ("tcp://127.0.0.1:99999", "which is no address"),
            ("npipe:////./pipe/docker_engine", "only Windows"),
            ("unix:///no/such.sock", "/no/such.sock: there is no such socket"),
            ("tcp://127.0.0.1:1", "127.0.0.1:1"),
        ],
    )
    def test_of_an_address_that_is_none(self, serpentine, url, named):
        assert named in serpentine.refused("images", DOCKER_HOST=url, timeout=4)

    @only_docker
    def test_of_an_address_where_something_else_answers(self, serpentine):
        with FakeRegistry() as other:
            other.on("", Answer(body=b"hello"))
            told = serpentine.refused("images", DOCKER_HOST=f"tcp://{other.address}", timeout=9)
        assert "what answers there is no container engine" in told

    @only_docker
    def test_of_a_socket_where_nobody_answers(self, serpentine, ours):
        with socket.socket(socket.AF_UNIX) as stuck:
            path = ours.folder / "stuck.sock"
            stuck.bind(str(path))
            assert "nothing listens" in serpentine.refused("images", DOCKER_HOST=f"unix://{path}")
            stuck.listen()
            told = serpentine.refused("images", DOCKER_HOST=f"unix://{path}", timeout=15)
            assert "no answer" in told


class TestBuild:
    def test_a_file_with_another_sum_is_refused(self, serpentine, ours, mirror):
        sums = ours.folder / "sums"
        lines = mirror.sums.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith("runc.amd64"))
        lines[at] = f"{0:064x}  {lines[at].split()[1]}"
        sums.write_text("\n".join(lines))
        before = ours.engine.run("images", "-q")
        told = serpentine.refused("daemon", "start", SERPENTINE_RELEASES_SUMS=str(sums))
        assert "cannot build" in told
        assert f"refused: {mirror.url}/opencontainers/runc" in told
        assert "is not the file that is pinned" in told
        serpentine.assert_nothing()
        assert not (ours.folder / "data" / "daemon.json").exists()
        named = set(ours.engine.run("images", "-q").split()) - set(before.split())
        for found in named:
            assert not json.loads(ours.engine.run("image", "inspect", found))[0]["RepoTags"]

    def test_a_download_that_fails_shows_what_was_printed(self, serpentine, mirror):
        # The sums are the same: only where the files come from is not.
        told = serpentine.refused(
            "images",
            SERPENTINE_RELEASES_URL="http://127.0.0.1:1",
            # A context that was never built, or the image would be there.
            SERPENTINE_RELEASES_SUMS=str(_commented(mirror, serpentine.ours.folder)),
        )
        assert "cannot build" in told
        assert "downloading http://127.0.0.1:1/containerd" in told
        assert "curl: (7)" in told
        assert "SERPENTINE_RELEASES_URL" in told
        serpentine.assert_nothing()


def _commented(mirror, folder: Path) -> Path:
    """Return the sums with another comment, which make another image of the same files."""
    path = folder / "commented"
    path.write_text(f"# of {folder.name}\n{mirror.sums.read_text()}")
    return path


class TestFullDisk:
    @only_docker
    def test_of_the_images(self, serpentine, ours, registry):
        """The volume is there already, on a disk that holds the layer, but not unpacked, too."""
        volume = ("--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=4m")
        ours.engine.run("volume", "create", *volume, ours.names.data_volume)
        made = image([layer([file("big", noise("disk", 5 << 19))])])
        reference = push(registry, "faults/disk", "1", made)
        assert "does not fit" in serpentine.refused("pull", reference)
        found = serpentine("pull", reference, SERPENTINE_CHECK_SPACE="0")
        told = error_of(found)
        assert "no space left on device" in told
        assert "make room" in told
        assert serpentine.done("images", "-q").out == ""
        serpentine.assert_single()

    @only_docker
    @pytest.mark.parametrize("transport", ["socket", "envoy"])
    def test_of_our_own_files(self, serpentine, ours, transport):
        data = ours.folder / "data"
        serpentine.environ["SERPENTINE_TRANSPORT"] = transport
        with small_disk(data, "64k"):
            fill(data)
            told = serpentine.refused("images")
            assert str(data) in told
            assert "No space left on device" in told
            assert "SERPENTINE_DATA_DIR" in told
            (data / "filler").unlink()
            serpentine.done("images")
            serpentine.assert_single(envoy=transport == "envoy")

    @pytest.mark.usefixtures("docker")  # or nobody says that it is missing
    def test_of_docker(self, mirror):
        """A Docker whose data is on a disk that holds the base image and no more."""
        folder = Path(tempfile.mkdtemp(prefix="spt-"))
        server = DockerServer()
        try:
            with small_disk(server.folder / "data", "180m"), server:
                server.import_image(BASE, BASE_IMAGE)
                ours = OurDaemon(server, mirror, folder)
                done = subprocess.run(
                    [sys.executable, "-m", "serpentine.cli", "images"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    env={**os.environ, **ours.environ},
                )
                assert done.returncode == 1
                (line,) = done.stderr.splitlines()
                assert "cannot build" in line
                assert "o space left on device" in line
                assert "make room where Docker keeps its data" in line
                assert server.containers() == []
        finally:
            server.close()
            shutil.rmtree(folder)


class TestStaleFiles:
    @only_docker
    def test_a_note_that_is_not_true(self, serpentine, ours):
        serpentine.done("images")
        before = serpentine.id
        note = ours.folder / "data" / "daemon.json"
        good = json.loads(note.read_text())
        for text in (
            "",
            json.dumps({**good, "transport": "pigeon"}),
            json.dumps({**good, "transport": "envoy", "port": "7"}),
            json.dumps({**good, "api": "unix:///no/such.sock", "fingerprint": "another"}),
            json.dumps({**good, "api": "tcp://192.0.2.1:2375", "fingerprint": "another"}),
        ):
            note.write_text(text)
            serpentine.done("images", timeout=15)
            assert json.loads(note.read_text()) == good, text
        assert serpentine.id == before
        serpentine.assert_single()

    @only_docker
    def test_a_note_of_an_engine_that_is_gone_is_no_hindrance(self, serpentine, ours):
        """Where nobody names an engine, the one of the note is asked first."""
        serpentine.done("images")
        note = ours.folder / "data" / "daemon.json"
        state = json.loads(note.read_text())
        ours.engine.run("stop", ours.names.containerd)
        note.write_text(json.dumps({**state, "api": f"unix://{ours.folder}/gone.sock"}))
        serpentine.done("images")
        serpentine.assert_single()

    @only_docker
    def test_a_socket_that_nobody_serves(self, serpentine, ours):
        serpentine.done("images")
        path = ours.folder / "run" / "engine" / "containerd.sock"
        ours.engine.run("kill", ours.names.containerd)
        assert path.is_socket()
        down = serpentine("daemon", "status", "--json")
        assert (down.status, down.json["running"]) == (1, False)
        serpentine.done("images")

        ours.engine.run("stop", ours.names.containerd)
        path.unlink(missing_ok=True)
        path.write_text("not a socket")
        serpentine.done("images")
        serpentine.assert_single()

    def test_the_directory_of_the_socket_deleted_while_it_runs(self, serpentine, ours):
        serpentine.done("images")
        before = serpentine.id
        shutil.rmtree(ours.folder / "run")
        serpentine.done("images")
        assert serpentine.id == before
        shutil.rmtree(ours.folder / "run" / "engine")
        started = serpentine.done("daemon", "start")
        # Seen at once, and not after waiting for an answer.
        assert "starting it anew" not in started.err
        serpentine.assert_single()

    @only_docker
    @pytest.mark.parametrize("name", ["run", "run/engine"])
    def test_a_directory_of_another_user(self, serpentine, ours, name):
        """Its owner could put a socket of theirs into it, and see what is pulled."""
        folder = ours.folder / name
        folder.mkdir(parents=True)
        os.chown(folder, STRANGER, STRANGER)
        told = serpentine.refused("images")
        assert f"{folder} belongs to another user ({STRANGER})" in told
        assert "SERPENTINE_RUN_DIR" in told
        serpentine.assert_nothing()

        os.chown(folder, 0, 0)
        serpentine.done("images")
        os.chown(folder, STRANGER, STRANGER)
        assert "belongs to another user" in serpentine.refused("images")
        os.chown(folder, 0, 0)
        serpentine.done("images")


class TestOthersMeddle:
    def test_paused_in_the_middle_of_a_pull(self, serpentine, ours):
        """The next command lets it go on, and the pull, too."""
        with FakeRegistry() as fake:
            big = layer([file("big", noise("pause", 1 << 20))])
            reference = fake.add("faults/pause", "1", image([busybox_layer(), big]))
            gate = fake.gate()
            fake.on(big.digest, Answer(body=big.blob, gate=gate))
            pull = serpentine.start("pull", "--quiet", reference)
            until(lambda: fake.requests(f"GET .*{big.digest}"))
            before = serpentine.id
            ours.engine.run("pause", ours.names.containerd)
            gate.set()
            started = serpentine.done("daemon", "start")
            assert "was paused" in started.err
            assert serpentine.wait(pull).status == 0
        assert serpentine.id == before

        ours.engine.run("pause", ours.names.containerd)
        assert serpentine.done("daemon", "stop", "--json").json == {"stopped": True}
        assert serpentine.state()["State"]["Running"] is False
        assert serpentine.done("images", "-q").out.strip() == reference

        ours.engine.run("pause", ours.names.containerd)
        serpentine.done("daemon", "remove", "--volumes")
        serpentine.assert_nothing()

    @only_docker
    def test_one_that_is_stuck_is_started_anew(self, serpentine, ours):
        serpentine.done("images")
        before = serpentine.id
        ours.engine.run("exec", ours.names.containerd, "sh", "-c", "kill -STOP $(pidof containerd)")
        started = serpentine.done("daemon", "start", timeout=40)
        assert "does not answer" in started.err
        assert "starting it anew" in started.err
        assert serpentine.id == before
        serpentine.assert_single()

    @only_docker
    def test_the_port_of_envoy_taken_by_somebody(self, serpentine, ours):
        serpentine.environ["SERPENTINE_TRANSPORT"] = "envoy"
        first = serpentine.done("daemon", "start", "--json").json["endpoint"]
        ours.engine.run("stop", ours.names.envoy)
        host, _, port = first.rpartition(":")
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind((host, int(port)))
            squatter.listen()
            serpentine.done("images")
            second = serpentine.done("daemon", "status", "--json").json
            assert second["running"] is True
            assert second["endpoint"] != first
        serpentine.assert_single(envoy=True)

    def test_a_volume_that_is_used_by_somebody(self, serpentine, ours):
        serpentine.done("images")
        volume = f"{ours.names.data_volume}:/data"
        ours.engine.run("create", "--name", "holder", "-v", volume, BASE_IMAGE, "sleep", "1")
        told = serpentine.refused("daemon", "remove", "--volumes")
        assert ours.names.data_volume in told
        assert "use" in told
        assert "remove the container that uses it, then try again" in told
        assert ours.engine.volumes() == [ours.names.data_volume]
        ours.engine.run("rm", "-f", "holder")
        assert serpentine.done("daemon", "remove", "--volumes", "--json").json["removed"] is True
        serpentine.assert_nothing()


NEWER = """
import serpentine._version
serpentine._version.__version__ = "99.1.0"
import serpentine.daemon.container
serpentine.daemon.container.FORMAT = 99
"""


@only_docker
class TestNewer:
    def test_one_of_a_newer_version_is_kept_and_used(self, serpentine, ours, mirror):
        serpentine.done("images", code=NEWER)
        before = serpentine.state()
        assert before["Config"]["Labels"]["io.serpentine.version"] == "99.1.0"
        note = ours.folder / "data" / "daemon.json"
        theirs = note.read_text()
        assert json.loads(theirs)["version"] == "99.1.0"

        # Ours would need an image that is not there: nothing is built, nothing is replaced.
        serpentine.environ["SERPENTINE_RELEASES_SUMS"] = str(_commented(mirror, ours.folder))
        # Images made in the same second are listed in any order.
        tags = sorted(ours.engine.run("images", "--format", "{{.Repository}}:{{.Tag}}").split())
        assert serpentine.done("daemon", "start").err == ""
        note.unlink()
        started = serpentine.done("daemon", "start")
        assert "building" not in started.err
        assert "replacing" not in started.err
        assert note.read_text() == theirs
        ours.engine.run("stop", ours.names.containerd)
        serpentine.done("images")
        after = serpentine.state()
        assert after["Id"] == before["Id"]
        assert after["State"]["Running"] is True
        after = ours.engine.run("images", "--format", "{{.Repository}}:{{.Tag}}")
        assert sorted(after.split()) == tags
        serpentine.assert_single()

    def test_one_of_an_older_version_is_replaced(self, serpentine):
        older = NEWER.replace("99.1.0", "0.0.1")
        serpentine.done("images", code=older)
        before = serpentine.state()
        assert before["Config"]["Labels"]["io.serpentine.version"] == "0.0.1"
        serpentine.done("images")
        after = serpentine.state()
        assert after["Id"] != before["Id"]
        assert after["Config"]["Labels"]["io.serpentine.version"] != "0.0.1"
        serpentine.assert_single()
