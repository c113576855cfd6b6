"""Our containerd in a container of Docker or Podman: brought up, found again, mended, removed.

What is wanted is decided by plain functions (``containerd_container``, ``envoy_container``,
``judge``); ``ContainerDaemon`` carries it out, one process at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serpentine._version import __version__
from serpentine.containerd import Containerd, Endpoint, VersionInfo
from serpentine.daemon import envoy
from serpentine.daemon._lock import locked
from serpentine.daemon.candidates import Candidate
from serpentine.daemon.image import DEFAULT_ENVOY_IMAGE, BuildContext, build_context
from serpentine.daemon.state import DaemonState
from serpentine.errors import (
    ContainerdError,
    DaemonError,
    DaemonFailed,
    DaemonPermission,
)
from serpentine.events import (
    DaemonBuilding,
    DaemonNotice,
    DaemonStarted,
    DaemonStarting,
    OnEvent,
)
from serpentine.settings import Settings

if TYPE_CHECKING:
    from serpentine.daemon.api import ContainerAPI, EngineInfo

__all__ = [
    "ContainerDaemon",
    "Verdict",
    "containerd_container",
    "envoy_container",
    "judge",
    "transport_for",
]

START_TIMEOUT = 30.0
STOP_SECONDS = 10
STOP_STUCK_SECONDS = 2
# How long a container that runs may take to answer before it is started anew.
PATIENCE = 5.0
# The same where a wrong "no" costs nothing but a look at the container.
GLANCE = 1.0
# The first of many may have to build the image.
LOCK_TIMEOUT = 1800.0
LOG_TAIL = 5
# Changes when a container must be made differently for the same image.
FORMAT = 1

_LABEL = "io.serpentine"
_SOCKET_FOLDER = "/run/serpentine"

# Everything that containerd, runc and the steps on it need.  Not SYS_RESOURCE, SYS_MODULE,
# SYS_RAWIO, SYS_TIME, SYS_BOOT and the rest that --privileged would give.
CAPABILITIES = {
    "SYS_ADMIN": "mount overlays and root file systems, make namespaces",
    "NET_ADMIN": "set up the loopback and bridges of steps",
    "CHOWN": "unpack files of any owner",
    "DAC_OVERRIDE": "unpack into directories of any mode; enter the user's socket directory",
    "FOWNER": "set modes and times of files of any owner",
    "FSETID": "keep set-user-ID bits while unpacking",
    "MKNOD": "unpack device nodes; make /dev of steps",
    "SETFCAP": "unpack file capabilities",
    "SETUID": "steps of other users",
    "SETGID": "steps of other groups",
    "SETPCAP": "drop capabilities in steps",
    "SYS_CHROOT": "unpack under a root; steps that use it",
    "SYS_PTRACE": "join a step of another user, for the health check of a service",
    "KILL": "signal steps of other users",
    "NET_RAW": "ping in steps",
    "NET_BIND_SERVICE": "low ports in steps",
    "AUDIT_WRITE": "login programs in steps",
}
SECURITY = {
    "seccomp=unconfined": "runc joins a session keyring, which the default profile refuses",
    "apparmor=unconfined": "Docker's profile refuses every mount",
    "label=disable": "with SELinux, the socket in the user's directory could not be made",
}


def containerd_container(
    names: Names,
    tag: str,
    engine: EngineInfo,
    *,
    transport: str,
    run_dir: Path,
    ids: tuple[int, int],
    privileged: bool,
    limits: tuple[tuple[str, int, int], ...],
    labels: dict[str, str],
) -> dict[str, Any]:
    """Return how the engine is to create containerd's container.

    run_dir: where the socket appears on this machine; unused with Envoy.
    ids: user and group of who may open the socket, on this machine.
    limits: name, soft and hard limit; Podman sets higher ones than a host may allow (trap 55).
    """
    if transport == "envoy":
        socket_mount = {"Type": "volume", "Source": names.run_volume, "Target": _SOCKET_FOLDER}
        owner = (envoy.UID, envoy.UID)
    else:
        socket_mount = {"Type": "bind", "Source": str(run_dir), "Target": _SOCKET_FOLDER}
        # In a rootless engine, root inside is the user outside.
        owner = (0, 0) if engine.rootless else ids
    mounts = [
        # Not the container's own file system: overlayfs does not stack on overlayfs (trap 54).
        {"Type": "volume", "Source": names.data_volume, "Target": "/var/lib/containerd"},
        socket_mount,
    ]
    host: dict[str, Any] = {
        "Mounts": mounts,
        # Gone with the container: what a killed containerd noted of its tasks must not outlive
        # them.
        "Tmpfs": {"/run/containerd": "rw,exec,mode=711"},
        "RestartPolicy": {"Name": "no"},
    }
    if not engine.rootless:
        # runc makes a cgroup for each step.  A rootless engine has only its own part of the tree.
        mounts.append({"Type": "bind", "Source": "/sys/fs/cgroup", "Target": "/sys/fs/cgroup"})
        host["CgroupnsMode"] = "host"
    if privileged:
        host["Privileged"] = True
    else:
        host["CapDrop"] = ["ALL"]
        host["CapAdd"] = list(CAPABILITIES)
        host["SecurityOpt"] = list(SECURITY)
        # /proc/sys must be writable to forward packets between a bridge's steps.
        host["MaskedPaths"] = []
        host["ReadonlyPaths"] = []
    if engine.userns:
        # With remapped users, nobody outside could own the socket.
        host["UsernsMode"] = "host"
    if engine.kind == "podman":
        host["Ulimits"] = _ulimits(limits)
        # Its default of 2048 would count the processes of all steps together.
        host["PidsLimit"] = -1
        # Its own word for the two lists of paths, which it ignores.
        if not privileged:
            host["SecurityOpt"] = [*SECURITY, "unmask=ALL"]
    else:
        host["LogConfig"] = {
            "Type": "json-file",
            "Config": {"max-size": "10m", "max-file": "2"},
        }
    return {
        "Image": tag,
        "Labels": labels,
        "Hostname": "serpentine",
        "Env": [f"SOCKET_UID={owner[0]}", f"SOCKET_GID={owner[1]}"],
        "StopTimeout": STOP_SECONDS,
        "HostConfig": host,
    }


def envoy_container(
    names: Names,
    image: str,
    engine: EngineInfo,
    *,
    limits: tuple[tuple[str, int, int], ...],
    labels: dict[str, str],
) -> dict[str, Any]:
    """Return how the engine is to create Envoy's container.  No secret is in it."""
    port = f"{envoy.PORT}/tcp"
    host: dict[str, Any] = {
        "Mounts": [
            {
                "Type": "volume",
                "Source": names.run_volume,
                "Target": _SOCKET_FOLDER,
                "ReadOnly": True,
            }
        ],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        # A free port of the engine's choice, on loopback only.
        "PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}]},
        "RestartPolicy": {"Name": "no"},
    }
    if engine.kind == "podman":
        host["Ulimits"] = _ulimits(limits)
    return {
        "Image": image,
        "Labels": labels,
        "User": f"{envoy.UID}:{envoy.UID}",
        "Entrypoint": ["envoy"],
        "Cmd": [
            "--config-path",
            "/etc/serpentine/envoy.json",
            "--disable-hot-restart",
            "--concurrency",
            "2",
            "--log-level",
            "warning",
        ],
        "ExposedPorts": {port: {}},
        "StopTimeout": 1,
        "HostConfig": host,
    }


