"""The programs that pull: each with its daemon, its command, and a way to forget what it pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.engines import DockerServer
from tests.support.servers import ContainerdServer, Server

NAMESPACE = "bench"
ROOT = Path(__file__).parent.parent
UNPACKS = "max_concurrent_unpacks = 4"
# One layer in parts of 8 MiB over four connections; off as it comes.
RANGES = "concurrent_layer_fetch_buffer = 8388608\nmax_concurrent_downloads = 4"

missing: list[str] = []


def left_out(what: str) -> None:
    """Say what is not measured and why, once."""
    if what not in missing:
        missing.append(what)
        print(f"LEFT OUT: {what}", flush=True)


class Tool:
    """One of them.

    daemons: the processes whose time on the processors counts beside the client's; accepts: the
    compressions that it can read; igzip: whether it can let igzip decompress for it; warm: whether
    a pull of what is there is measured as well.
    """

    name = ""
    daemons: tuple[int, ...] = ()
    environ: Mapping[str, str] = {}
    accepts: tuple[str, ...] = ("gzip", "zstd")
    igzip = True
    warm = True
    began: Path | None = None  # where it says at which moment its time begins, if not at its start

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
        self.daemons = (server.pid,)

    def forget(self, reference: str) -> None:
        self.server.ctr("images", "rm", "--sync", reference, namespace=NAMESPACE)
        for kind in ("content", "snapshots"):
            left = self.server.ctr(kind, "ls", namespace=NAMESPACE).splitlines()[1:]
            assert not left, f"not cold: {left}"


class Ctr(OnContainerd):
    """As it comes: from 2.0 on the daemon pulls (its transfer service), before that ctr itself."""

    name = "ctr"

    def __init__(self, server: ContainerdServer, setting: str = "") -> None:
        super().__init__(server)
        if setting:
            self.name = f"ctr, {setting}"
            self.warm = False

    def command(self, reference: str) -> list[str]:
        ctr = [str(self.server.binary.parent / "ctr"), "-a", self.server.address, "-n", NAMESPACE]
        return [*ctr, "images", "pull", *self.options, "--plain-http", reference]

    @property
    def options(self) -> list[str]:
        return []


class CtrLocal(Ctr):
    """What 1.6 does, with a newer one: the client downloads."""

    def __init__(self, server: ContainerdServer) -> None:
        super().__init__(server, "local")
        self.warm = True

    @property
    def options(self) -> list[str]:
        return ["--local"]


class Configured(ContainerdServer):
    """A containerd whose transfer service is told more (2.2 and newer)."""

    def __init__(self, binary: Path, transfer: str) -> None:
        super().__init__(binary)
        self._transfer = transfer

    def command(self) -> list[str]:
        command = super().command()
        with (self.folder / "config.toml").open("a") as config:
            config.write(f'[plugins."io.containerd.transfer.v1.local"]\n{self._transfer}\n')
        return command


class Serpentine(OnContainerd):
    name = "serpentine"

    def __init__(self, server: ContainerdServer, unpacks: int = 0) -> None:
        super().__init__(server)
        if unpacks:
            self.name = f"serpentine, {unpacks} unpacks" if unpacks > 1 else "serpentine, in order"
            self.environ = {"SERPENTINE_MAX_UNPACKS": str(unpacks)}
            self.warm = False

    def arguments(self, reference: str) -> list[str]:
        return ["-a", self.server.address, "-n", NAMESPACE, "pull", "-q", reference]

    def command(self, reference: str) -> list[str]:
        return [sys.executable, "-m", "serpentine", *self.arguments(reference)]


class Imported(Serpentine):
    """Ours again, without the start of Python and the imports; only warm."""

    name = "serpentine, after imports"

    def __init__(self, server: ContainerdServer) -> None:
        super().__init__(server)
        self.began = server.folder / "began"
        self._modules = server.folder / "modules"

    def command(self, reference: str) -> list[str]:
        files = [str(self._modules), str(self.began)]
        return [sys.executable, "-m", "bench.imported", *files, *self.arguments(reference)]

    def learn(self, reference: str) -> None:
        """Let it find out once what is to be imported."""
        if not self._modules.exists():
            subprocess.run(self.command(reference), check=True, capture_output=True)


class Docker(Tool):
    name = "docker"

    def __init__(self, server: DockerServer) -> None:
        self._client = server.client
        self.daemons = (server.pid,)
        version = server.run("version", "--format", "{{.Server.Version}}")
        if int(version.partition(".")[0]) < 23:
            self.accepts = ("gzip",)

    def command(self, reference: str) -> list[str]:
        return [*self._client, "pull", "-q", reference]

    def forget(self, reference: str) -> None:
        subprocess.run([*self._client, "rmi", reference], check=True, capture_output=True)


class Podman(Tool):
    """It has no daemon: all that it uses is its own, the decompressor among it."""

    name = "podman"
    igzip = False

    def __init__(self, folder: Path) -> None:
        self._podman = ["podman", f"--root={folder / 'data'}", f"--runroot={folder / 'run'}"]

    def command(self, reference: str) -> list[str]:
        return [*self._podman, "pull", "-q", "--tls-verify=false", reference]

    def forget(self, reference: str) -> None:
        subprocess.run([*self._podman, "rmi", reference], check=True, capture_output=True)


class BuildKitServer(Server):
    """buildkitd, which unpacks into a containerd."""

    name = "buildkitd"

    def __init__(self, programs: Path, containerd: ContainerdServer) -> None:
        super().__init__()
        self._containerd = containerd
        self._programs = programs
        self.client = [str(programs / "buildctl"), f"--addr=unix://{self.folder}/b.sock"]

    def command(self) -> list[str]:
        return [
            str(self._programs / "buildkitd"),
            f"--addr=unix://{self.folder}/b.sock",
            f"--root={self.folder / 'root'}",
            "--config=/dev/null",
            "--oci-worker=false",
            "--containerd-worker=true",
            f"--containerd-worker-addr={self._containerd.address}",
            f"--containerd-worker-namespace={NAMESPACE}",
            "--containerd-worker-net=host",
        ]

    def answers(self) -> bool:
        done = subprocess.run(
            [*self.client, "debug", "workers"], check=False, capture_output=True, timeout=60
        )
        return done.returncode == 0


class BuildKit(Tool):
    """The least that makes it unpack: one directory on top.  An image alone is pulled lazily."""

    name = "buildkit"

    def __init__(self, server: BuildKitServer, containerd: ContainerdServer) -> None:
        self._client = server.client
        self._containerd = containerd
        self._folder = server.folder / "context"
        self._folder.mkdir()
        self.daemons = (server.pid, containerd.pid)

    def command(self, reference: str) -> list[str]:
        (self._folder / "Dockerfile").write_text(f"FROM {reference}\nWORKDIR /bench\n")
        build = ["build", "--progress=plain", "--frontend=dockerfile.v0"]
        folders = [f"--local={name}={self._folder}" for name in ("dockerfile", "context")]
        return [*self._client, *build, *folders]

    def forget(self, reference: str) -> None:
        subprocess.run([*self._client, "prune", "--all"], check=True, capture_output=True)
        left = self._containerd.ctr("content", "ls", "-q", namespace=NAMESPACE).split()
        assert not left, f"not cold: {left}"


def buildkit_programs() -> Path | None:
    """Return where buildkitd and buildctl are: of the PATH, or what scripts/buildkit made."""
    if (found := shutil.which("buildkitd")) and shutil.which("buildctl"):
        return Path(found).parent
    made = sorted(ROOT.glob(".cache/buildkit-*/bin/buildkitd"))
    return made[-1].parent if made else None


def versions() -> dict[str, str]:
    """Return what the programs that have no containerd of ours say of themselves."""
    found = {"python": sys.version.split()[0]}
    programs = [shutil.which("dockerd"), shutil.which("podman")]
    if folder := buildkit_programs():
        programs.append(str(folder / "buildkitd"))
    for program in filter(None, programs):
        done = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
        found[Path(program).name] = done.stdout.strip()
    return found


def parallel(version: str) -> bool:
    """Return whether this containerd can unpack several layers at once."""
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 2)


def start(stack: ExitStack, binary: Path, wanted: tuple[str, ...]) -> list[Tool]:
    """Start those of the tools that are wanted; say which cannot be had.  Ours come first."""
    server = stack.enter_context(ContainerdServer(binary))
    tools: list[Tool] = [Serpentine(server)]
    newer = parallel(server.version)
    if "serpentine, in order" in wanted and newer:
        tools.append(Serpentine(server, 1))
    if "ctr" in wanted:
        tools.append(Ctr(server))
    if "ctr, local" in wanted and newer:
        tools.append(CtrLocal(server))
    for name, setting in (("4 unpacks", UNPACKS), ("ranges", RANGES)):
        if f"ctr, {name}" in wanted and newer:
            tools.append(Ctr(stack.enter_context(Configured(binary, setting)), name))
    if "docker" in wanted:
        if shutil.which("dockerd"):
            tools.append(Docker(stack.enter_context(DockerServer())))
        else:
            left_out("docker is not on this machine")
    if "podman" in wanted:
        if shutil.which("podman"):
            tools.append(Podman(_podman_folder(stack)))
        else:
            left_out("podman is not on this machine")
    if "buildkit" in wanted:
        if programs := buildkit_programs():
            # One of its own, or what one has, the other would not need to fetch.
            below = stack.enter_context(ContainerdServer(binary))
            daemon = stack.enter_context(BuildKitServer(programs, below))
            tools.append(BuildKit(daemon, below))
        else:
            left_out("buildkit is not on this machine (scripts/buildkit builds it)")
    return tools


def _podman_folder(stack: ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="spt-"))

    def remove() -> None:
        # The layers are mounted below it while podman runs, and some time after.
        subprocess.run(["umount", "-l", folder / "data" / "overlay"], check=False, stderr=-3)
        shutil.rmtree(folder, ignore_errors=True)

    stack.callback(remove)
    return folder


@contextmanager
def decompress_with(name: str) -> Iterator[None]:
    """Let all daemons that are started in here use igzip, or what they have built in.

    containerd of 2.0 and newer looks for igzip.  Older ones and Docker look for unpigz, so igzip
    is on their PATH under that name, too: it understands what they ask of it.
    """
    disable = ("CONTAINERD_DISABLE_IGZIP", "CONTAINERD_DISABLE_PIGZ", "MOBY_DISABLE_PIGZ")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="spt-") as folder:
        try:
            for variable in disable:
                os.environ.pop(variable, None)
            if name == "igzip":
                program = shutil.which("igzip")
                assert program
                for alias in ("igzip", "unpigz"):
                    Path(folder, alias).symlink_to(program)
                os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
            else:
                os.environ.update(dict.fromkeys(disable, "1"))
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
