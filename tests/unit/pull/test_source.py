"""What stands in for the registry's client: a look that is enough, and one that is not."""

from __future__ import annotations

import pytest

from serpentine.model.digest import Digest
from serpentine.model.reference import Reference
from serpentine.pull.source import LookedAt, descriptor_of

FOUND = descriptor_of(Digest.of(b"found"))
REFERENCE = Reference.parse("127.0.0.1:5000/a:1")


class Client:
    """A repository of the registry's client."""

    requests = 3
    throttle = "its throttle"

    async def resolve(self):
        return "resolved"

    async def fetch_document(self, descriptor, kind):
        return b"fetched"


def looked_at(found):
    opened = []

    def registry():
        opened.append(1)
        return Client()

    async def look():
        return found

    return LookedAt(REFERENCE, look, registry), opened


async def test_a_look_that_tells_is_one_request_and_no_client():
    repository, opened = looked_at(FOUND)
    assert repository.requests == 0
    assert (await repository.resolve()).descriptor == FOUND
    assert (repository.requests, opened) == (1, [])


async def test_what_is_not_here_comes_from_the_client():
    repository, opened = looked_at(FOUND)
    await repository.resolve()
    with pytest.raises(AttributeError):
        _ = repository.throttle
    assert await repository.fetch_document(FOUND, "blobs") == b"fetched"
    assert (repository.requests, repository.throttle, opened) == (4, "its throttle", [1])


async def test_a_look_that_does_not_tell_is_asked_again_by_the_client():
    repository, opened = looked_at(None)
    assert await repository.resolve() == "resolved"
    assert (repository.requests, opened) == (3, [1])
