"""OCI and Docker documents: descriptor, manifest, index, image config.

Immutable values beside the raw bytes: a digest is over bytes, so a document that has been
decoded is never encoded again.  Members that we do not know are ignored, as the format asks.
Specifications: OCI image-spec 1.1 (descriptor.md, manifest.md, image-index.md, config.md) and
Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from serpentine.errors import InvalidDigest, InvalidDocument, UnsupportedImage
from serpentine.model.digest import ChainID, DiffID, Digest, chain_ids
from serpentine.model.platform import Platform

__all__ = [
    "CONFIG_TYPES",
    "INDEX_TYPES",
    "LAYER_TYPES",
    "MANIFEST_TYPES",
    "Descriptor",
    "ImageConfig",
    "Index",
    "Layer",
    "Manifest",
    "ProcessConfig",
    "decode_config",
    "decode_document",
    "layers_of",
    "media_type_of",
]

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_LIST})
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream"})
SCHEMA1_TYPES = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = f"{_OCI_LAYER}+gzip"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
LAYER_TYPES = frozenset(
    {
        *(base + ext for base in (_OCI_LAYER, _OCI_FOREIGN) for ext in ("", "+gzip", "+zstd")),
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    }
)
ATTESTATION_ANNOTATION = "vnd.docker.reference.type"

# More layers than any tool can stack (overlayfs and Docker stop at 127); a bound for hostile
# documents, not a promise.
MAX_LAYERS = 1000
# Sizes travel as 64-bit integers with a sign, in Go and to containerd.
MAX_SIZE = 2**63 - 1
# How much of a text that a stranger wrote is repeated in an error.
_SHOWN = 100


class PlatformEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The ``platform`` member of a descriptor in an index."""

    os: str = ""
    architecture: str = ""
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")

    def to_platform(self) -> Platform:
        """Return the same as a value of ours."""
        return Platform(self.os, self.architecture, self.variant or "", self.os_version or "")


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a document says about a blob: media type, digest, size in bytes."""

    media_type: str = ""
    digest: Digest
    size: int
    annotations: dict[str, str] | None = None
    platform: PlatformEntry | None = None
    urls: list[str] | None = None
    artifact_type: str | None = None

    @property
    def is_index(self) -> bool:
        """Whether it names an index (a manifest list, in Docker's words)."""
        return self.media_type in INDEX_TYPES

    @property
    def is_manifest(self) -> bool:
        """Whether it names an image manifest."""
        return self.media_type in MANIFEST_TYPES

    @property
    def is_attestation(self) -> bool:
        """Whether it is a BuildKit attestation, which no platform runs."""
        if ATTESTATION_ANNOTATION in (self.annotations or {}):
            return True
        entry = self.platform
        return entry is not None and (entry.os, entry.architecture) == ("unknown", "unknown")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image manifest: one config and the layers, bottom first."""

    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image index: manifests (or further indexes), usually one per platform."""

    schema_version: int
    media_type: str | None = None
    manifests: list[Descriptor]
    annotations: dict[str, str] | None = None


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The ``Healthcheck`` member of an image config, as Docker writes it; times in nanoseconds."""

    test: list[str] | None = msgspec.field(default=None, name="Test")
    interval: int = msgspec.field(default=0, name="Interval")
    timeout: int = msgspec.field(default=0, name="Timeout")
    start_period: int = msgspec.field(default=0, name="StartPeriod")
    retries: int = msgspec.field(default=0, name="Retries")


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The ``config`` member of an image config: how to run a process."""

    user: str | None = msgspec.field(default=None, name="User")
    env: list[str] | None = msgspec.field(default=None, name="Env")
    entrypoint: list[str] | None = msgspec.field(default=None, name="Entrypoint")
    cmd: list[str] | None = msgspec.field(default=None, name="Cmd")
    working_dir: str | None = msgspec.field(default=None, name="WorkingDir")
    labels: dict[str, str] | None = msgspec.field(default=None, name="Labels")
    stop_signal: str | None = msgspec.field(default=None, name="StopSignal")
    healthcheck: HealthConfig | None = msgspec.field(default=None, name="Healthcheck")


class RootFS(msgspec.Struct, frozen=True, kw_only=True):
    """The ``rootfs`` member of an image config."""

    type: str = "layers"
    diff_ids: list[DiffID] | None = None


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An image config: platform, process, and the diff ID of each layer."""

    architecture: str = ""
    os: str = ""
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    created: str | None = None
    config: ProcessConfig | None = None
    rootfs: RootFS | None = None

    @property
    def platform(self) -> Platform:
        """The platform that the image was built for."""
        return Platform(self.os, self.architecture, self.variant or "", self.os_version or "")


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of an image, with its three identities kept apart."""

    descriptor: Descriptor
    diff_id: DiffID
    chain_id: ChainID
    parent: ChainID | None


_DocT = TypeVar("_DocT", bound=msgspec.Struct)


def _decode_digest(kind: type, value: Any) -> Any:
    """Read a digest; msgspec turns the ValueError into its own error, with the place."""
    assert issubclass(kind, Digest)  # the only type here that msgspec does not know
    if not isinstance(value, str):
        raise ValueError("a digest is a string")  # noqa: TRY004 - msgspec passes TypeError on
    try:
        return kind.parse(value)
    except InvalidDigest as error:
        raise ValueError(str(error)) from None


def _decode(data: bytes, kind: type[_DocT], what: str) -> _DocT:
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_decode_digest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidDocument(
            f"{what} is not valid: {error}", hint="the image has to be pushed again"
        ) from None


class _Probe(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    schema_version: int | None = None
    media_type: str | None = None
    manifests: msgspec.Raw = msgspec.Raw(b"null")
    layers: msgspec.Raw = msgspec.Raw(b"null")


def decode_document(data: bytes, media_type: str, what: str) -> Manifest | Index:
    """Decode a manifest or an index.

    ``media_type`` is what the registry or the parent descriptor says, and may be empty: then
    the document's own ``mediaType`` decides, or, without one, its members do.  ``what`` names
    the document in errors.

    Raises InvalidDocument when it is not valid or contradicts ``media_type`` (image-spec,
    manifest.md: they must match), UnsupportedImage for schema 1 and for unknown kinds.
    """
    probe = _decode(data, _Probe, what)
    own = probe.media_type or ""
    if probe.schema_version == 1 or {own, media_type} & SCHEMA1_TYPES:
        raise UnsupportedImage(
            f"{what} is a Docker schema 1 manifest, which nothing has written since 2017",
            hint="push the image again with a current tool",
        )
    known = MANIFEST_TYPES | INDEX_TYPES
    if own and media_type in known and own != media_type:
        raise InvalidDocument(
            f"{what} says that it is {own[:_SHOWN]!r}, but is served as {media_type!r}",
            hint="the image has to be pushed again",
        )
    kind = own or (media_type if media_type in known else "")
    if kind and kind not in known:
        raise UnsupportedImage(
            f"{what} is of type {kind[:_SHOWN]!r}, which is no image", hint="name an image"
        )
    has_manifests = bytes(probe.manifests) != b"null"
    if has_manifests and bytes(probe.layers) != b"null":
        # Each reader could take it for something else (CVE-2021-41190).
        raise InvalidDocument(
            f"{what} has both 'manifests' and 'layers'", hint="the image has to be pushed again"
        )
    is_index = kind in INDEX_TYPES if kind else has_manifests
    document = _decode(data, Index, what) if is_index else _decode(data, Manifest, what)
    if document.schema_version != 2:
        raise InvalidDocument(
            f"{what} has schemaVersion {str(document.schema_version)[:_SHOWN]}, not 2",
            hint="the image has to be pushed again",
        )
    parts = document.manifests if isinstance(document, Index) else document.layers
    sizes = [part.size for part in parts]
    if isinstance(document, Manifest):
        sizes.append(document.config.size)
        if len(parts) > MAX_LAYERS:
            raise UnsupportedImage(
                f"{what} has {len(parts)} layers, more than {MAX_LAYERS}",
                hint="the image has to be built with fewer layers",
            )
    if any(size < 0 for size in sizes):
        raise InvalidDocument(
            f"{what} has a negative size in it", hint="the image has to be pushed again"
        )
    if any(size > MAX_SIZE for size in sizes):
        raise InvalidDocument(
            f"{what} has a size in it that nothing can have",
            hint="the image has to be pushed again",
        )
    return document


def media_type_of(document: Manifest | Index, served_as: str) -> str:
    """Return a document's media type: its own, else what it was served as, else OCI's."""
    if document.media_type:
        return document.media_type
    default = OCI_INDEX if isinstance(document, Index) else OCI_MANIFEST
    family = INDEX_TYPES if isinstance(document, Index) else MANIFEST_TYPES
    return served_as if served_as in family else default


def decode_config(data: bytes, what: str) -> ImageConfig:
    """Decode an image config; raises InvalidDocument."""
    return _decode(data, ImageConfig, what)


def layers_of(manifest: Manifest, config: ImageConfig, what: str) -> tuple[Layer, ...]:
    """Put the manifest's layers and the config's diff IDs together, bottom first.

    Raises UnsupportedImage when a layer is of a kind that does not unpack, and
    InvalidDocument when the config has another number of diff IDs.
    """
    for descriptor in manifest.layers:
        if descriptor.media_type not in LAYER_TYPES:
            raise UnsupportedImage(
                f"{what} is no image that can be unpacked: it has a layer of type"
                f" {descriptor.media_type[:_SHOWN]!r}",
                hint="it may be an artifact (a chart, a signature); name an image",
            )
    diff_ids = tuple((config.rootfs.diff_ids if config.rootfs else None) or ())
    if len(diff_ids) != len(manifest.layers):
        raise InvalidDocument(
            f"{what} has {len(manifest.layers)} layers, but its config names"
            f" {len(diff_ids)} diff IDs",
            hint="the image has to be pushed again",
        )
    chain = chain_ids(diff_ids)
    return tuple(
        Layer(
            descriptor=descriptor,
            diff_id=diff_ids[place],
            chain_id=chain[place],
            parent=chain[place - 1] if place else None,
        )
        for place, descriptor in enumerate(manifest.layers)
    )
