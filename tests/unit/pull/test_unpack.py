"""One layer onto its parent, with a containerd that stands still when it has to undo."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from serpentine._concurrency import KeyedLock
from serpentine.errors import NoSpace, NotFound
from serpentine.model.digest import ChainID, DiffID, Digest
from serpentine.model.documents import Descriptor, Layer
from serpentine.model.reference import Reference
from serpentine.pull import unpack
from serpentine.pull.job import Job

LAYER = Layer(
    descriptor=Descriptor(media_type="x", digest=Digest.of(b"a"), size=1),
    diff_id=DiffID.parse(f"sha256:{'b' * 64}"),
    chain_id=ChainID.parse(f"sha256:{'c' * 64}"),
    parent=None,
)


class Containerd:
    """All of its services in one; ``broken`` fails, and then nothing can be removed."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.content = self.leases = self.diff = self
        self.namespace = "n"
        self.name = "overlayfs"

    @asynccontextmanager
    async def lock(self, *_, **__):
        yield

    async def add_resource(self, *_):
        pass

    async def stat(self, key):
        raise NotFound(key)

    async def prepare(self, *_, **__):
        if self.broken == "prepare":
            raise NoSpace("the disk is full")
        return []

    async def apply(self, *_, **__):
        if self.broken == "apply":
            raise NoSpace("the disk is full")
        return SimpleNamespace(digest=Digest.of(b""))

    async def remove(self, _key):
        await asyncio.sleep(3600)


@pytest.mark.parametrize("broken", ["prepare", "apply"])
async def test_what_cannot_be_removed_in_time_does_not_hide_the_error(monkeypatch, broken):
    monkeypatch.setattr(unpack, "CLEANUP_TIMEOUT", 0.05)
    made = Containerd(broken)
    job = Job(
        reference=Reference.parse("example.org/a/b:1"),
        repository=None,
        containerd=made,
        snapshots=made,
        lease="l",
        locks=KeyedLock(),
        on_event=lambda _event: None,
        sync_fs=True,
    )
    with pytest.raises(NoSpace):
        await unpack.unpack_layer(job, LAYER, 0)
