"""The API that Docker has and Podman shares: the few calls that we need, with our own errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
from aiodocker.exceptions import DockerError
from aiodocker.stream import Stream

from serpentine.daemon.candidates import Candidate
from serpentine.errors import DaemonFailed, DaemonPermission, DaemonUnreachable

__all__ = ["ContainerAPI", "EngineInfo", "ping", "podman_service", "reach"]

# Docker answers in milliseconds, also on a machine that is busy; longer means stuck.
PROBE_TIMEOUT = 5.0
# Podman starts several programs to say what it is.
INFO_TIMEOUT = 30.0
CALL_TIMEOUT = 60.0
# A first pull of a base image over a slow line, or a build.
LONG_TIMEOUT = 1800.0
BUILD_TAIL = 8

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the container engine says of itself.

    kind: ``docker`` or ``podman``, whatever the address was called.
    is_desktop: it runs in a virtual machine that shares no unix sockets with this one.
    root: the directory of its data, on its machine.
    """

    kind: str
    version: str
    rootless: bool
    userns: bool
    is_desktop: bool
    cgroup_version: str
    root: str


class ContainerAPI:
    """A container engine that answers.  Use ``reach`` to get one."""

    def __init__(self, candidate: Candidate, docker: aiodocker.Docker, info: EngineInfo) -> None:
        self.candidate = candidate
        self.info = info
        self._docker: Any = docker  # parts of it are untyped

    @property
    def url(self) -> str:
        """The URL of its API."""
        return self.candidate.url

    async def image_exists(self, name: str) -> bool:
        """Tell whether an image is there."""
        return await self._maybe(self._docker.images.inspect(name)) is not None

    async def pull(self, image: str, on_line: Callable[[str], None]) -> None:
        """Let the engine pull an image.  Raises DaemonFailed with what it said."""
        # Without a tag, every tag of the repository would come (trap 56).
        if "@" not in image and ":" not in image.rpartition("/")[2]:
            image += ":latest"
        mirror = "name another image with SERPENTINE_ENVOY_IMAGE, or mend the engine's network"
        with self._translated(f"cannot pull {image}", hint=mirror):
            async with asyncio.timeout(LONG_TIMEOUT):
                async for item in self._docker.images.pull(image, stream=True):
                    if (status := item.get("status")) and not item.get("progressDetail"):
                        on_line(str(status))

    async def build(
        self,
        context: bytes,
        *,
        tag: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        host_network: bool,
        fresh: bool,
        on_line: Callable[[str], None],
    ) -> None:
        """Build an image.  Raises DaemonFailed with the last lines of what the builder printed."""
        printed = _Printed(on_line)
        params = {
            "t": tag,
            "buildargs": json.dumps(dict(arguments)),
            "labels": json.dumps(dict(labels)),
            "rm": "1",
            "forcerm": "1",
            "pull": "1" if fresh else "0",
            "nocache": "1" if fresh else "0",
        }
        if host_network:
            params["networkmode"] = "host"
        try:
            with self._translated(f"cannot build {tag}"):
                async with (
                    asyncio.timeout(LONG_TIMEOUT),
                    # Not images.build(): that has no network mode.
                    self._docker._query(
                        "build",
                        "POST",
                        params=params,
                        data=context,
                        headers={"Content-Type": "application/x-tar"},
                        timeout=aiohttp.ClientTimeout(total=None),
                    ) as response,
                ):
                    async for line in _json_lines(response):
                        if error := line.get("error"):
                            raise DockerError(0, str(error))
                        printed.take(str(line.get("stream") or ""))
        except DaemonFailed as error:
            printed.take("\n")
            said = (
                f"{error}; it printed: {' | '.join(printed.tail)}" if printed.tail else f"{error}"
            )
            hint = (
                "mend what it names; mirrors can be set with SERPENTINE_BASE_IMAGE and"
                " SERPENTINE_RELEASES_URL"
            )
            raise DaemonFailed(said, address=self.url, hint=self._make_room(said) or hint) from None

    async def remove_image(self, name: str) -> bool:
        """Remove an image, unless something uses it."""
        try:
            return await self._maybe(self._docker.images.delete(name)) is not None
        except DaemonFailed:
            return False

    async def inspect(self, container: str) -> dict[str, Any] | None:
        """Return all that the engine knows of a container; None if it does not exist."""
        found = await self._maybe(self._docker.containers.container(container).show())
        return found if isinstance(found, dict) else None

    async def create(self, name: str, config: dict[str, Any]) -> None:
        """Create a container.  Raises DaemonFailed."""
        with self._translated(f"cannot create the container {name}"):
            async with asyncio.timeout(CALL_TIMEOUT):
                await self._docker.containers.create(config, name=name)

    async def put(self, container: str, archive: bytes) -> None:
        """Unpack a tar archive into a container's root directory."""
        with self._translated(f"cannot copy files into the container {container}"):
            async with asyncio.timeout(CALL_TIMEOUT):
                await self._docker.containers.container(container).put_archive("/", archive)

    async def start(self, container: str) -> None:
        """Start a container; does nothing to one that runs."""
        with self._translated(f"cannot start the container {container}"):
            async with asyncio.timeout(CALL_TIMEOUT):
                await self._docker.containers.container(container).start()

    async def resume(self, container: str) -> None:
        """Let a container that was paused go on; does nothing to one that is gone."""
        await self._maybe(self._docker.containers.container(container).unpause())

    async def stop(self, container: str, *, seconds: int) -> None:
        """Stop a container; one that does not run, or does not exist, is no error."""
        found = await self.inspect(container) or {}
        if (found.get("State") or {}).get("Paused"):
            # Podman refuses to stop one that is paused.
            await self.resume(container)
        await self._maybe(self._docker.containers.container(container).stop(t=seconds))

    async def remove(self, container: str) -> bool:
        """Remove a container, running or not; tells whether it was there."""
        if await self.inspect(container) is None:
            return False
        await self._maybe(self._docker.containers.container(container).delete(force=True, v=True))
        return True

    async def logs(self, container: str, lines: int) -> list[str]:
        """Return the last lines that a container printed; empty if there is no such container."""
        found = await self._maybe(
            self._docker.containers.container(container).log(
                stdout=True, stderr=True, tail=str(lines)
            )
        )
        return "".join(found or ()).splitlines()[-lines:]

    @asynccontextmanager
    async def exec(self, container: str, command: Sequence[str]) -> AsyncIterator[Stream]:
        """Run a command in a container; leaving the context cuts the connection to it.

        The command then sees the end of its input, and is not ended.
        """
        stream: Stream | None = None
        try:
            with self._translated(f"cannot run a command in the container {container}"):
                async with asyncio.timeout(CALL_TIMEOUT):
                    made = await self._docker.containers.container(container).exec(
                        command, stdin=True, tty=False
                    )
                    stream = made.start()
                    await stream._init()
            yield stream
        finally:
            if stream is not None and stream._resp is not None:
                stream._closed = True
                connection = stream._resp.connection
                if connection is not None and connection.transport is not None:
                    # Not closed in peace: what the other side does not read would keep it open.
                    connection.transport.abort()
                stream._resp.close()

    async def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        """Create a volume; one that exists stays as it is."""
        if await self.volume_exists(name):
            return
        with self._translated(f"cannot create the volume {name}"):
            async with asyncio.timeout(CALL_TIMEOUT):
                await self._docker.volumes.create({"Name": name, "Labels": dict(labels)})

    async def volume_exists(self, name: str) -> bool:
        """Tell whether a volume is there."""
        return await self._maybe(self._docker.volumes.get(name)) is not None

    async def remove_volume(self, name: str) -> bool:
        """Remove a volume and all that is in it; tells whether it was there."""
        volume = await self._maybe(self._docker.volumes.get(name))
        if volume is None:
            return False
        await self._maybe(
            volume.delete(), conflict="remove the container that uses it, then try again"
        )
        return True

    async def _maybe(self, call: Any, *, conflict: str = "") -> Any:
        """Await a call; None when what it is about does not exist.  Raises DaemonFailed.

        conflict: the remedy when the engine refuses because something else is in the way.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await call
        except DockerError as error:
            if error.status == 404:
                return None
            raise self._failed("", error, conflict if error.status == 409 else "") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._failed("", error) from None

    @contextmanager
    def _translated(self, what: str, *, hint: str = "") -> Iterator[None]:
        try:
            yield
        except (DockerError, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._failed(what, error, hint) from None

    def _make_room(self, said: str) -> str:
        full = "no space left" in said.lower()
        return f"make room where {self.info.kind.capitalize()} keeps its data" if full else ""

    def _failed(self, what: str, error: Exception, hint: str = "") -> DaemonFailed:
        said = error.message if isinstance(error, DockerError) else str(error)
        if isinstance(error, TimeoutError):
            said = "no answer in time"
        said = " ".join(said.split()) or type(error).__name__
        name = self.info.kind.capitalize()
        lead = f"{what}: " if what else ""
        hint = self._make_room(said) or hint or f"check {name} at {self.url}"
        return DaemonFailed(f"{lead}{name} says: {said}", address=self.url, hint=hint)


class _Printed:
    """What a builder prints, in lines: it comes in pieces, from Podman in single letters."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.tail: list[str] = []
        self._begun = ""
        self._on_line = on_line

    def take(self, piece: str) -> None:
        """Take the next piece; the last line counts when its end has come."""
        *lines, self._begun = (self._begun + piece).split("\n")
        for line in lines:
            # Docker prints what went to stderr in red.
            if text := _COLOURS.sub("", line).strip():
                self.tail = [*self.tail, text][-BUILD_TAIL:]
                self._on_line(text)


