"""A state becomes an image: its changes a layer on the image that it came from."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from serpentine._concurrency import KeyedLock, shielded
from serpentine.containerd import Containerd, Mount, Resource, Snapshots
from serpentine.errors import (
    ContainerdError,
    ImageError,
    NotFound,
    Unavailable,
    UnsupportedImage,
)
from serpentine.events import OnEvent
from serpentine.model.digest import DiffID, Digest
from serpentine.model.documents import (
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Layer,
    Manifest,
    decode_config,
    decode_document,
    layers_of,
)
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.model.state import ContainerState, HealthCheck
from serpentine.pull.job import Job
from serpentine.pull.leases import leased
from serpentine.pull.local import read_image
from serpentine.pull.pull import state_of
from serpentine.pull.record import record_image
from serpentine.pull.resolve import Document, ResolvedImage
from serpentine.pull.unpack import unpack_layer

__all__ = ["commit_image"]

CLEANUP_TIMEOUT = 60.0
_UNCOMPRESSED = "containerd.io/uncompressed"
_CREATED_BY = "serpentine"
# Of the old image's config; the rest is made anew, or said something of that image only (how it
# was built, what a builder may take from it).
_KEPT = ("author", "variant", "os.version", "os.features")
# The same bytes under the names that an OCI manifest gives them.
_DOCKER = "application/vnd.docker.image.rootfs."
_OCI = "application/vnd.oci.image.layer."
_EXTENSIONS = {"": "", ".gzip": "+gzip", ".zstd": "+zstd"}
_OCI_NAMES = {
    f"{_DOCKER}{docker}{ext}": f"{_OCI}{oci}{_EXTENSIONS[ext]}"
    for docker, oci in (("diff.tar", "v1.tar"), ("foreign.diff.tar", "nondistributable.v1.tar"))
    for ext in _EXTENSIONS
}


@dataclass(frozen=True, slots=True)
class _Base:
    """What a new image goes on with; empty for a state from scratch.

    config: the base's own, decoded; without ``config`` and ``history`` of layers above.
    state: what the config says of a process, None where it is not this base's.
    """

    layers: tuple[Layer, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    state: ContainerState | None = None


async def commit_image(
    containerd: Containerd,
    snapshots: Snapshots,
    state: ContainerState,
    reference: Reference,
    *,
    locks: KeyedLock,
    on_event: OnEvent,
    comment: str = "",
) -> ContainerState:
    """Record a state as an image under a name, unpacked, and return the image's state.

    The changes since the image that the state came from are one layer (image specification:
    layer.md, config.md).  Raises UnsupportedImage if that image is not there any more, NotFound
    if the state is not.
    """
    async with leased(containerd) as lease:
        job = Job(
            reference=reference,
            repository=None,
            containerd=containerd,
            snapshots=snapshots,
            lease=lease,
            locks=locks,
            on_event=on_event,
            sync_fs=False,
        )
        base_key = await _base_key(snapshots, state.snapshot_key)
        base = await _held_base(job, base_key, state) if base_key else _Base()
        new: tuple[Descriptor, DiffID] | None = None
        if state.snapshot_key != base_key:
            new = await _layer(job, base_key, state.snapshot_key)
        image = _image(base, state, new, comment)
        if new is not None:
            await unpack_layer(job, image.layers[-1], len(image.layers) - 1)
        await record_image(job, image, image.layers[-1].chain_id if image.layers else None)
    return state_of(image, reference.name, snapshots.name)


async def _base_key(snapshots: Snapshots, key: str) -> str:
    """Return the highest snapshot below that belongs to an image; empty for none."""
    here = key
    while here and not here.startswith("sha256:"):
        try:
            here = (await snapshots.stat(here)).parent
        except NotFound:
            raise NotFound(
                f"the snapshot of this state is not there: {key}",
                hint="run the steps again that made it",
            ) from None
    return here


async def _held_base(job: Job, key: str, state: ContainerState) -> _Base:
    """Return the image that the state came from, held by the lease until the new one stands."""
    image, place = await _find_base(job, key, state)
    # First held, then looked at: somebody may have removed it meanwhile.  The manifest's labels
    # lead the collector to the rest of it.
    held = (
        Resource(id=key, type=f"snapshots/{job.snapshots.name}"),
        Resource(id=str(image.manifest.digest), type="content"),
    )
    for resource in held:
        await job.containerd.leases.add_resource(job.lease, resource)
    try:
        await job.snapshots.stat(key)
        await job.containerd.content.info(image.manifest.digest)
    except NotFound:
        raise _gone() from None
    config: dict[str, Any] = json.loads(image.config.data)
    if place == len(image.layers):
        own = state_of(image, job.reference.name, job.snapshots.name)
        return _Base(image.layers, config, own)
    # Of an image that goes on from there, only the layers are common.
    config |= {"config": None, "history": _history(config, place, cut=True)}
    return _Base(image.layers[:place], config)


async def _find_base(job: Job, key: str, state: ContainerState) -> tuple[ResolvedImage, int]:
    """Return the image that has this snapshot, and how many of its layers lead there.

    Several may: the state's own is the best, then one that it can have come from.
    """
    platform = Platform.parse(state.platform)
    found: list[tuple[int, ResolvedImage, int]] = []
    for record in await job.containerd.images.all():
        try:
            image = await read_image(job.containerd, record, platform)
        except Unavailable:
            raise
        except (ContainerdError, ImageError):
            continue  # another platform's, or no image
        chain = [str(layer.chain_id) for layer in image.layers]
        if key in chain:
            place = chain.index(key) + 1
            found.append((_likeness(image, place, state), image, place))
    if not found:
        raise _gone()
    _, image, place = max(found, key=lambda one: one[0])
    return image, place


def _likeness(image: ResolvedImage, place: int, state: ContainerState) -> int:
    if place < len(image.layers):
        return 0
    if str(image.manifest.digest) == state.manifest_digest:
        return 3
    own = state_of(image, "", state.snapshotter)
    return 2 if msgspec.structs.replace(own, snapshot_key=state.snapshot_key) == state else 1


def _gone() -> UnsupportedImage:
    return UnsupportedImage(
        "the image that this state was made from is not there any more",
        hint="pull it again, then commit",
    )


async def _layer(job: Job, lower: str, upper: str) -> tuple[Descriptor, DiffID]:
    """Write what a snapshot changes as a compressed layer; returns its diff ID, too."""
    async with _view(job, lower) as below, _view(job, upper) as above:
        blob = await job.containerd.diff.diff(
            below,
            above,
            media_type=OCI_LAYER_GZIP,
            ref=f"commit-{secrets.token_hex(8)}",
            lease=job.lease,
        )
    # One that was there before is not in our lease.
    resource = Resource(id=str(blob.digest), type="content")
    await job.containerd.leases.add_resource(job.lease, resource)
    labels = (await job.containerd.content.info(blob.digest)).labels
    return blob, DiffID.parse(labels[_UNCOMPRESSED])


@asynccontextmanager
async def _view(job: Job, key: str) -> AsyncIterator[list[Mount]]:
    if not key:
        yield []  # containerd takes an empty directory then
        return
    name = f"commit-{secrets.token_hex(8)}"
    try:
        yield await job.snapshots.view(name, key, lease=job.lease)
    finally:
        with suppress(TimeoutError):  # a containerd that stands still hides no other error
            await shielded(_remove(job, name), timeout=CLEANUP_TIMEOUT)


async def _remove(job: Job, name: str) -> None:
    try:
        await job.snapshots.remove(name)
    except ContainerdError:
        return  # its lease goes with the commit


def _image(
    base: _Base,
    state: ContainerState,
    new: tuple[Descriptor, DiffID] | None,
    comment: str,
) -> ResolvedImage:
    """Return the documents of the new image."""
    platform = Platform.parse(state.platform)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    layers = [layer.descriptor for layer in base.layers]
    diff_ids = [layer.diff_id for layer in base.layers]
    entry: dict[str, Any] = {"created": now, "created_by": _CREATED_BY}
    if comment:
        entry["comment"] = comment
    if new is None:
        entry["empty_layer"] = True
    else:
        layers.append(new[0])
        diff_ids.append(new[1])
    config: dict[str, Any] = {
        **{name: base.config[name] for name in _KEPT if base.config.get(name)},
        "created": now,
        "os": platform.os,
        "architecture": platform.architecture,
        "config": _process(base, state),
        "rootfs": {"type": "layers", "diff_ids": [str(diff_id) for diff_id in diff_ids]},
        "history": [*_history(base.config, len(base.layers)), entry],
    }
    if platform.variant:
        config["variant"] = platform.variant
    config_data = json.dumps(config, separators=(",", ":")).encode()
    config_document = Document(_descriptor(OCI_CONFIG, config_data), config_data)
    manifest_data = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _plain(config_document.descriptor),
            "layers": [_plain(layer) for layer in layers],
        },
        separators=(",", ":"),
    ).encode()
    document = Document(_descriptor(OCI_MANIFEST, manifest_data), manifest_data)
    manifest = decode_document(manifest_data, OCI_MANIFEST, "the new image")
    assert isinstance(manifest, Manifest)
    image_config = decode_config(config_data, "the new config")
    return ResolvedImage(
        indexes=(),
        manifest=document,
        config=config_document,
        layers=layers_of(manifest, image_config, "the new image"),
        image_config=image_config,
    )


def _process(base: _Base, state: ContainerState) -> dict[str, Any]:
    """Return how to run a process: the state's, and what a state does not know of the base's."""
    before: dict[str, Any] = base.config.get("config") or {}
    members: dict[str, Any] = {
        "Env": list(state.env),
        "WorkingDir": state.working_dir,
        "User": state.user,
        "Entrypoint": list(state.entrypoint),
        "Cmd": list(state.cmd),
        "Labels": dict(state.labels),
        "StopSignal": state.stop_signal,
    }
    # As the base says it: "NONE", and members that we do not read.
    if base.state is None or base.state.healthcheck != state.healthcheck:
        members["Healthcheck"] = _healthcheck(state.healthcheck)
    process = {**before, **members}
    # Absent and null mean the same, and not every reader takes null.
    return {name: value for name, value in process.items() if value not in (None, "", [], {})}


def _healthcheck(check: HealthCheck | None) -> dict[str, Any] | None:
    """Return a health check as Docker writes it, times in nanoseconds."""
    if check is None:
        return None
    if isinstance(check.command, str):
        test = ["CMD-SHELL", check.command]
    else:
        test = ["CMD", *check.command]
    return {
        "Test": test,
        "Interval": round(check.interval * 1e9),
        "Timeout": round(check.timeout * 1e9),
        "StartPeriod": round(check.start_period * 1e9),
        "Retries": check.retries,
    }


def _history(config: dict[str, Any], layers: int, *, cut: bool = False) -> list[dict[str, Any]]:
    """Return a config's history, with exactly one entry for each layer, as readers want it.

    The others are marked as empty.  ``cut``: end with the last of these layers.
    """
    entries: list[dict[str, Any]] = []
    found = 0
    history = config.get("history")
    for one in history if isinstance(history, list) else ():
        if not isinstance(one, dict):
            continue
        is_layer = not one.get("empty_layer")
        if found == layers and (is_layer or cut):
            break
        found += is_layer
        entries.append(one)
    # History is optional, and some write it in part.
    return [*entries, *({"created_by": "unknown"} for _ in range(layers - found))]


def _descriptor(media_type: str, data: bytes) -> Descriptor:
    return Descriptor(media_type=media_type, digest=Digest.of(data), size=len(data))


def _plain(descriptor: Descriptor) -> dict[str, Any]:
    more = {"annotations": descriptor.annotations, "urls": descriptor.urls}
    return {
        "mediaType": _OCI_NAMES.get(descriptor.media_type, descriptor.media_type),
        "digest": str(descriptor.digest),
        "size": descriptor.size,
        **{name: value for name, value in more.items() if value},
    }
