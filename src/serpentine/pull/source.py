"""What a pull gets an image from where the registry's client may not be needed.

The reference is pinned, or only what is here counts, or one look shows that its tag has not moved.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from serpentine.containerd import Containerd, Snapshots
from serpentine.errors import NotFound, PlatformNotFound
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.pull.resolve import Documents, find_image

if TYPE_CHECKING:
    from serpentine.registry import BlobStream, Repository, Resolved

__all__ = ["LookedAt", "Pinned", "descriptor_of", "root_here", "what_is_missing"]

_SHOWN = 3


def descriptor_of(digest: Digest) -> Descriptor:
    """Return the descriptor of a document of which no more is known than its digest."""
    return Descriptor(digest=digest, size=-1)


class _Resolved(msgspec.Struct, frozen=True):
    """As the registry's client returns it, without importing that."""

    descriptor: Descriptor
    body: None = None


class Pinned:
    """Takes the place of a repository, for a reference whose meaning is settled.

    root: what it means; None if not even that is known.
    registry: opens the repository, once something of the image is not here; None if no registry
        may be asked.  Then that is NotFound.
    """

    def __init__(
        self,
        reference: Reference,
        root: Descriptor | None,
        registry: Callable[[], Repository] | None,
    ) -> None:
        self.reference = reference
        self._root = root
        self._open = registry
        self._opened: Repository | None = None

    @property
    def requests(self) -> int:
        """How many requests it took."""
        return self._opened.requests if self._opened is not None else 0

    async def resolve(self) -> _Resolved | Resolved:
        """Return what the reference means."""
        if self._root is None:
            raise self._refusal(str(self.reference))
        return _Resolved(self._root)

    async def fetch_document(self, descriptor: Descriptor, kind: str) -> bytes:
        """Return a document that is not here."""
        return await self._repository(descriptor).fetch_document(descriptor, kind)

    @asynccontextmanager
    async def open_blob(self, descriptor: Descriptor, **how: Any) -> AsyncIterator[BlobStream]:
        """Open a layer that is not here; all else as for ``Repository.open_blob``."""
        repository = self._repository(descriptor)
        async with repository.open_blob(descriptor, **how) as body:
            yield body

    def __getattr__(self, name: str) -> Any:
        # What else a repository has is of use only once one was opened.
        if name.startswith("_") or self._opened is None:
            raise AttributeError(name)
        return getattr(self._opened, name)

    def _repository(self, descriptor: Descriptor) -> Repository:
        return self._client(f"{descriptor.digest} of {self.reference}")

    def _client(self, what: str = "") -> Repository:
        if self._opened is None:
            if self._open is None:
                raise self._refusal(what)
            self._opened = self._open()
        return self._opened

    def _refusal(self, what: str) -> NotFound:
        return NotFound(
            f"{what} is not here; no registry is asked",
            hint=f"when one may be: serpentine pull {self.reference}",
        )


class LookedAt(Pinned):
    """Takes the place of a repository, for a reference that most likely means what it did.

    look: asks the registry what it means, and returns None where that takes its client.
    """

    def __init__(
        self,
        reference: Reference,
        look: Callable[[], Awaitable[Descriptor | None]],
        registry: Callable[[], Repository],
    ) -> None:
        super().__init__(reference, None, registry)
        self._look = look
        self._looks = 0

    @property
    def requests(self) -> int:
        """How many requests it took."""
        return self._looks + super().requests

    async def resolve(self) -> _Resolved | Resolved:
        """Return what the reference means now."""
        found = await self._look()
        if found is None:
            return await self._client().resolve()
        self._looks += 1
        return _Resolved(found)


async def root_here(containerd: Containerd, reference: Reference) -> Descriptor:
    """Return what the reference means here; raises NotFound."""
    if reference.digest is not None:
        return descriptor_of(reference.digest)
    return (await containerd.images.get(str(reference))).target


async def what_is_missing(
    containerd: Containerd,
    snapshots: Snapshots,
    reference: Reference,
    root: Descriptor | None,
    platform: Platform,
) -> str:
    """Say what is not here of an image that shall be unpacked; empty if all that it takes is.

    root: what the reference means; None: what it means here.
    """
    name = str(reference)
    try:
        root = root or await root_here(containerd, reference)
    except NotFound:
        return f"there is no image {name} in namespace {containerd.namespace}"
    documents = Documents(containerd.content, None)
    try:
        image = await find_image(documents, root, platform, name)
    except NotFound:
        return (
            f"there is no image {name} for {platform.normalized()}"
            f" in namespace {containerd.namespace}"
        )
    except PlatformNotFound as error:
        return str(error)
    missing: dict[Digest, int] = {}
    for layer in reversed(image.layers):
        try:
            await snapshots.stat(str(layer.chain_id))
            break  # the ones below are there as long as it is
        except NotFound:
            pass
        try:
            await containerd.content.info(layer.descriptor.digest)
        except NotFound:
            missing[layer.descriptor.digest] = layer.descriptor.size
    if not missing:
        return ""
    names = [str(digest) for digest in reversed(missing)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"of {name}, {len(names)} of {len(image.layers)} layers ({sum(missing.values())} bytes)"
        f" are not in namespace {containerd.namespace}: {', '.join(names[:_SHOWN])}{more}"
    )
