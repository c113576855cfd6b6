"""Where a Docker or a Podman may be: decided by plain functions from what the machine says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from serpentine.settings import Settings

__all__ = ["Candidate", "docker_candidates", "podman_candidates"]

USUAL = "usual socket"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SCHEMES = ("unix", "npipe", "tcp", "http", "https", "ssh")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An address where a container engine may answer.

    kind: ``docker`` or ``podman``, as far as the address tells.
    url: ``unix://``, ``npipe://``, ``tcp://``, ``http(s)://`` or ``ssh://``; empty if unknown.
    source: what named it, in words for people.
    context: the Docker context, where its TLS files are needed.
    problem: why it cannot be tried, if that is known.
    """

    kind: str
    url: str
    source: str
    context: str | None = None
    problem: str | None = None

    @property
    def is_remote(self) -> bool:
        """Tell whether it is on another machine, whose loopback and files are not ours."""
        scheme = self.url.partition("://")[0]
        if scheme in ("unix", "npipe", ""):
            return False
        try:
            return scheme == "ssh" or urlsplit(self.url).hostname not in _LOOPBACK
        except ValueError:
            return True

    @property
    def is_guess(self) -> bool:
        """Tell whether nobody named it: it need not exist."""
        return self.source == USUAL

    @property
    def path(self) -> str | None:
        """The path of its unix socket, if it has one."""
        path = self.url.removeprefix("unix://")
        return path if path != self.url else None

    def __str__(self) -> str:
        return f"{self.url} ({self.source})" if self.url else self.source


def docker_candidates(
    settings: Settings, environ: Mapping[str, str], home: Path, system: str
) -> list[Candidate]:
    """Return where Docker may be, the likeliest first.

    ``DOCKER_HOST`` or a chosen context is what the user wants, so then nothing else is tried.
    """
    if settings.docker_host:
        source = settings.sources.get("docker_host", "argument")
        return [_named("docker", settings.docker_host, source)]
    folder = Path(environ.get("DOCKER_CONFIG") or home / ".docker")
    name, source = settings.docker_context, settings.sources.get("docker_context", "argument")
    if not name:
        name, source = _current_context(folder), f"current context in {folder / 'config.json'}"
    if name and name != "default":
        return [_context_candidate(folder, name, source)]
    if system == "win32":
        return [Candidate("docker", "npipe:////./pipe/docker_engine", "Docker Desktop's pipe")]
    sockets = [
        "/var/run/docker.sock",
        *([f"{environ['XDG_RUNTIME_DIR']}/docker.sock"] if environ.get("XDG_RUNTIME_DIR") else ()),
        f"{home}/.docker/run/docker.sock",
        f"{home}/.docker/desktop/docker.sock",
        f"{home}/.colima/default/docker.sock",
        f"{home}/.orbstack/run/docker.sock",
        f"{home}/.rd/docker.sock",
    ]
    return [Candidate("docker", f"unix://{path}", USUAL) for path in sockets]


def podman_candidates(
    settings: Settings,
    environ: Mapping[str, str],
    system: str,
    *,
    is_root: bool,
    machine: str | None = None,
) -> list[Candidate]:
    """Return where Podman's service may be, the likeliest first.

    ``machine`` is the address of ``podman machine``, where Podman needs one.
    """
    if settings.podman_host:
        source = settings.sources.get("podman_host", "argument")
        return [_named("podman", settings.podman_host, source)]
    if not system.startswith("linux"):
        return [Candidate("podman", machine, "podman machine")] if machine else []
    runtime = environ.get("XDG_RUNTIME_DIR")
    sockets = [f"{runtime}/podman/podman.sock"] if runtime and not is_root else []
    sockets.append("/run/podman/podman.sock")
    return [Candidate("podman", f"unix://{path}", USUAL) for path in sockets]


def podman_machine() -> str | None:
    """Ask ``podman machine`` where its virtual machine's API can be reached from here."""
    if shutil.which("podman") is None:
        return None
    try:
        done = subprocess.run(
            ["podman", "machine", "inspect"], capture_output=True, timeout=10, check=False
        )
        machines = json.loads(done.stdout or b"[]")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return machine_url(machines)


def machine_url(machines: object) -> str | None:
    """Read what ``podman machine inspect`` printed; None without a machine that can be reached."""
    if not isinstance(machines, list):
        return None
    for found in machines:
        connection = found.get("ConnectionInfo", {}) if isinstance(found, dict) else {}
        if pipe := (connection.get("PodmanPipe") or {}).get("Path"):
            return "npipe://" + str(pipe).replace("\\", "/")
        if path := (connection.get("PodmanSocket") or {}).get("Path"):
            return f"unix://{path}"
    return None


def _named(kind: str, url: str, source: str) -> Candidate:
    """Return the address that a user wrote, with what is wrong about it."""
    scheme, separator, rest = url.partition("://")
    with contextlib.suppress(ValueError):
        _ = urlsplit(url).port  # raises for a host or a port that can be none
        if separator and rest and scheme in _SCHEMES:
            return Candidate(kind, url, source)
    return Candidate(
        kind,
        "",
        source,
        problem=f"{source} is {url!r}, which is no address: write unix:///PATH, or"
        " tcp://127.0.0.1:PORT",
    )


def _current_context(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = config.get("currentContext") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def _context_candidate(folder: Path, name: str, source: str) -> Candidate:
    identifier = hashlib.sha256(name.encode()).hexdigest()
    path = folder / "contexts" / "meta" / identifier / "meta.json"
    try:
        host = json.loads(path.read_text(encoding="utf-8"))["Endpoints"]["docker"]["Host"]
    except (OSError, ValueError, KeyError, TypeError):
        return Candidate("docker", "", f"{source}: {name}", problem=f"there is no context {name!r}")
    has_no_files = str(host).startswith(("unix://", "npipe://", "ssh://"))
    found = _named("docker", str(host), f"{source}: {name}")
    return found if has_no_files else replace(found, context=name)
