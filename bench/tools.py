"""The programs that pull: each with its daemon, its command, and a way to forget what it pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.support.engines import DockerServer
from tests.support.servers import ContainerdServer

NAMESPACE = "bench"


class Tool:
    """One of them.  daemon: the process whose time on the processors counts, if there is one."""

    name = ""
    daemon: int | None = None
    environ: Mapping[str, str] = {}

    def command(self, reference: str) -> list[str]:
        """Return what its user would type."""
        raise NotImplementedError

    def forget(self, reference: str) -> None:
        """Remove the image and all that came with it."""
        raise NotImplementedError


class OnContainerd(Tool):
    """A client of a containerd."""

    def __init__(self, server: ContainerdServer) -> None:
        self.server = server
        self.daemon = server.pid

    def forget(self, reference: str) -> None:
        self.server.ctr("images", "rm", "--sync", reference, namespace=NAMESPACE)
        left = self.server.ctr("content", "ls", "-q", namespace=NAMESPACE).split()
        assert not left, f"not cold: {left}"


class Ctr(OnContainerd):
    name = "ctr"

    def command(self, reference: str) -> list[str]:
        # ctr of 2.x leaves the pull to the daemon unless told otherwise, and then ignores
        # --plain-http for unpacking options; --local is the way that 1.6 has, too.
        local = ["--local"] if self.server.version.startswith("2.") else []
        ctr = [str(self.server.binary.parent / "ctr"), "-a", self.server.address, "-n", NAMESPACE]
        return [*ctr, "images", "pull", *local, "--plain-http", reference]


class Serpentine(OnContainerd):
    name = "serpentine"

    def __init__(self, server: ContainerdServer, unpacks: int = 1) -> None:
        super().__init__(server)
        if unpacks > 1:
            self.name = f"serpentine, {unpacks} unpacks"
        self.environ = {"SERPENTINE_MAX_UNPACKS": str(unpacks)}

    def command(self, reference: str) -> list[str]:
        ours = [sys.executable, "-m", "serpentine", "-a", self.server.address, "-n", NAMESPACE]
        return [*ours, "pull", "-q", reference]


class Docker(Tool):
    name = "docker"

    def __init__(self, server: DockerServer) -> None:
        self._client = server.client
        self.daemon = server.pid

    def command(self, reference: str) -> list[str]:
        return [*self._client, "pull", "-q", reference]

    def forget(self, reference: str) -> None:
        subprocess.run([*self._client, "rmi", reference], check=True, capture_output=True)


class Podman(Tool):
    """It has no daemon: all that it uses is its own."""

    name = "podman"

    def __init__(self, folder: Path) -> None:
        self._podman = ["podman", f"--root={folder / 'data'}", f"--runroot={folder / 'run'}"]

    def command(self, reference: str) -> list[str]:
        return [*self._podman, "pull", "-q", "--tls-verify=false", reference]

    def forget(self, reference: str) -> None:
        subprocess.run([*self._podman, "rmi", reference], check=True, capture_output=True)


def engines(stack: ExitStack) -> list[Tool]:
    """Start the engines that have no containerd of ours; say which are not on this machine."""
    found: list[Tool] = []
    if shutil.which("dockerd"):
        found.append(Docker(stack.enter_context(DockerServer())))
    else:
        print("LEFT OUT: docker is not on this machine")
    if shutil.which("podman"):
        folder = Path(tempfile.mkdtemp(prefix="spt-"))

        def remove() -> None:
            # The layers are mounted below it while podman runs, and some time after.
            subprocess.run(["umount", "-l", folder / "data" / "overlay"], check=False, stderr=-3)
            shutil.rmtree(folder, ignore_errors=True)

        stack.callback(remove)
        found.append(Podman(folder))
    else:
        print("LEFT OUT: podman is not on this machine")
    if not shutil.which("buildkitd"):
        print("LEFT OUT: buildkit is not on this machine")
    return found


def decompress_with(name: str) -> None:
    """Let all daemons that are started from now on use this program, or what they have built in."""
    for variable in ("CONTAINERD_DISABLE_IGZIP", "CONTAINERD_DISABLE_PIGZ", "MOBY_DISABLE_PIGZ"):
        if name == "igzip":
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = "1"