async def _json_lines(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


@asynccontextmanager
async def reach(candidate: Candidate) -> AsyncIterator[ContainerAPI]:
    """Connect to a container engine.  Raises what ``ping`` raises."""
    async with _connected(candidate) as (docker, headers):
        with _unreachable(candidate):
            async with asyncio.timeout(INFO_TIMEOUT):
                info = await docker.system.info()
        yield ContainerAPI(candidate, docker, read_info(headers, info))


async def ping(candidate: Candidate) -> None:
    """Make sure that a container engine answers.

    Raises DaemonUnreachable or DaemonPermission, with the reason, if none does, and DaemonFailed,
    before anything is contacted, if it is another machine's: socket and port of our containerd
    would be over there.
    """
    async with _connected(candidate):
        pass


@asynccontextmanager
async def _connected(
    candidate: Candidate,
) -> AsyncIterator[tuple[aiodocker.Docker, Mapping[str, str]]]:
    """Connect; gives the headers of its first answer, too, which say what it is."""
    if candidate.problem:
        raise DaemonUnreachable(candidate.problem, address=candidate.url)
    if candidate.is_remote:
        raise DaemonFailed(
            f"{candidate} is on another machine, and what we start there cannot be reached from"
            " here",
            address=candidate.url,
            hint="unset it to use an engine of this machine, or run serpentine over there; a"
            " containerd there can be used with --address through a tunnel of yours",
        )
    if candidate.path is not None:
        _probe(candidate.path)
    if candidate.url.startswith("npipe:") and sys.platform != "win32":
        raise DaemonUnreachable(
            f"{candidate.url}: only Windows has named pipes", address=candidate.url
        )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_TIMEOUT)
    try:
        if candidate.context:
            docker = aiodocker.Docker(context=candidate.context, timeout=timeout)
        else:
            docker = aiodocker.Docker(url=candidate.url, timeout=timeout)
    except (DockerError, ValueError, OSError, AssertionError) as error:
        raise DaemonUnreachable(f"{candidate.url}: {error}", address=candidate.url) from None
    async with docker:
        with _unreachable(candidate):
            # Not the version: Podman runs half a dozen programs to tell its own.
            async with (
                asyncio.timeout(PROBE_TIMEOUT),
                docker._query("_ping", versioned_api=False) as answer,
            ):
                headers = answer.headers
        if not re.fullmatch(r"\d+\.\d+", headers.get("Api-Version", "")):
            raise DaemonUnreachable(
                f"{candidate.url}: what answers there is no container engine",
                address=candidate.url,
            )
        docker.api_version = f"v{headers['Api-Version']}"
        yield docker, headers


