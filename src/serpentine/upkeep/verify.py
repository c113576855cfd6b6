"""Whether what containerd holds of images is what it should be; and mending what is not.

Blobs are read and hashed, trees compared with their blobs.  Each is looked at once, however many
images have it.  Everything that is made for it is held by one lease, and goes with that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from serpentine._concurrency import KeyedLock, shielded
from serpentine._session import current_session
from serpentine.containerd import Containerd, ImageRecord, Resource
from serpentine.errors import (
    ContainerdError,
    ImageError,
    NoSpace,
    NotFound,
    SerpentineError,
    Unavailable,
)
from serpentine.events import OnEvent, VerifyFound
from serpentine.model.documents import (
    CONFIG_TYPES,
    Descriptor,
    Index,
    Layer,
    Manifest,
    decode_config,
    decode_document,
    layers_of,
)
from serpentine.model.reference import Reference
from serpentine.pull.fetch import fetch_blob
from serpentine.pull.leases import LABEL_SESSION
from serpentine.pull.resolve import MAX_INDEX_DEPTH
from serpentine.pull.unpack import unpack_layer
from serpentine.upkeep.blobs import Checked, check_blob, fetch_again, finding
from serpentine.upkeep.found import Finding, VerifyResult
from serpentine.upkeep.trees import TreeChecker
from serpentine.upkeep.work import Work

if TYPE_CHECKING:
    from serpentine.registry import Repository

__all__ = ["verify"]

# The longest that it may take; what a killed one leaves is pruned before that.
LIFETIME = timedelta(hours=24)
CLEANUP_TIMEOUT = 60.0
_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."


@dataclass(slots=True)
class _Done:
    """What was looked at, over all images."""

    blobs: dict[str, Checked] = field(default_factory=dict)
    trees: set[tuple[str, str]] = field(default_factory=set)
    damaged: set[tuple[str, str]] = field(default_factory=set)


async def verify(
    containerd: Containerd,
    records: Sequence[ImageRecord],
    *,
    snapshotter: str,
    repair: bool,
    locks: KeyedLock,
    on_event: OnEvent,
    repositories: Callable[[Reference], Repository],
) -> VerifyResult:
    """Check images, and with ``repair`` mend what is damaged; return what was found.

    repositories: how to get at the registry for a reference.

    Raises ContainerdError when containerd does not answer; what is damaged is a finding.
    """
    lease = f"serpentine-verify-{secrets.token_hex(8)}"
    done = _Done()
    findings: list[Finding] = []
    unchecked: list[str] = []
    try:
        labels = {LABEL_SESSION: await asyncio.to_thread(current_session)}
        await containerd.leases.create(lease, expires=LIFETIME, labels=labels)
        for record in records:
            work = Work(
                image=record.name,
                containerd=containerd,
                snapshots=containerd.snapshots(snapshotter),
                lease=lease,
                repair=repair,
                locks=locks,
                on_event=on_event,
                repositories=repositories,
                findings=findings,
                unchecked=unchecked,
            )
            await _Image(work, done).check()
    finally:
        await shielded(_end(containerd, lease), timeout=CLEANUP_TIMEOUT)
    whole = [blob for blob in done.blobs.values() if blob.is_there]
    return VerifyResult(
        images=tuple(record.name for record in records),
        blobs=len(whole),
        size=sum(blob.size for blob in whole),
        trees=len(done.trees | done.damaged),
        findings=tuple(findings),
        unchecked=tuple(dict.fromkeys(unchecked)),
    )


async def _end(containerd: Containerd, lease: str) -> None:
    # Its expiry is all that can be done about it then, and prune.
    with suppress(ContainerdError):
        await containerd.leases.delete(lease, sync=True)


class _Image:
    def __init__(self, work: Work, done: _Done) -> None:
        self._work, self._done = work, done

    async def check(self) -> None:
        """Check everything that an image's record leads to.

        It is held meanwhile: what a prune takes away is not damaged.
        """
        work, seen = self._work, None
        while True:
            try:
                target = (await work.containerd.images.get(work.image)).target
            except NotFound:
                work.unchecked.append(f"{work.image}: it was removed meanwhile")
                return
            if target == seen:
                break
            # First held, then looked at again: it may have been another by then.
            resource = Resource(id=str(target.digest), type="content")
            await work.containerd.leases.add_resource(work.lease, resource)
            seen = target
        await self._document(target, 0, required=True)

    async def _document(self, here: Descriptor, depth: int, *, required: bool) -> None:
        checked = await self._blob(here, "manifests", "a manifest", required=required)
        if not checked.is_whole:
            return
        if checked.data is None:
            self._work.unchecked.append(f"{self._work.image}: {here.digest} is too large to read")
            return
        try:
            document = decode_document(checked.data, here.media_type, str(here.digest))
        except ImageError as error:
            # What it says is what was pulled: no damage of ours.
            self._work.unchecked.append(f"{self._work.image}: {error}")
            return
        if isinstance(document, Index):
            for entry in document.manifests if depth < MAX_INDEX_DEPTH else ():
                await self._document(entry, depth + 1, required=False)
            return
        await self._manifest(document)

    async def _manifest(self, manifest: Manifest) -> None:
        work = self._work
        config = await self._blob(manifest.config, "blobs", "a config", required=True)
        for blob in manifest.layers:
            await self._blob(blob, "layers", "a layer", required=False)
        if config.data is None or manifest.config.media_type not in CONFIG_TYPES:
            return
        try:
            decoded = decode_config(config.data, str(manifest.config.digest))
            layers = layers_of(manifest, decoded, work.image)
        except ImageError:
            return  # an artifact, whose blobs were all that there is
        if not layers:
            return
        top = str(layers[-1].chain_id)
        unpacked = {
            key.removeprefix(_REF_SNAPSHOT).partition("/")[0]
            for key, value in config.labels.items()
            if key.startswith(_REF_SNAPSHOT) and value == top
        }
        for snapshotter in sorted(unpacked):
            work.snapshots = work.containerd.snapshots(snapshotter)
            await self._trees(layers)

    async def _blob(self, blob: Descriptor, kind: str, what: str, *, required: bool) -> Checked:
        """Check a blob, the first time; what is missing is one only where it is required."""
        work, known = self._work, self._done.blobs.get(str(blob.digest))
        if known is not None:
            return known
        keep = kind != "layers"
        checked = await check_blob(work, blob, keep=keep)
        if not checked.is_whole and (required or checked.is_there):
            reason = ""
            if work.repair:
                reason = await fetch_again(work, blob, kind, checked)
            found = finding(work.image, blob, checked, what, reason)
            if work.repair and not reason:
                labels = checked.labels
                checked = await check_blob(work, blob, keep=keep)
                checked.labels = labels
                found = _mended(found)
            self._note(found)
        self._done.blobs[str(blob.digest)] = checked
        return checked

    def _note(self, found: Finding) -> None:
        self._work.findings.append(found)
        self._tell(found)

    def _tell(self, found: Finding) -> None:
        self._work.on_event(
            VerifyFound(found.image, found.kind, found.name, found.problem, found.repaired)
        )

    async def _trees(self, layers: Sequence[Layer]) -> None:
        """Check the file tree of each layer, bottom first."""
        checker = TreeChecker(self._work)
        try:
            for place, layer in enumerate(layers):
                await self._tree(checker, layer, place)
        finally:
            await shielded(checker.close(), timeout=CLEANUP_TIMEOUT)

    async def _tree(self, checker: TreeChecker, layer: Layer, place: int) -> None:
        work, key = self._work, str(layer.chain_id)
        known = (work.snapshots.name, key)
        if known in self._done.trees and not checker.is_beside:
            checker.skip(layer)
            return
        if reason := await self._without_blob(layer):
            work.unchecked.append(f"{work.image}: the tree of {key} cannot be checked: {reason}")
            checker.skip(layer)
            return
        try:
            await work.snapshots.stat(key)
        except NotFound:
            self._note(await self._unpack(layer, place))
            checker.skip(layer)
            return
        before = len(work.findings)
        try:
            await checker.check(layer)
        except (NoSpace, Unavailable):
            raise
        except ContainerdError as error:
            work.unchecked.append(f"{work.image}: the tree of {key} cannot be checked: {error}")
            checker.skip(layer)
            return
        if known in self._done.damaged:
            del work.findings[before:]  # another image has it, and it was told there
        for found in work.findings[before:]:
            self._tell(found)
        (self._done.damaged if checker.is_damaged else self._done.trees).add(known)

    async def _without_blob(self, layer: Layer) -> str:
        """Return why there is no blob to compare with; fetch it if that may be."""
        blob, work = layer.descriptor, self._work
        checked = self._done.blobs[str(blob.digest)]
        if checked.is_whole:
            return ""
        if checked.is_there:
            return f"its blob {blob.digest} is damaged"
        if not work.repair:
            return f"blob {blob.digest} is not here; --repair fetches it"
        try:
            await fetch_blob(work.job(), blob, ())
        except Unavailable:
            raise
        except SerpentineError as error:
            return f"{error}; {error.hint}".rstrip("; ")
        self._done.blobs[str(blob.digest)] = await check_blob(work, blob, keep=False)
        return ""

    async def _unpack(self, layer: Layer, place: int) -> Finding:
        work = self._work
        found = Finding(
            image=work.image,
            kind="tree",
            name=str(layer.chain_id),
            problem=f"the snapshot of layer {layer.descriptor.digest} is not there",
        )
        if not work.repair:
            return found
        try:
            await unpack_layer(work.job(), layer, place)
        except Unavailable:
            raise
        except SerpentineError as error:
            return _mended(found, f"{error}; {error.hint}".rstrip("; "))
        return _mended(found)


def _mended(found: Finding, reason: str = "") -> Finding:
    return replace(found, repaired=not reason, reason=reason)