def _ulimits(limits: tuple[tuple[str, int, int], ...]) -> list[dict[str, Any]]:
    return [{"Name": name, "Soft": soft, "Hard": hard} for name, soft, hard in limits]


@dataclass(frozen=True, slots=True)
class Names:
    """What our objects are called in the engine: the same for the same user and data directory."""

    owner: str

    @classmethod
    def of(cls, data_dir: Path, uid: int) -> Names:
        """Return the names for a data directory and a user."""
        return cls(hashlib.sha256(f"{uid}:{data_dir}".encode()).hexdigest()[:12])

    @property
    def containerd(self) -> str:
        """Containerd's container."""
        return f"serpentine-{self.owner}"

    @property
    def envoy(self) -> str:
        """Envoy's container."""
        return f"serpentine-{self.owner}-envoy"

    @property
    def data_volume(self) -> str:
        """The volume of content and snapshots."""
        return f"serpentine-{self.owner}"

    @property
    def run_volume(self) -> str:
        """The volume that containerd and Envoy share the socket by."""
        return f"serpentine-{self.owner}-run"


class Verdict(StrEnum):
    """What is to be done with a container, so that it is the one that we want and runs."""

    CREATE = "create"
    REPLACE = "replace"
    START = "start"
    RESUME = "resume"
    KEEP = "keep"


