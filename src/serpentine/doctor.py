"""What works here and what does not: one check per part, each with its remedy."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path

from serpentine._version import __version__
from serpentine.containerd import Containerd
from serpentine.daemon.container import ContainerDaemon
from serpentine.daemon.discovery import Daemon, find, look_around
from serpentine.daemon.embedded import Embedded
from serpentine.errors import SerpentineError
from serpentine.events import ignore
from serpentine.settings import Settings

__all__ = ["Check", "Outcome", "examine"]

MIN_CONTAINERD = (1, 6)
MIN_SPACE = 1 << 30
# A token or a certificate that is seconds old must not look as if it came from the future.
MAX_SKEW = 60.0
_DECOMPRESSORS = ("igzip", "unpigz")


class Outcome(StrEnum):
    """How a check ended: ``note`` needs no action, ``fail`` does."""

    OK = "ok"
    NOTE = "note"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One part that was looked at; ``remedy`` is empty unless something should be done."""

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


async def examine(settings: Settings, *, registry: str) -> AsyncIterator[Check]:
    """Look at each part in turn; brings nothing up and changes nothing.

    registry: ``HOST`` or ``HOST:PORT`` to ask for its API.
    """
    daemon: Daemon | None = None
    try:
        daemon = await find(settings, on_event=ignore, start=False)
    except SerpentineError as error:
        yield _failed("daemon", error)
    disk: Path | None = settings.data_dir
    if not settings.address:
        async for check in _engines(settings, needed=daemon is None):
            yield check
        remembered = ContainerDaemon.remembered(settings)
        if remembered is not None and settings.daemon != "embedded":
            check, disk = await _image(remembered)
            yield check
    if daemon is not None and daemon.kind == "address":
        disk = None
    if daemon is None:
        yield Check("containerd", Outcome.NOTE, "none of ours runs; the first command starts it")
    else:
        async for check in _containerd(settings, daemon):
            yield check
    yield _space(disk)
    async for check in _registry(settings, registry):
        yield check


async def _engines(settings: Settings, *, needed: bool) -> AsyncIterator[Check]:
    """Check each way to have a containerd; only the lack of all of them is a failure."""
    usable = False
    found: list[Check] = []
    async for kind, where, problem, hint in look_around(settings):
        usable = usable or problem is None
        text = f"{where}: {problem}" if problem else f"{where}: usable"
        found.append(Check(kind, Outcome.NOTE if problem else Outcome.OK, text, hint))
    for check in found:
        if usable:
            yield Check(check.name, check.outcome, check.detail)
        else:
            remedy = check.remedy or "start Docker or Podman, or run as root with containerd"
            yield Check(check.name, Outcome.FAIL if needed else Outcome.NOTE, check.detail, remedy)


async def _image(daemon: ContainerDaemon) -> tuple[Check, Path | None]:
    """Look for the image; returns, too, where the engine's data is on this machine, if it is."""
    try:
        tag, there, root = await daemon.image()
    except SerpentineError as error:
        return _failed("image", error), None
    is_here = bool(root) and await asyncio.to_thread(os.path.isdir, root)
    disk = Path(root) if is_here else None
    if there:
        return Check("image", Outcome.OK, f"{tag} is there; igzip is part of it"), disk
    return Check("image", Outcome.NOTE, f"{tag} is not there; the next start builds it"), disk


async def _containerd(settings: Settings, daemon: Daemon) -> AsyncIterator[Check]:
    async with Containerd(daemon.endpoint, namespace=settings.namespace) as client:
        try:
            version = (await client.check()).version
        except SerpentineError as error:
            yield _failed("containerd", error)
            return
        where = f"{version} at {daemon.endpoint} ({daemon.kind}, {daemon.transport})"
        numbers = tuple(int(p) for p in version.lstrip("v").split(".")[:2] if p.isdigit())
        if numbers and numbers < MIN_CONTAINERD:
            remedy = "use containerd 1.6 or newer"
            yield Check("containerd", Outcome.FAIL, where, remedy)
        else:
            yield Check("containerd", Outcome.OK, where)
        plugins = await client.introspection.snapshotters()
    name = settings.snapshotter or "overlayfs"
    chosen = next((p for p in plugins if p.id == name), None)
    names = ", ".join(sorted(p.id for p in plugins)) or "none"
    if chosen is not None:
        abilities = ", ".join(chosen.capabilities) or "no special capabilities"
        yield Check("snapshotter", Outcome.OK, f"{name} ({abilities})")
    else:
        remedy = f"choose one that works with --snapshotter: {names}"
        yield Check("snapshotter", Outcome.FAIL, f"{name} does not work here", remedy)
    if daemon.kind == "embedded":
        path = Embedded.from_settings(settings).search_path()
        program = next((p for p in _DECOMPRESSORS if shutil.which(p, path=path)), None)
        if program:
            yield Check("decompression", Outcome.OK, f"containerd uses {program}")
        else:
            text = "containerd uses its own gzip, at about half the speed"
            remedy = "install igzip (Debian: apt-get install isal), then restart the daemon"
            yield Check("decompression", Outcome.NOTE, text, remedy)


def _space(path: Path | None) -> Check:
    if path is None:
        return Check("disk", Outcome.NOTE, "containerd's disk is not on this machine, or not ours")
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Check("disk", Outcome.FAIL, f"{path}: {error.strerror}", "mend the file system")
    text = f"{free / (1 << 30):.1f} GiB free at {path}"
    if free < MIN_SPACE:
        return Check("disk", Outcome.FAIL, text, "make room there")
    return Check("disk", Outcome.OK, text)


async def _registry(settings: Settings, host: str) -> AsyncIterator[Check]:
    from serpentine.registry import CredentialStore, RegistryClient

    if settings.offline:
        yield Check("registry", Outcome.NOTE, f"{host} is not asked: offline")
        return
    try:
        async with RegistryClient(
            credentials=CredentialStore.from_environment(),
            insecure=settings.insecure_registries,
            user_agent=f"serpentine/{__version__}",
        ) as client:
            async with asyncio.timeout(30):
                status, date = await client.ping(host)
    except TimeoutError:
        remedy = "check the network, and the proxy variables"
        yield Check("registry", Outcome.FAIL, f"{host}: no answer in 30 s", remedy)
        return
    except SerpentineError as error:
        yield _failed("registry", error)
        return
    yield Check("registry", Outcome.OK, f"{host} answers ({status})")
    yield _clock(date, dt.datetime.now(dt.UTC), host)


def _clock(date: str | None, now: dt.datetime, host: str) -> Check:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return Check("clock", Outcome.NOTE, f"{host} does not tell the time")
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=dt.UTC)
    skew = (now - theirs).total_seconds()
    if abs(skew) > MAX_SKEW:
        way = "ahead of" if skew > 0 else "behind"
        return Check(
            "clock",
            Outcome.FAIL,
            f"this machine is {abs(skew):.0f} s {way} {host}",
            "set the clock: certificates and tokens depend on it",
        )
    return Check("clock", Outcome.OK, f"within {abs(skew):.0f} s of {host}")


def _failed(name: str, error: SerpentineError) -> Check:
    return Check(name, Outcome.FAIL, str(error), error.hint)
