"""Documents: from containerd if it has them, else from the registry."""

from __future__ import annotations

import pytest

from serpentine.errors import NotFound, OutOfRange, Unavailable
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.pull.resolve import Documents

DATA = b"{}"
BLOB = Descriptor(media_type="application/json", digest=Digest.of(DATA), size=2)


class Content:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def read_all(self, digest: Digest, limit: int) -> bytes:
        raise self.error


@pytest.mark.parametrize("error", [NotFound("no"), OutOfRange("damaged")])
async def test_what_containerd_cannot_give_comes_from_the_registry(error):
    async def fetch(descriptor: Descriptor, kind: str) -> bytes:
        return DATA

    documents = Documents(Content(error), fetch)
    assert await documents.read(BLOB, "blobs") == DATA
    assert documents.fetched == 2


async def test_a_containerd_that_has_gone_may_have_it():
    async def fetch(descriptor: Descriptor, kind: str) -> bytes:
        raise AssertionError(f"{kind} {descriptor.digest} was asked for")

    with pytest.raises(Unavailable):
        await Documents(Content(Unavailable("gone")), fetch).read(BLOB, "blobs")
