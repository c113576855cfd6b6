"""Real servers for tests, the demo and the bench: started on loopback, ended by their pid."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import serpentine
from serpentine.containerd import Endpoint

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


class ServerFailed(Exception):
    """A server did not start; its last lines are in the message."""


def free_port() -> int:
    """Return a port of loopback that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A child process with a private directory; ready when it answers."""

    name = "server"

    def __init__(self) -> None:
        # Short, because a socket's path may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="spt-"))
        self.log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self):
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(f"{self.name} did not start:\n{self.tail()}")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it without warning."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stop it and remove what it left."""
        self.stop()
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Let go of what would keep the folder from being removed."""

    def tail(self, lines: int = 20) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def __enter__(self):
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class ContainerdServer(Server):
    """A containerd of our own, with the ctr and the shim that belong to it."""

    name = "containerd"

    def __init__(self, binary: str | Path, *, path: str | None = None) -> None:
        super().__init__()
        self.binary = Path(binary)
        self.path = path or f"{self.binary.parent}:{os.environ['PATH']}"
        self.root = self.folder / "root"
        self.state = self.folder / "state"
        self.socket = self.folder / "c.sock"
        words = subprocess.run(
            [self.binary, "--version"], capture_output=True, text=True, check=True
        ).stdout.split()
        self.version = next(w for w in words if re.match(r"v?\d+\.\d+\.\d+", w)).lstrip("v")

    @property
    def address(self) -> str:
        return str(self.socket)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.parse(self.address)

    @property
    def environ(self) -> dict[str, str]:
        """What the command line must read to use it."""
        return {"CONTAINERD_ADDRESS": self.address}

    def here(self, text: str) -> str:
        """Translate containerd's paths into this machine's: they are the same."""
        return text

    def connect(self, **more: object) -> serpentine.Engine:
        return serpentine.connect(self.address, **more)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": self.path}

    def command(self) -> list[str]:
        config = self.folder / "config.toml"
        config.write_text(
            f"""version = 2
root = {json.dumps(str(self.root))}
state = {json.dumps(str(self.state))}
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime",
  "io.containerd.cri.v1.images", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]
[grpc]
  address = {json.dumps(self.address)}
"""
        )
        return [str(self.binary), "--config", str(config)]

    def answers(self) -> bool:
        return self.socket.exists() and self._ctr("version").returncode == 0

    def _ctr(self, *arguments: str, namespace: str = "default") -> subprocess.CompletedProcess:
        program = self.binary.parent / "ctr"
        return subprocess.run(
            [program, "--address", self.address, "--namespace", namespace, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment(),
        )

    def ctr(self, *arguments: str, namespace: str) -> str:
        """Run ctr against this containerd and return what it prints."""
        done = self._ctr(*arguments, namespace=namespace)
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def release(self) -> None:
        # Root file systems of tasks that were killed stay mounted.
        for line in Path("/proc/mounts").read_text().splitlines():
            target = line.split()[1]
            if target.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", target], check=False, capture_output=True)


class RegistryServer(Server):
    """Debian's docker-registry, storing into a private folder."""

    name = "docker-registry"

    def __init__(
        self,
        *,
        htpasswd: tuple[str, str] | None = None,
        token: dict[str, str] | None = None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """htpasswd: user and password; token: its token settings; tls: certificate and key."""
        super().__init__()
        self.port = free_port()
        self.storage = self.folder / "storage"
        self.htpasswd = htpasswd
        self.token = token
        self.tls = tls

    def start(self):
        # Between choosing a port and listening on it, somebody else may take it.
        for _ in range(5):
            try:
                return super().start()
            except ServerFailed:
                if "address already in use" not in self.tail():
                    raise
                self.port = free_port()
                self.log.unlink()
        return super().start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def command(self) -> list[str]:
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"accesslog": {"disabled": False}, "level": "warn"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
                # Indexes in tests name manifests that are not there.
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": {"addr": self.address, "secret": "only-for-tests"},
            "validation": {"disabled": True},
        }
        if self.tls:
            config["http"]["tls"] = {"certificate": str(self.tls[0]), "key": str(self.tls[1])}
        if self.htpasswd:
            path = self.folder / "htpasswd"
            user, password = self.htpasswd
            done = subprocess.run(
                ["htpasswd", "-Bbn", user, password], capture_output=True, text=True, check=True
            )
            path.write_text(done.stdout)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(path)}}
        if self.token:
            config["auth"] = {"token": self.token}
        path = self.folder / "config.json"
        path.write_text(json.dumps(config))  # JSON is YAML
        return ["docker-registry", "serve", str(path)]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False

    def requests(self) -> list[tuple[str, str, int]]:
        """Return what it has been asked so far: method, path and status."""
        found = re.findall(
            r'"(GET|HEAD|PUT|POST|PATCH|DELETE) (\S+) HTTP/[\d.]+" (\d+)', self.log.read_text()
        )
        return [(method, path, int(status)) for method, path, status in found]

    def fetches(self) -> list[tuple[str, str, int]]:
        """Return what was read from it: GET and HEAD of manifests and blobs."""
        return [r for r in self.requests() if r[0] in ("GET", "HEAD") and r[1] != "/v2/"]


class Recording:
    """Counts what a registry served while a context is open."""

    def __init__(self, registry: RegistryServer) -> None:
        self._registry = registry
        self._before = 0

    def __enter__(self):
        self._before = len(self._registry.fetches())
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        return self._registry.fetches()[self._before :]

    def blobs(self) -> list[str]:
        """Return the digests of the blobs that were downloaded, as often as they were."""
        return [
            path.rpartition("/")[2]
            for method, path, status in self.requests
            if method == "GET" and "/blobs/" in path and status in (200, 206)
        ]


def find_containerds() -> dict[str, Path]:
    """Return the containerds that this machine has: version -> binary, the oldest first.

    From the PATH, from .cache of this checkout (scripts/setup-tests builds the newest there),
    and from SERPENTINE_TEST_CONTAINERD.
    """
    root = Path(__file__).resolve().parents[2]
    candidates = [shutil.which("containerd"), os.environ.get("SERPENTINE_TEST_CONTAINERD")]
    candidates += sorted(map(str, root.glob(".cache/containerd-*/bin/containerd")))
    found: dict[str, Path] = {}
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            server = ContainerdServer(candidate)
            server.close()
            found.setdefault(server.version, Path(candidate))
    return found
