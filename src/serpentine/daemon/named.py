"""The containerd to use: the one that was named, or one of ours.

For one that was named, nothing is imported of what finds and brings up our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from serpentine.containerd import Endpoint
from serpentine.events import OnEvent
from serpentine.settings import Settings

if TYPE_CHECKING:
    from serpentine.daemon.container import ContainerDaemon

__all__ = ["Daemon", "find"]


class Daemon(msgspec.Struct, frozen=True):
    """A containerd that can be talked to.

    kind: ``address``, ``docker``, ``podman`` or ``embedded``.
    reason: why it is this one, in words for people.
    transport: ``socket`` or ``envoy``.
    container: where it is, if that is a container of ours.
    """

    kind: str
    reason: str
    endpoint: Endpoint
    transport: str = "socket"
    container: ContainerDaemon | None = None


async def find(settings: Settings, *, on_event: OnEvent, start: bool = True) -> Daemon | None:
    """Return the containerd to use; brings one up if need be and if ``start`` allows it.

    Returns None only when ``start`` is false and none of ours runs.  Somebody else's is not
    contacted here.  Raises DaemonNotFound, naming all that was tried, and DaemonFailed.
    """
    if settings.address:
        source = settings.sources.get("address", "argument")
        reason = "an address was given" if source == "argument" else f"{source} names it"
        return Daemon("address", reason, Endpoint.parse(settings.address))
    from serpentine.daemon.discovery import find_ours

    return await find_ours(settings, on_event=on_event, start=start)
