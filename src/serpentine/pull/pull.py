"""The whole pull, in the order of the seed's sequence."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from serpentine._concurrency import KeyedLock, shielded, task_group
from serpentine.containerd import Containerd, Snapshots
from serpentine.errors import ContainerdError, NotFound
from serpentine.events import (
    OnEvent,
    PullFinished,
    PullPlanned,
    PullResolved,
    PullStarted,
)
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.model.platform import Platform
from serpentine.model.state import ContainerState
from serpentine.pull.fetch import fetch_blob
from serpentine.pull.job import Job, Statistics
from serpentine.pull.plan import make_plan
from serpentine.pull.record import is_recorded, record_image
from serpentine.pull.resolve import ResolvedImage, resolve
from serpentine.pull.unpack import lease_snapshot, unpack_layer

if TYPE_CHECKING:
    from serpentine.registry import Repository

__all__ = ["PullOptions", "pull", "state_of"]

# A pull that is killed leaves its lease behind; this is how long containerd then keeps what
# was written under it.  It is also the longest that a pull may take.
LEASE_LIFETIME = timedelta(hours=24)
CLEANUP_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How to pull: for which platform, with how many downloads at once, synced to disk or not."""

    platform: Platform
    max_concurrent_downloads: int = 3
    sync_fs: bool = False


async def pull(
    repository: Repository,
    containerd: Containerd,
    snapshots: Snapshots,
    options: PullOptions,
    *,
    locks: KeyedLock,
    on_event: OnEvent,
) -> ContainerState:
    """Bring the image that ``repository.reference`` names into containerd, and unpack it.

    Layers whose snapshot is there are neither downloaded nor applied.  On failure and
    cancellation nothing is left behind: what was written belongs to a lease that goes.

    Raises RegistryError, ImageError and ContainerdError families.
    """
    started = time.monotonic()
    reference = repository.reference
    name = str(reference)
    on_event(PullStarted(image=name))
    image, documents = await resolve(repository, containerd.content, options.platform)
    on_event(
        PullResolved(
            image=name,
            platform=str(image.image_config.platform.normalized()),
            manifest_digest=str(image.manifest.digest),
            index_digest=image.index_digest,
        )
    )
    statistics = Statistics(layers_total=len(image.layers), layers_reused=len(image.layers))
    if await is_recorded(containerd, snapshots.name, name, image):
        everything = {layer.chain_id for layer in image.layers}
        plan = make_plan(image.layers, everything)
        on_event(PullPlanned(image=name, layers=plan.for_display()))
    else:
        async with _lease(containerd) as lease:
            job = Job(
                reference=reference,
                repository=repository,
                containerd=containerd,
                snapshots=snapshots,
                lease=lease,
                locks=locks,
                on_event=on_event,
                max_concurrent_downloads=options.max_concurrent_downloads,
                sync_fs=options.sync_fs,
                statistics=statistics,
            )
            await _fetch_and_unpack(job, image)
    state = state_of(image, reference.name, snapshots.name)
    on_event(
        PullFinished(
            image=state.image or name,
            snapshot_key=state.snapshot_key,
            bytes_downloaded=statistics.bytes_downloaded + documents.fetched,
            layers_total=statistics.layers_total,
            layers_reused=statistics.layers_reused,
            registry_requests=repository.requests,
            seconds=time.monotonic() - started,
        )
    )
    return state


def state_of(image: ResolvedImage, repository_name: str, snapshotter: str) -> ContainerState:
    """Return the state of an image that is unpacked."""
    return ContainerState.from_config(
        image.image_config,
        snapshot_key=str(image.layers[-1].chain_id) if image.layers else "",
        snapshotter=snapshotter,
        image=f"{repository_name}@{image.manifest.digest}",
        manifest_digest=str(image.manifest.digest),
        index_digest=image.index_digest,
        config_digest=str(image.config.digest),
    )


@asynccontextmanager
async def _lease(containerd: Containerd) -> AsyncIterator[str]:
    """Hold a lease; let it go on every way out.

    After a failure the collector runs at once (``sync``), so that nothing half-made is left.
    """
    lease_id = f"serpentine-pull-{secrets.token_hex(8)}"
    failed = True
    try:
        await containerd.leases.create(lease_id, expires=LEASE_LIFETIME)
        yield lease_id
        failed = False
    finally:
        await shielded(_drop(containerd, lease_id, sync=failed), timeout=CLEANUP_TIMEOUT)


async def _drop(containerd: Containerd, lease_id: str, *, sync: bool) -> None:
    try:
        await containerd.leases.delete(lease_id, sync=sync)
    except ContainerdError:
        # Nothing can be done here without hiding the error that is on its way; the lease
        # expires by itself.
        return


async def _fetch_and_unpack(job: Job, image: ResolvedImage) -> None:
    plan = make_plan(image.layers, await _present(job, image.layers))
    job.on_event(PullPlanned(image=job.image, layers=plan.for_display()))
    slots = asyncio.Semaphore(job.max_concurrent_downloads)
    arrived = {blob.digest: asyncio.Event() for blob in plan.fetch}
    downloaded: set[Digest] = set()

    async def fetch(blob: Descriptor) -> None:
        async with slots:
            if await fetch_blob(job, blob, plan.places(blob.digest)):
                downloaded.add(blob.digest)
        arrived[blob.digest].set()

    async with task_group() as group:
        for blob in plan.fetch:
            group.create_task(fetch(blob), name=f"fetch {blob.digest}")
        # One layer needs the one below it: they are applied in order, each while the ones
        # above are still arriving.
        for place, layer in enumerate(plan.unpack, len(plan.layers) - len(plan.unpack)):
            await arrived[layer.descriptor.digest].wait()
            await unpack_layer(job, layer, place)
    job.statistics.layers_reused = sum(
        layer.descriptor.digest not in downloaded for layer in plan.layers
    )
    await record_image(job, image, plan.top)


async def _present(job: Job, layers: tuple[Layer, ...]) -> set[ChainID]:
    """Find the highest snapshot that is there, and hold it by the lease."""
    for layer in reversed(layers):
        # Holding is a transaction with a sync to disk, looking is not: so look first, and
        # look again once it is held.
        if await _is_there(job, layer.chain_id) and await lease_snapshot(job, layer.chain_id):
            return {layer.chain_id}
    return set()


async def _is_there(job: Job, chain_id: ChainID) -> bool:
    try:
        await job.snapshots.stat(str(chain_id))
    except NotFound:
        return False
    return True
