"""Counting, pruning, verifying and repairing on every way to reach a containerd, also from afar."""

from __future__ import annotations

from datetime import timedelta

import pytest

from serpentine.containerd import Mount
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.upkeep.trees import own_directory
from tests.support.contents import NOTHING
from tests.support.images import (
    file,
    folder,
    hardlink,
    image,
    layer,
    make_tar,
    noise,
    opaque,
    push,
    whiteout,
)
from tests.support.trees import differences, snapshot_tree

LAYERS = [
    layer([folder("d"), file("d/old", "old"), folder("gone"), file("gone/a", "a")]),
    layer(
        [
            file("d/emptied", noise("everywhere", 100_000), xattrs={"user.mark": "1"}),
            file("d/mode", "mode"),
            hardlink("d/other", "d/mode"),
            file("d/removed", "removed"),
            whiteout("d/old"),
            folder("gone"),
            opaque("gone"),
        ]
    ),
    layer([file("top", "top")]),
]
DAMAGE = [
    file("d/emptied", b"", mode=0o600),
    file("d/mode", "mode", mode=0o600),
    whiteout("d/removed"),
    whiteout("d/old"),
    file("d/added", "added"),
]


async def unpack_onto(client, key: str, tar: bytes) -> None:
    """Let containerd do the damage, wherever it has its directories."""
    snapshots = client.snapshots("overlayfs")
    await client.leases.create("damage", expires=timedelta(minutes=1))
    mounts = await snapshots.view("damage", key, lease="damage")
    digest = Digest.of(tar)
    await client.content.write_blob(tar, digest, ref="damage", labels={}, lease="damage")
    blob = Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar", digest=digest, size=len(tar)
    )
    there = Mount("bind", own_directory(mounts), options=("rbind", "rw"))
    await client.diff.apply(blob, [there])
    await snapshots.remove("damage")
    await client.leases.delete("damage", sync=True)


@pytest.mark.timeout(300)
async def test_from_pull_to_prune(containerd, engine, registry, contents):
    reference = push(registry, "upkeep/everywhere", "1", image(LAYERS))
    state = await engine.pull_image(reference)
    client = engine.containerd
    before = await contents()
    fresh = await snapshot_tree(client, "overlayfs", state.snapshot_key, containerd.here)
    found = await engine.verify()
    assert (found.findings, found.unchecked, found.trees) == ((), (), 3)

    snapshots = await client.snapshots("overlayfs").all()
    bottom = next(info.name for info in snapshots if not info.parent)
    middle = next(info.name for info in snapshots if info.parent == bottom)
    await unpack_onto(client, middle, make_tar(DAMAGE))
    (finding,) = (await engine.verify()).findings
    assert finding.name == middle
    told = {one.path: set(one.what) for one in finding.differences}
    assert {"size", "mode"} <= told["d/emptied"]
    assert told["d/removed"] == told["d/old"] == {"missing"}
    assert told["d/added"] == {"added"}
    assert "d/mode" in told

    mended = await engine.verify(repair=True)
    assert [(one.name, one.repaired) for one in mended.findings] == [(middle, True)], mended
    assert (await engine.verify()).findings == ()
    assert await contents() == before
    after = await snapshot_tree(client, "overlayfs", state.snapshot_key, containerd.here)
    assert differences(after, fresh) == []

    usage = await engine.usage()
    assert (usage.snapshots.count, usage.prunable) == (3, 0)
    assert (await engine.prune()).removed == ()
    assert (await engine.prune(unused=True)).freed == usage.total
    assert await contents() == NOTHING
