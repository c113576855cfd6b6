"""Removing what is not needed, so that nobody who works beside it misses anything.

Only what keeps things is removed here: image records, root labels, leases of clients that are gone.
What goes with them is containerd's collector's to decide, which looks at all of them at once, and
holds up whoever wants to add to them.  So a pull, a step or another client keeps what its lease
holds, however old our picture is.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from datetime import timedelta

from serpentine._concurrency import shielded
from serpentine.containerd import Containerd
from serpentine.errors import AlreadyExists, ContainerdError, Locked, NotFound
from serpentine.pull.leases import LABEL_SESSION
from serpentine.upkeep.inventory import ROOT, take_inventory
from serpentine.upkeep.plan import Candidate, Plan, PrunedKind, PruneOptions, PruneResult, make_plan

__all__ = ["carry_out", "collect", "find_out"]

CLEANUP_TIMEOUT = 60.0


async def find_out(containerd: Containerd, options: PruneOptions) -> Plan:
    """Return what may go."""
    return make_plan(await take_inventory(containerd), options)


async def carry_out(containerd: Containerd, plan: Plan) -> PruneResult:
    """Remove what may go, and return what that was.

    Steps are ended before by who can; those that are still there stay.
    """
    skipped: list[Candidate] = []
    if plan.has_steps:
        there = {container.id for container in await containerd.containers.all()}
        skipped += (c for c in plan.chosen if c.kind is PrunedKind.STEP and c.name in there)
    for candidate in plan.chosen:
        if not await _remove(containerd, plan, candidate):
            skipped.append(candidate)
    await collect(containerd)
    return plan.without(skipped).result([f"{c.kind} {c.name}" for c in skipped])


async def _remove(containerd: Containerd, plan: Plan, candidate: Candidate) -> bool:
    """Remove one, unless it is another by now; tell whether it is gone."""
    try:
        match candidate.kind:
            case PrunedKind.IMAGE:
                return await _remove_image(containerd, plan, candidate.name)
            case PrunedKind.STATE:
                return await _remove_state(containerd, candidate)
            case PrunedKind.PULL:
                return await _remove_lease(containerd, plan, candidate.name)
            case PrunedKind.INGEST:
                return await _remove_ingest(containerd, plan, candidate.name)
    except NotFound:
        pass  # somebody else was first
    return True


async def _remove_image(containerd: Containerd, plan: Plan, name: str) -> bool:
    before = plan.inventory.images[name]
    now = await containerd.images.get(name)
    if (now.target, now.updated_at) != (before.target, before.updated_at):
        return False  # it was pulled again
    try:
        # A newer containerd looks once more.
        await containerd.images.delete(name, target=now.target)
    except NotFound:
        # It says the same for both: gone, or another by now.
        return not await _is_image(containerd, name)
    return True


async def _is_image(containerd: Containerd, name: str) -> bool:
    try:
        await containerd.images.get(name)
    except NotFound:
        return False
    return True


async def _remove_state(containerd: Containerd, candidate: Candidate) -> bool:
    for kind, key in candidate.nodes:
        # Others may build on it.  Without its root, the collector knows.
        snapshots = containerd.snapshots(kind.removeprefix("snapshots/"))
        await snapshots.update_labels(key, {ROOT: None})
    return True


async def _remove_lease(containerd: Containerd, plan: Plan, name: str) -> bool:
    before = plan.inventory.leases[name].labels.get(LABEL_SESSION)
    for lease in await containerd.leases.all([f'id=="{name}"']):
        if lease.labels.get(LABEL_SESSION) != before:
            return False  # somebody has taken it over
        await containerd.leases.delete(name)
    return True


async def _remove_ingest(containerd: Containerd, plan: Plan, ref: str) -> bool:
    before = plan.inventory.ingests[ref]
    status = await containerd.content.status(ref)
    if (status.offset, status.updated_at) != (before.offset, before.updated_at):
        return False
    try:
        # Held while it is thrown away, so that it is nobody else's.  With another total than its
        # own, containerd does not first hash what is there (trap 13).
        async with containerd.content.writer(ref, total=status.total + 1):
            await containerd.content.abort(ref)
    except (Locked, AlreadyExists):
        return False  # somebody writes it
    return True


async def collect(containerd: Containerd) -> None:
    """Let containerd's collector run, and wait until it has.  Cancelled, it leaves no lease."""
    name = f"serpentine-prune-{secrets.token_hex(8)}"
    try:
        await containerd.leases.create(name, expires=timedelta(minutes=5))
        await containerd.leases.delete(name, sync=True)
    except BaseException:
        with suppress(ContainerdError, TimeoutError):
            await shielded(containerd.leases.delete(name), timeout=CLEANUP_TIMEOUT)
        raise
