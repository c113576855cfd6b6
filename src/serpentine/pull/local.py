"""Images that are in containerd already: read back without a registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from serpentine.containerd import Containerd, ImageRecord
from serpentine.errors import ContainerdError, ImageError, NotFound
from serpentine.model.digest import Digest
from serpentine.model.documents import (
    Descriptor,
    Index,
    Manifest,
    decode_config,
    decode_document,
)
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.pull.resolve import MAX_INDEX_DEPTH, Documents, ResolvedImage, find_image

__all__ = ["LocalImage", "find_record", "list_images", "read_image"]


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image record, and what of it is in the content store.

    ``platforms`` are those whose manifest and config are there; ``size`` is the sum of the
    compressed sizes in bytes of their documents and layers, each blob counted once, whether
    its blob is still there or only its snapshot.
    """

    name: str
    digest: str
    media_type: str
    platforms: tuple[str, ...]
    size: int
    created_at: datetime | None
    updated_at: datetime | None


async def list_images(containerd: Containerd) -> list[LocalImage]:
    """Return all image records of the namespace, by name."""
    records = await containerd.images.all()
    return [await _describe(containerd, r) for r in sorted(records, key=lambda r: r.name)]


async def find_record(containerd: Containerd, text: str) -> ImageRecord:
    """Return the record that a person means by this text.

    The text may be a record's exact name, a reference in its short form, or NAME@DIGEST of
    any document of the image, as ``pull`` prints it.  Raises NotFound, InvalidReference.
    """
    for name in dict.fromkeys((text, str(reference := Reference.parse(text)))):
        try:
            return await containerd.images.get(name)
        except NotFound:
            continue
    if reference.digest is not None:
        for record in await containerd.images.all():
            if record.name.startswith((f"{reference.name}:", f"{reference.name}@")) and (
                reference.digest in await _documents_of(containerd, record)
            ):
                return record
    raise NotFound(
        f"there is no image {text} in namespace {containerd.namespace}",
        hint="'serpentine images' lists what there is",
    )


async def read_image(
    containerd: Containerd, record: ImageRecord, platform: Platform
) -> ResolvedImage:
    """Return the platform's image of a record; raises NotFound if it was not pulled."""
    documents = Documents(containerd.content, None)
    try:
        return await find_image(documents, record.target, platform, record.name)
    except NotFound as error:
        raise NotFound(
            f"{record.name} is not there for {platform}",
            hint=f"pull it: serpentine pull {record.name} --platform {platform}",
        ) from error


async def _documents_of(containerd: Containerd, record: ImageRecord) -> set[Digest]:
    found: set[Digest] = set()
    await _walk(containerd, record.target, found, {}, [], 0)
    return found


async def _describe(containerd: Containerd, record: ImageRecord) -> LocalImage:
    blobs: dict[Digest, int] = {}
    platforms: list[str] = []
    await _walk(containerd, record.target, set(), blobs, platforms, 0)
    return LocalImage(
        name=record.name,
        digest=str(record.target.digest),
        media_type=record.target.media_type,
        platforms=tuple(dict.fromkeys(platforms)),
        size=sum(blobs.values()),
        created_at=record.created_at,
        updated_at=record.updated_at,
    )


async def _walk(
    containerd: Containerd,
    here: Descriptor,
    documents: set[Digest],
    blobs: dict[Digest, int],
    platforms: list[str],
    depth: int,
) -> None:
    """Gather what of an image is there; what is not there or not readable is left out."""
    try:
        data = await Documents(containerd.content, None).read(here, "manifests")
        document = decode_document(data, here.media_type, str(here.digest))
        if isinstance(document, Manifest):
            config = await Documents(containerd.content, None).read(document.config, "blobs")
            platform = decode_config(config, str(document.config.digest)).platform
    except (ContainerdError, ImageError):
        return
    documents.add(here.digest)
    blobs[here.digest] = len(data)
    if isinstance(document, Index):
        for entry in document.manifests if depth < MAX_INDEX_DEPTH else ():
            if not entry.is_attestation:
                await _walk(containerd, entry, documents, blobs, platforms, depth + 1)
        return
    documents.add(document.config.digest)
    platforms.append(str(platform.normalized()))
    for blob in (document.config, *document.layers):
        blobs[blob.digest] = blob.size
