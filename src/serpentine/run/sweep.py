"""What clients that were killed have left: their steps are ended and removed."""

from __future__ import annotations

import asyncio
import contextlib

from serpentine._session import is_dead
from serpentine.errors import ContainerdError
from serpentine.run.step import LABEL_SESSION, LABEL_STEP, StepContext, end_container

__all__ = ["sweep"]


async def sweep(context: StepContext) -> int:
    """Remove the steps of this machine's clients that are gone; return how many there were.

    Those of other machines' clients are left alone: nobody here can tell.
    """
    marked = [f'labels."{LABEL_SESSION}"']
    containers = await context.containerd.containers.all(marked)
    leases = await context.containerd.leases.all(marked)
    sessions = {c.labels[LABEL_SESSION] for c in containers}
    sessions |= {lease.labels[LABEL_SESSION] for lease in leases}
    gone = await asyncio.to_thread(lambda: {s for s in sessions if is_dead(s)})
    found = 0
    for container in containers:
        if container.labels[LABEL_SESSION] in gone:
            found += 1
            await end_container(context, container.id)
            await context.site.clear(container.id)
    for lease in leases:
        if lease.labels[LABEL_SESSION] in gone:
            with contextlib.suppress(ContainerdError):
                await context.snapshots.remove(lease.labels.get(LABEL_STEP, lease.id))
            with contextlib.suppress(ContainerdError):
                await context.containerd.leases.delete(lease.id)
    return found