def judge(found: dict[str, Any] | None, labels: dict[str, str]) -> Verdict:
    """Decide about a container as the engine describes it.

    One that a newer Serpentine made is kept: the newer one would only replace ours again.
    """
    if found is None:
        return Verdict.CREATE
    there = _labels_of(found)
    keys = (f"{_LABEL}.transport", f"{_LABEL}.fingerprint")
    newer = _is_newer(there.get(f"{_LABEL}.version", ""), labels[f"{_LABEL}.version"])
    if there.get(keys[0]) != labels[keys[0]]:
        return Verdict.REPLACE
    if there.get(keys[1]) != labels[keys[1]] and not newer:
        return Verdict.REPLACE
    state = found.get("State") or {}
    if state.get("Dead") or state.get("Status") == "removing":
        return Verdict.REPLACE
    if state.get("Paused"):
        return Verdict.RESUME
    return Verdict.KEEP if state.get("Running") else Verdict.START


def _labels_of(found: dict[str, Any] | None) -> dict[str, str]:
    labels = ((found or {}).get("Config") or {}).get("Labels") or {}
    return {str(name): str(value) for name, value in labels.items()}


def transport_for(
    settings: Settings, engine: EngineInfo, *, system: str, running: str | None
) -> str:
    """Decide how containerd is reached: what the user says, else what runs, else what works."""
    if settings.transport:
        return settings.transport
    if running:
        return running
    if system.startswith("linux") and not engine.is_desktop:
        return "socket"
    return "envoy"


def _is_newer(theirs: str, ours: str) -> bool:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())

    return numbers(theirs) > numbers(ours)


def _limits() -> tuple[tuple[str, int, int], ...]:
    """Return limits that the host allows: this process has them."""
    found: tuple[tuple[str, int, int], ...] = ()
    if sys.platform != "win32":
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = min(files, 1048576) if files > 0 else 1048576
        processes = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        # Podman's service lowers its own to the system's greatest process number, by default
        # this.
        processes = min(processes, 32768) if processes > 0 else 32768
        found = ("nofile", files, files), ("nproc", processes, processes)
    return found


def _ids() -> tuple[int, int]:
    found = 0, 0
    if sys.platform != "win32":
        found = os.getuid(), os.getgid()
    return found


