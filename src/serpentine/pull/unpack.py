"""One layer onto its parent: prepare, apply, compare the diff ID, commit under the chain ID."""

from __future__ import annotations

import secrets

from serpentine._concurrency import shielded
from serpentine.containerd import Mount, Resource
from serpentine.errors import (
    AlreadyExists,
    ContainerdError,
    DiffIDMismatch,
    LayerError,
    NoSpace,
    NotFound,
    Unavailable,
)
from serpentine.events import LayerStatus
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.pull.job import Job

__all__ = ["lease_snapshot", "unpack_layer"]

# containerd's name for "decompress whatever the first bytes show, plain tar included".  Layers
# are often labelled wrongly, every other engine looks at the bytes, and the diff ID proves the
# outcome in any case (trap 23).
DETECT_COMPRESSION = "application/vnd.docker.image.rootfs.diff.tar"

UNPACK_LOCK_WAIT = 1800.0
CLEANUP_TIMEOUT = 30.0


async def unpack_layer(job: Job, layer: Layer, place: int) -> None:
    """Make the committed snapshot that ``layer.chain_id`` names, unless it is there by now.

    The parent's snapshot and the layer's blob must be there.  The work is done once, however
    many pulls want it: in this process by a lock of ours, between processes by an ingest that
    is held open and never written, which containerd frees even when its holder is killed.
    """
    name = f"unpack-{job.snapshots.name}-{layer.chain_id}"
    async with (
        job.locks(("unpack", job.containerd.namespace, name)),
        job.containerd.content.lock(name, lease=job.lease, wait=UNPACK_LOCK_WAIT),
    ):
        if not await lease_snapshot(job, layer.chain_id):
            job.report((place,), layer.descriptor, LayerStatus.APPLYING, layer.descriptor.size)
            await _unpack(job, layer)
    job.report((place,), layer.descriptor, LayerStatus.DONE, layer.descriptor.size)


async def lease_snapshot(job: Job, chain_id: ChainID) -> bool:
    """Hold a committed snapshot by the pull's lease; tell whether it is there.

    First hold, then look: what was seen the other way round could be collected in between.
    """
    resource = Resource(id=str(chain_id), type=f"snapshots/{job.snapshots.name}")
    await job.containerd.leases.add_resource(job.lease, resource)
    try:
        await job.snapshots.stat(str(chain_id))
    except NotFound:
        return False
    return True


async def _unpack(job: Job, layer: Layer) -> None:
    key = f"extract-{secrets.token_hex(8)} {layer.chain_id}"
    labels = {
        "containerd.io/snapshot.ref": str(layer.chain_id),
    }
    parent = str(layer.parent) if layer.parent else ""
    try:
        mounts = await job.snapshots.prepare(key, parent, labels=labels, lease=job.lease)
    except AlreadyExists:
        # Either the target is there (a client that ignores our lock, a lazy snapshotter), or
        # our key, which is random: only the first is possible, and stat proves it (trap 19).
        await job.snapshots.stat(str(layer.chain_id))
        return
    except BaseException:
        # The request may have been carried out although we never saw the answer.
        await shielded(_discard(job, key), timeout=CLEANUP_TIMEOUT)
        raise
    try:
        diff_id = await _apply(job, layer, mounts)
        if str(diff_id) != str(layer.diff_id):
            raise DiffIDMismatch(
                f"{job.image}: layer {layer.descriptor.digest} unpacks to {diff_id}, and the"
                f" config says {layer.diff_id}",
                image=job.image,
                digest=str(layer.descriptor.digest),
                hint="the image has to be built and pushed again",
            )
        await job.snapshots.commit(str(layer.chain_id), key, labels=labels, lease=job.lease)
    except AlreadyExists:
        await _discard(job, key)  # trap 20: the active snapshot stays when the name is taken
    except BaseException:
        await shielded(_discard(job, key), timeout=CLEANUP_TIMEOUT)
        raise
    await job.containerd.content.update_labels(
        layer.descriptor.digest, {"containerd.io/uncompressed": str(layer.diff_id)}
    )


async def _apply(job: Job, layer: Layer, mounts: list[Mount]) -> Digest:
    blob = Descriptor(
        media_type=DETECT_COMPRESSION,
        digest=layer.descriptor.digest,
        size=layer.descriptor.size,
    )
    try:
        applied = await job.containerd.diff.apply(
            blob, mounts, sync_fs=job.sync_fs, lease=job.lease
        )
    except (NoSpace, Unavailable):
        raise
    except ContainerdError as error:
        raise LayerError(
            f"{job.image}: layer {layer.descriptor.digest} does not unpack: {error}",
            image=job.image,
            digest=str(layer.descriptor.digest),
            hint="if pulling again does not help, the image has to be pushed again",
        ) from error
    return applied.digest


async def _discard(job: Job, key: str) -> None:
    try:
        await job.snapshots.remove(key)
    except NotFound:
        pass
    except ContainerdError:
        # Its lease goes with the pull, and the collector takes the snapshot then.
        pass