@contextmanager
def _unreachable(candidate: Candidate) -> Iterator[None]:
    try:
        yield
    except (DockerError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise DaemonUnreachable(
            f"{candidate.url}: {' '.join(why.split())}", address=candidate.url
        ) from None


def read_info(headers: Mapping[str, str], info: Mapping[str, Any]) -> EngineInfo:
    """Read the headers of any answer, and what ``/info`` answers."""
    security = [str(option) for option in info.get("SecurityOptions") or ()]
    system = str(info.get("OperatingSystem", ""))
    desktop = "Docker Desktop" in system or str(info.get("Name", "")).startswith("colima")
    return EngineInfo(
        kind="podman" if "Libpod-API-Version" in headers else "docker",
        version=str(info.get("ServerVersion", "")),
        rootless=bool(info.get("Rootless")) or any("name=rootless" in s for s in security),
        userns=any("name=userns" in s for s in security),
        is_desktop=desktop,
        cgroup_version=str(info.get("CgroupVersion", "1")),
        root=str(info.get("DockerRootDir", "")),
    )


def _probe(path: str) -> None:
    """Find out why a unix socket does not open, in words that say what to do."""
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        return
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except BlockingIOError:
        pass
    except FileNotFoundError:
        raise DaemonUnreachable(f"{path}: there is no such socket", address=path) from None
    except PermissionError:
        raise DaemonPermission(
            f"{path}: permission denied",
            address=path,
            hint="join the group that may use it (Docker: sudo usermod -aG docker $USER, then"
            " log in again)",
        ) from None
    except OSError as error:
        refused = error.errno == errno.ECONNREFUSED
        why = "nothing listens there" if refused else os.strerror(error.errno or 0)
        raise DaemonUnreachable(f"{path}: {why}", address=path) from None
    finally:
        probe.close()


@asynccontextmanager
async def podman_service(podman: str) -> AsyncIterator[Candidate]:
    """Run Podman's API for as long as we need it, where nobody enabled its socket.

    Once our containers run, nobody needs it: containerd is reached directly.
    """
    with tempfile.TemporaryDirectory(prefix="serpentine-podman-") as folder:
        path = Path(folder) / "podman.sock"
        process = await asyncio.create_subprocess_exec(
            podman,
            "system",
            "service",
            "--time=0",
            f"unix://{path}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PROBE_TIMEOUT * 2
            while not path.exists():
                if process.returncode is not None or time.monotonic() > deadline:
                    raise DaemonUnreachable(f"{podman} system service does not come up")
                await asyncio.sleep(0.02)
            yield Candidate("podman", f"unix://{path}", f"{podman} system service")
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