@dataclass(frozen=True, slots=True)
class ContainerDaemon:
    """Our containerd in a container: where its files are, and how to bring it up and down."""

    settings: Settings
    candidate: Candidate

    @classmethod
    def remembered(cls, settings: Settings) -> ContainerDaemon | None:
        """Return the one that was brought up last, if we remember one."""
        state = DaemonState.load(state_file(settings))
        if state is None:
            return None
        return cls(settings, Candidate(state.kind, state.api, "where it was brought up"))

    @property
    def names(self) -> Names:
        """What our objects are called in the engine."""
        return Names.of(self.settings.data_dir, _ids()[0])

    @property
    def state(self) -> DaemonState | None:
        """What we remember of it."""
        return DaemonState.load(state_file(self.settings))

    @property
    def socket_dir(self) -> Path:
        """Where the socket appears on this machine."""
        return self.settings.run_dir / "engine"

    @property
    def socket_dir_inside(self) -> str:
        """What that directory is called in the container, which has it mounted."""
        return _SOCKET_FOLDER

    @property
    def door_dir(self) -> Path:
        """Where token and certificate are kept."""
        return self.settings.data_dir / "envoy"

    def endpoint_of(self, state: DaemonState) -> Endpoint | None:
        """Return how to reach what we remember; None if the token is gone."""
        if state.transport == "socket":
            return Endpoint.parse(str(self.socket_dir / "containerd.sock"))
        door = envoy.Door.load(self.door_dir)
        if door is None or state.port is None:
            return None
        return door.endpoint(state.port)

    def fits(self, state: DaemonState) -> bool:
        """Tell whether what we remember is what these settings want."""
        if self.settings.transport and self.settings.transport != state.transport:
            return False
        if _is_newer(state.version, __version__):
            return True
        return state.fingerprint == self.fingerprint(build_context(self.settings))

    def fingerprint(self, context: BuildContext) -> str:
        """Return what changes when the containers must be made anew; the transport apart."""
        wanted = [
            FORMAT,
            context.tag,
            self.settings.envoy_image or DEFAULT_ENVOY_IMAGE,
            self.settings.privileged,
            _ids(),
            str(self.socket_dir),
        ]
        return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]

    async def running(
        self, *, patience: float = PATIENCE
    ) -> tuple[DaemonState, Endpoint, VersionInfo] | None:
        """Return what answers and fits; None if it must be brought up.  Asks no engine."""
        state = self.state
        if state is None or not self.fits(state):
            return None
        if state.transport == "socket" and self._stranger() is not None:
            return None
        endpoint = self.endpoint_of(state)
        if endpoint is None:
            return None
        version = await _version_of(endpoint, patience)
        return None if version is None else (state, endpoint, version)

    async def start(self, *, on_event: OnEvent) -> tuple[DaemonState, Endpoint]:
        """Make sure that it runs and fits, and return how to reach it; quick when it does.

        Safe when several processes do it at once: one does, the others find it.  Raises
        DaemonFailed with what the engine, the build or containerd said.
        """
        async with self._locked(on_event):
            # Whoever had the lock before may have done it.
            if (found := await self.running(patience=GLANCE)) is not None:
                return found[:2]
            return await self._bring_up(on_event)

    async def _bring_up(
        self, on_event: OnEvent, *, fresh: bool = False
    ) -> tuple[DaemonState, Endpoint]:
        from serpentine.daemon.api import reach

        began = time.monotonic()
        async with self.reach(reach) as api:
            on_event(DaemonStarting(kind=api.info.kind))
            state, kept = await self._provision(api, on_event, fresh=fresh)
            try:
                patience = PATIENCE if kept else START_TIMEOUT
                endpoint, version = await self._wait_ready(api, state, patience)
            except DaemonFailed as error:
                if not kept:
                    raise
                # It runs and does not answer: stuck, or its socket's directory was deleted.
                # Starting it anew mends what can be mended.
                on_event(DaemonNotice(f"{error}; starting it anew"))
                await api.remove(self.names.envoy)
                # It hardly hears that, either.
                await api.stop(self.names.containerd, seconds=STOP_STUCK_SECONDS)
                state, _ = await self._provision(api, on_event, fresh=False)
                endpoint, version = await self._wait_ready(api, state, START_TIMEOUT)
            state.save(state_file(self.settings))
            on_event(
                DaemonStarted(
                    kind=state.kind,
                    endpoint=endpoint.address,
                    version=version.version,
                    seconds=time.monotonic() - began,
                )
            )
            return state, endpoint

    async def _provision(
        self, api: ContainerAPI, on_event: OnEvent, *, fresh: bool
    ) -> tuple[DaemonState, bool]:
        """Make containers, volumes and image what they should be, and start them.

        Tells, too, whether containerd's container was running and is kept.
        """
        settings, names = self.settings, self.names
        remembered = self.state
        transport = transport_for(
            settings,
            api.info,
            system=sys.platform,
            running=remembered.transport if remembered else None,
        )
        context = build_context(settings)
        fingerprint = self.fingerprint(context)
        labels = {
            f"{_LABEL}.owner": names.owner,
            f"{_LABEL}.version": __version__,
            f"{_LABEL}.fingerprint": fingerprint,
            f"{_LABEL}.transport": transport,
        }
        state = DaemonState(
            kind=api.info.kind,
            transport=transport,
            api=self.candidate.url,
            version=__version__,
            fingerprint=fingerprint,
        )
        socket_dir_was_there = self._make_socket_dir()

        found = await api.inspect(names.containerd)
        verdict = judge(found, labels)
        if fresh and found is not None:
            verdict = Verdict.REPLACE
        if verdict is Verdict.START:
            await self._tell_why_it_ended(api, names.containerd, found, on_event)
        if verdict is Verdict.RESUME:
            on_event(DaemonNotice("the container was paused; letting it go on"))
            await api.resume(names.containerd)
            verdict = Verdict.KEEP
        if verdict is Verdict.KEEP and transport == "socket" and not socket_dir_was_there:
            # It has a directory mounted that nobody else can see any more.
            await api.stop(names.containerd, seconds=STOP_SECONDS)
            verdict = Verdict.START
        if verdict is Verdict.REPLACE and not fresh:
            on_event(DaemonNotice("replacing the container: it has another configuration"))
        config = containerd_container(
            names,
            context.tag,
            api.info,
            transport=transport,
            run_dir=self.socket_dir,
            ids=_ids(),
            privileged=settings.privileged,
            limits=_limits(),
            labels=labels,
        )
        if verdict is Verdict.START:
            try:
                await api.start(names.containerd)
            except DaemonFailed as error:
                # The engine cannot make of it again what it was: what it mounts has gone.
                on_event(DaemonNotice(f"{error}; replacing the container"))
                verdict = Verdict.REPLACE
        anew = verdict in (Verdict.CREATE, Verdict.REPLACE)
        # Before anything is removed: who cannot build keeps what there was.
        if anew and (fresh or not await api.image_exists(context.tag)):
            await self._build(api, context, on_event, fresh=fresh)
        if verdict is Verdict.REPLACE:
            await api.remove(names.envoy)
            await api.stop(names.containerd, seconds=STOP_SECONDS)
            await api.remove(names.containerd)
        if anew:
            await api.create_volume(names.data_volume, labels)
            if transport == "envoy":
                await api.create_volume(names.run_volume, labels)
            await api.create(names.containerd, config)
            await api.start(names.containerd)
        if verdict is Verdict.REPLACE:
            # An image that nobody needs any more; the engine keeps one that is used.
            await api.remove_image(str((found or {}).get("Image")))
        if transport == "envoy":
            await self._provision_envoy(api, labels, on_event)
        else:
            await api.remove(names.envoy)
            await api.remove_volume(names.run_volume)
        there = labels if anew else _labels_of(found)
        state = replace(
            state,
            port=await self._port(api, transport),
            # One that a newer Serpentine made stays the newer one's.
            version=there.get(f"{_LABEL}.version", ""),
            fingerprint=there.get(f"{_LABEL}.fingerprint", ""),
        )
        return state, verdict is Verdict.KEEP

    async def _provision_envoy(
        self, api: ContainerAPI, labels: dict[str, str], on_event: OnEvent
    ) -> None:
        names = self.names
        image = self.settings.envoy_image or DEFAULT_ENVOY_IMAGE
        door = envoy.Door.load(self.door_dir)
        found = await api.inspect(names.envoy)
        # Envoy's container has the token that was ours when it was made.
        verdict = judge(found, labels) if door is not None else Verdict.REPLACE
        if verdict in (Verdict.START, Verdict.RESUME):
            # Nothing is lost by making it anew, and it gets a port that is free.
            verdict = Verdict.REPLACE
        if verdict is Verdict.KEEP:
            return
        await api.remove(names.envoy)
        if door is None:
            door = await asyncio.to_thread(envoy.Door.make)
            door.save(self.door_dir)
        if not await api.image_exists(image):
            _online(self.settings, image)
            on_event(DaemonNotice(f"pulling {image}"))
            await api.pull(image, lambda line: on_event(DaemonBuilding(image, line)))
        await api.create(
            names.envoy, envoy_container(names, image, api.info, limits=_limits(), labels=labels)
        )
        try:
            await api.put(names.envoy, envoy.envoy_files(door))
            await api.start(names.envoy)
        except BaseException:
            # One without its files would be kept by the next start.
            with contextlib.suppress(DaemonError):
                await api.remove(names.envoy)
            raise

    async def _build(
        self, api: ContainerAPI, context: BuildContext, on_event: OnEvent, *, fresh: bool
    ) -> None:
        _online(self.settings, context.tag)
        on_event(DaemonNotice(f"building the image {context.tag}, once"))
        arguments = dict(context.arguments)
        for name in ("http_proxy", "https_proxy", "no_proxy"):
            for spelling in (name, name.upper()):
                if value := os.environ.get(spelling):
                    arguments[spelling] = value
        await api.build(
            context.tar(),
            tag=context.tag,
            arguments=arguments,
            labels={f"{_LABEL}.version": __version__},
            # A mirror on loopback is this machine's, not the build container's.
            host_network=_is_loopback(self.settings.releases_url),
            fresh=fresh,
            on_line=lambda line: on_event(DaemonBuilding(context.tag, line)),
        )

    async def _wait_ready(
        self, api: ContainerAPI, state: DaemonState, patience: float
    ) -> tuple[Endpoint, VersionInfo]:
        """Wait until containerd answers the way it will be asked."""
        names = self.names
        endpoint = self.endpoint_of(state)
        if endpoint is None:
            raise DaemonFailed("Envoy has no port or no token", hint="try again")
        deadline = time.monotonic() + patience
        containers = [names.containerd, *([names.envoy] if state.transport == "envoy" else ())]
        checked = time.monotonic()
        async with Containerd(endpoint) as client:
            while True:
                try:
                    return endpoint, await client.wait_ready(timeout=0.1)
                except DaemonPermission:
                    if state.transport == "socket":
                        raise
                    # Envoy answers, and refuses the token: it has another one.
                    await api.remove(names.envoy)
                    raise DaemonFailed("Envoy has another token than we") from None
                except (DaemonError, ContainerdError):
                    pass
                now = time.monotonic()
                if now > deadline:
                    raise DaemonFailed(
                        f"containerd in {api.info.kind} does not answer at {endpoint}",
                        address=str(endpoint),
                        hint="see 'serpentine daemon logs'",
                    )
                if now - checked > 0.5:
                    checked = now
                    for name in containers:
                        await self._refuse_dead(api, name)
                # Not in wait_ready: an endpoint that does not exist yet fails at once.
                await asyncio.sleep(0.02)

    async def _refuse_dead(self, api: ContainerAPI, name: str) -> None:
        found = await api.inspect(name)
        if found is not None and (found.get("State") or {}).get("Running"):
            return
        tail = " | ".join(await api.logs(name, LOG_TAIL))
        raise DaemonFailed(
            f"the container {name} ended while it was starting: {tail or 'it printed nothing'}",
            hint="see 'serpentine daemon logs'",
        )

    async def _port(self, api: ContainerAPI, transport: str) -> int | None:
        if transport != "envoy":
            return None
        found = await api.inspect(self.names.envoy) or {}
        ports = (found.get("NetworkSettings") or {}).get("Ports") or {}
        for binding in ports.get(f"{envoy.PORT}/tcp") or ():
            if str(binding.get("HostPort", "")).isdigit():
                return int(binding["HostPort"])
        return None

    async def _tell_why_it_ended(
        self, api: ContainerAPI, name: str, found: dict[str, Any] | None, on_event: OnEvent
    ) -> None:
        status = ((found or {}).get("State") or {}).get("ExitCode", 0)
        if status in (0, 143):
            return  # stopped on purpose
        tail = " | ".join(await api.logs(name, LOG_TAIL))
        on_event(
            DaemonNotice(f"containerd had ended with status {status}, starting it again: {tail}")
        )

    def _make_socket_dir(self) -> bool:
        """Make the directories of the socket; tells whether the socket's own was there."""
        with _making():
            self.settings.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
            there = self.socket_dir.is_dir()
            self.socket_dir.mkdir(mode=0o700, exist_ok=True)
            if (stranger := self._stranger()) is not None:
                raise DaemonPermission(
                    f"{stranger[0]} belongs to another user ({stranger[1]})",
                    hint="remove it, or choose another with SERPENTINE_RUN_DIR",
                )
            self.socket_dir.chmod(0o700)
        return there

    def _stranger(self) -> tuple[Path, int] | None:
        """Return a directory of another user, who could put a socket of theirs there."""
        if sys.platform != "win32":
            ours = os.geteuid()
            for folder, owners in ((self.settings.run_dir, (ours, 0)), (self.socket_dir, (ours,))):
                with contextlib.suppress(FileNotFoundError):
                    if (owner := folder.stat().st_uid) not in owners:
                        return folder, owner
        return None

    @asynccontextmanager
    async def reach(self, connect: Any) -> AsyncIterator[ContainerAPI]:
        """Connect to the engine, starting Podman's API where nobody serves it."""
        from serpentine.daemon.api import podman_service

        if self.candidate.url:
            async with connect(self.candidate) as api:
                yield api
            return
        podman = shutil.which("podman")
        if podman is None:
            raise DaemonFailed("podman is not on the PATH any more", hint="install podman")
        async with podman_service(podman) as candidate, connect(candidate) as api:
            yield api

    async def upgrade(self, *, on_event: OnEvent) -> tuple[DaemonState, Endpoint]:
        """Build the image anew, from the newest base, and replace the containers."""
        async with self._locked(on_event):
            return await self._bring_up(on_event, fresh=True)

    async def rotate_token(self, *, on_event: OnEvent) -> bool:
        """Give Envoy another token and certificate; tells whether there is an Envoy.

        containerd goes on running; calls through the old Envoy are cut off.
        """
        from serpentine.daemon.api import reach

        async with self._locked(on_event):
            async with self.reach(reach) as api:
                there = await api.remove(self.names.envoy)
            try:
                await asyncio.to_thread(shutil.rmtree, self.door_dir)
            except FileNotFoundError:
                pass
            except OSError as error:
                # Not in silence: the old token would go on being the token.
                raise DaemonFailed(
                    f"cannot remove the old token at {error.filename}: {error.strerror}",
                    hint=f"remove {self.door_dir} and run it again",
                ) from None
            # Somebody may have removed Envoy's container alone.
            if not there and (self.state is None or self.state.transport != "envoy"):
                return False
            await self._bring_up(on_event)
            return True

    async def image(self) -> tuple[str, bool, str]:
        """Return the image's name, whether the engine has it, and where the engine's data is."""
        from serpentine.daemon.api import reach

        tag = build_context(self.settings).tag
        async with self.reach(reach) as api:
            return tag, await api.image_exists(tag), api.info.root

    async def exists(self) -> bool:
        """Tell whether the engine answers and has a container or a volume of ours."""
        from serpentine.daemon.api import reach

        try:
            async with self.reach(reach) as api:
                return await api.inspect(
                    self.names.containerd
                ) is not None or await api.volume_exists(self.names.data_volume)
        except DaemonError:
            return False

    async def stop(self) -> bool:
        """Stop the containers, and tell whether they ran.  Everything stays."""
        from serpentine.daemon.api import reach

        ran = False
        async with self._locked(None), self.reach(reach) as api:
            for name in (self.names.envoy, self.names.containerd):
                found = await api.inspect(name)
                state = (found or {}).get("State") or {}
                ran = ran or bool(state.get("Running") or state.get("Paused"))
                await api.stop(name, seconds=STOP_SECONDS)
        return ran

    async def remove(self, *, data: bool) -> bool:
        """Remove the containers, with ``data`` the volume of images, too."""
        from serpentine.daemon.api import reach

        names = self.names
        async with self._locked(None), self.reach(reach) as api:
            removed = await api.remove(names.envoy)
            await api.stop(names.containerd, seconds=STOP_SECONDS)
            removed = await api.remove(names.containerd) or removed
            removed = await api.remove_volume(names.run_volume) or removed
            if data:
                removed = await api.remove_volume(names.data_volume) or removed
        await asyncio.to_thread(shutil.rmtree, self.door_dir, ignore_errors=True)
        await asyncio.to_thread(shutil.rmtree, self.socket_dir, ignore_errors=True)
        state_file(self.settings).unlink(missing_ok=True)
        return removed

    async def log_tail(self, lines: int) -> list[str]:
        """Return the last lines that containerd printed, then Envoy's, if there is one."""
        from serpentine.daemon.api import reach

        async with self.reach(reach) as api:
            return [
                *await api.logs(self.names.containerd, lines),
                *await api.logs(self.names.envoy, lines),
            ]

    @asynccontextmanager
    async def _locked(self, on_event: OnEvent | None) -> AsyncIterator[None]:
        with _making():
            self.settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

        def tell() -> None:
            if on_event is not None:
                on_event(DaemonNotice("another process is bringing it up; waiting for that"))

        # Beside the state and not beside the socket: that directory may be removed.
        path = self.settings.data_dir / "lock"
        async with locked(path, timeout=LOCK_TIMEOUT, on_wait=tell):
            yield


def state_file(settings: Settings) -> Path:
    """Return where we note what we brought up."""
    return settings.data_dir / "daemon.json"


async def _version_of(endpoint: Endpoint, patience: float) -> VersionInfo | None:
    async with Containerd(endpoint) as client:
        try:
            return await client.check(timeout=patience)
        except (DaemonError, ContainerdError):
            return None


@contextmanager
def _making() -> Iterator[None]:
    """Translate what goes wrong while directories are made."""
    try:
        yield
    except PermissionError as error:
        raise DaemonPermission(
            f"cannot make {error.filename}: permission denied",
            hint="choose directories of your own with SERPENTINE_DATA_DIR and SERPENTINE_RUN_DIR",
        ) from None
    except OSError as error:
        raise DaemonFailed(
            f"cannot make {error.filename}: {error.strerror}",
            hint="choose directories with SERPENTINE_DATA_DIR and SERPENTINE_RUN_DIR",
        ) from None


def _online(settings: Settings, image: str) -> None:
    """Refuse what the engine would need a registry for."""
    if settings.offline:
        raise DaemonFailed(
            f"the image {image} is not here, and offline it can be neither built nor pulled",
            hint="once, with a network: serpentine daemon start",
        )


def _is_loopback(url: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
