"""Which containerd to use: decided in a plain function, then found or started."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

from serpentine.containerd import Endpoint
from serpentine.daemon.embedded import Embedded
from serpentine.errors import DaemonNotFound
from serpentine.events import OnEvent
from serpentine.settings import Settings

__all__ = ["Choice", "Daemon", "Host", "choose", "find"]


@dataclass(frozen=True, slots=True)
class Host:
    """What there is on this machine that decides how a containerd can be had."""

    system: str
    is_root: bool
    containerd: str | None
    runc: str | None

    @classmethod
    def look(cls) -> Host:
        """Look at the machine that this process runs on."""
        return cls(
            system=sys.platform,
            is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
            containerd=shutil.which("containerd"),
            runc=shutil.which("runc"),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of daemon (``address`` or ``embedded``), and the reason in words for people."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Daemon:
    """A containerd that can be talked to."""

    kind: str
    reason: str
    endpoint: Endpoint


def choose(settings: Settings, host: Host, *, embedded_runs: bool = False) -> Choice:
    """Decide which containerd to use; raises DaemonNotFound, saying what to install."""
    if settings.address:
        source = settings.sources.get("address", "argument")
        said = "an address was given" if source == "argument" else f"{source} names it"
        return Choice("address", said)
    if embedded_runs:
        return Choice("embedded", "our own containerd is running")
    give_one = "or name a containerd with --address or CONTAINERD_ADDRESS"
    if not host.system.startswith("linux"):
        raise DaemonNotFound(
            f"there is no containerd to use, and none can be started on {host.system}",
            hint="name a containerd with --address or CONTAINERD_ADDRESS",
        )
    missing = [n for n, p in (("containerd", host.containerd), ("runc", host.runc)) if not p]
    if missing:
        raise DaemonNotFound(
            f"there is no containerd to use: {' and '.join(missing)} not found on the PATH",
            hint=f"install {' and '.join(missing)} (Debian: apt-get install containerd runc),"
            f" {give_one}",
        )
    if not host.is_root:
        raise DaemonNotFound(
            "there is no containerd to use, and only root can start one",
            hint=f"run this as root, {give_one}",
        )
    return Choice("embedded", "no address was given; root can start a containerd of our own")


async def find(settings: Settings, *, on_event: OnEvent, start: bool = True) -> Daemon | None:
    """Return the containerd to use; starts our own if need be and if ``start`` allows it.

    Returns None only when ``start`` is false and ours is not running.  Somebody else's is not
    contacted here.
    """
    if settings.address:
        choice = choose(settings, Host.look())
        return Daemon(choice.kind, choice.reason, Endpoint.parse(settings.address))
    embedded = Embedded.from_settings(settings)
    running = await embedded.running()
    if running is None and not start:
        return None
    choice = choose(settings, Host.look(), embedded_runs=running is not None)
    if running is None:
        await embedded.start(on_event=on_event)
    return Daemon(choice.kind, choice.reason, embedded.endpoint)
