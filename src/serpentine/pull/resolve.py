"""From a reference to verified documents: index, manifest, config."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from serpentine.containerd import Content
from serpentine.errors import (
    ContainerdError,
    InvalidDocument,
    NotFound,
    PlatformNotFound,
    Unavailable,
    UnsupportedImage,
)
from serpentine.model.digest import Digest
from serpentine.model.documents import (
    CONFIG_TYPES,
    Descriptor,
    ImageConfig,
    Index,
    Layer,
    Manifest,
    decode_config,
    decode_document,
    layers_of,
    media_type_of,
)
from serpentine.model.platform import Platform
from serpentine.pull.plan import candidates, list_platforms

if TYPE_CHECKING:
    from serpentine.registry import Repository

__all__ = ["Document", "Documents", "ResolvedImage", "find_image", "resolve"]

MAX_INDEX_DEPTH = 4
MAX_DOCUMENTS = 64
MAX_LOCAL_DOCUMENT = 8 * 1024 * 1024

Fetch = Callable[[Descriptor, str], Awaitable[bytes]]


class Document(msgspec.Struct, frozen=True):
    """A document with its exact bytes, and its place in the index that led to it."""

    descriptor: Descriptor
    data: bytes
    position: int = 0

    @property
    def digest(self) -> Digest:
        """What names it."""
        return self.descriptor.digest


class ResolvedImage(msgspec.Struct, frozen=True):
    """One platform's image: every document verified, nothing of its layers fetched yet.

    ``indexes`` leads from the document that the reference names down to the manifest, and is
    empty when the reference names the manifest itself.
    """

    indexes: tuple[Document, ...]
    manifest: Document
    config: Document
    layers: tuple[Layer, ...]
    image_config: ImageConfig

    @property
    def root(self) -> Document:
        """The document that the reference names: what the image record points at."""
        return self.indexes[0] if self.indexes else self.manifest

    @property
    def index_digest(self) -> str | None:
        """The digest of the index that the reference names, if it names one."""
        return str(self.indexes[0].digest) if self.indexes else None


class Documents:
    """Reads documents: from containerd if it has them unharmed, else from the registry.

    ``fetched`` counts the bytes that came from the registry.
    """

    def __init__(self, content: Content, fetch: Fetch | None) -> None:
        self._content = content
        self._fetch = fetch
        self._known: dict[Digest, bytes] = {}
        self.fetched = 0

    def add(self, descriptor: Descriptor, data: bytes) -> None:
        """Take in a document that has been verified already."""
        self._known[descriptor.digest] = data
        self.fetched += len(data)

    async def read(self, descriptor: Descriptor, kind: str) -> bytes:
        """Return the bytes; ``kind`` is ``manifests`` or ``blobs``, as in the registry's paths.

        Raises NotFound if containerd does not have it and there is no registry to ask.
        """
        if (known := self._known.get(descriptor.digest)) is not None:
            return known
        if len(self._known) >= MAX_DOCUMENTS:
            raise UnsupportedImage(
                f"the image leads through more than {MAX_DOCUMENTS} documents",
                hint="name one platform's manifest by its digest",
            )
        data = await self._stored(descriptor)
        if data is None:
            if self._fetch is None:
                raise NotFound(f"containerd has no {descriptor.digest}", hint="pull the image")
            data = await self._fetch(descriptor, kind)
            self.fetched += len(data)
        self._known[descriptor.digest] = data
        return data

    async def _stored(self, descriptor: Descriptor) -> bytes | None:
        try:
            data = await self._content.read_all(descriptor.digest, limit=MAX_LOCAL_DOCUMENT)
        except NotFound:
            return None
        except Unavailable:
            raise  # nothing can be done without it; what it has need not come again
        except ContainerdError:
            # Unreadable there (damaged, or absurdly large): the registry's copy is as good.
            if self._fetch is None:
                raise
            return None
        if descriptor.digest.matches(data):
            return data
        if self._fetch is not None:
            # Damaged, on the disk or by whoever wrote there.  As long as containerd has it, it
            # takes no other copy, and whoever reads it next finds the same.
            await self._content.delete(descriptor.digest)
        return None


async def resolve(
    repository: Repository, content: Content, platform: Platform
) -> tuple[ResolvedImage, Documents]:
    """Ask the registry what the reference means, and read the documents down to the config.

    One request (HEAD) when containerd has the documents already.
    """
    resolved = await repository.resolve()
    documents = Documents(content, repository.fetch_document)
    if resolved.body is not None:
        documents.add(resolved.descriptor, resolved.body)
    image = await find_image(documents, resolved.descriptor, platform, str(repository.reference))
    return image, documents


async def find_image(
    documents: Documents, root: Descriptor, platform: Platform, image: str
) -> ResolvedImage:
    """Walk from the root document to the platform's config.

    Raises PlatformNotFound, listing what there is, and what the documents' decoders raise.
    """
    available: list[str] = []
    found = await _descend(documents, Document(root, b""), (), platform, image, available)
    if found is not None:
        return found
    there_is = ", ".join(dict.fromkeys(available))
    raise PlatformNotFound(
        f"{image} has no image for {platform}; there is: {there_is or 'nothing'}",
        image=image,
        hint=f"choose one with --platform {available[0]}"
        if available
        else "the image has to be pushed again",
        available=tuple(dict.fromkeys(available)),
    )


async def _descend(
    documents: Documents,
    here: Document,
    above: tuple[Document, ...],
    platform: Platform,
    image: str,
    available: list[str],
) -> ResolvedImage | None:
    what = f"{image} ({here.descriptor.digest})" if above else image
    data = await documents.read(here.descriptor, "manifests")
    decoded = decode_document(data, here.descriptor.media_type, what)
    here = Document(_with_type(here.descriptor, decoded, data), data, here.position)
    if isinstance(decoded, Manifest):
        return await _read_image(documents, here, decoded, above, platform, image, available)
    if len(above) >= MAX_INDEX_DEPTH:
        raise UnsupportedImage(
            f"{image} nests more than {MAX_INDEX_DEPTH} indexes", hint="name an inner one"
        )
    available += list_platforms(decoded.manifests)
    for entry in candidates(decoded.manifests, platform):
        below = Document(entry, b"", _position(decoded, entry))
        found = await _descend(documents, below, (*above, here), platform, image, available)
        if found is not None:
            return found
    return None


async def _read_image(
    documents: Documents,
    here: Document,
    manifest: Manifest,
    above: tuple[Document, ...],
    platform: Platform,
    image: str,
    available: list[str],
) -> ResolvedImage | None:
    if manifest.artifact_type or manifest.config.media_type not in CONFIG_TYPES:
        kind = manifest.artifact_type or manifest.config.media_type
        raise UnsupportedImage(
            f"{image} is no image but an artifact of type {kind!r}",
            image=image,
            hint="name an image",
        )
    data = await documents.read(manifest.config, "blobs")
    what = f"the config of {image} ({manifest.config.digest})"
    config = decode_config(data, what)
    entry = here.descriptor.platform
    named = above and entry is not None and entry.architecture
    # What the index says counts (nothing else could tell variants apart); without it the
    # config decides, and a config that names no platform is taken as fitting.
    if not named and config.architecture and platform.rank(config.platform) is None:
        available.append(str(config.platform.normalized()))
        return None
    layers = layers_of(manifest, config, image)
    return ResolvedImage(
        indexes=above,
        manifest=here,
        config=Document(manifest.config, data),
        layers=layers,
        image_config=config,
    )


def _position(index: Index, entry: Descriptor) -> int:
    return next(i for i, other in enumerate(index.manifests) if other is entry)


def _with_type(descriptor: Descriptor, document: Manifest | Index, data: bytes) -> Descriptor:
    """Complete a descriptor whose media type or size the registry did not give."""
    if descriptor.size not in (-1, 0, len(data)):
        raise InvalidDocument(
            f"{descriptor.digest} has {len(data)} bytes, and its descriptor says {descriptor.size}",
            hint="the image has to be pushed again",
        )
    return Descriptor(
        media_type=media_type_of(document, descriptor.media_type),
        digest=descriptor.digest,
        size=len(data),
        annotations=descriptor.annotations,
        platform=descriptor.platform,
    )
