"""What a containerd that was killed leaves in a snapshotter, and how we go on."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from serpentine.containerd import Containerd
from tests.conftest import CONTAINERDS
from tests.support.servers import ContainerdServer


@pytest.mark.parametrize("version", list(CONTAINERDS))
@pytest.mark.parametrize("make", ["prepare", "view"])
async def test_a_directory_that_was_made_and_not_noted_is_waited_for(version, make):
    """The collector of the next one takes it away, a moment after the start."""
    key = uuid.uuid4().hex
    with ContainerdServer(CONTAINERDS[version]) as server:
        async with Containerd(server.endpoint, namespace="crash") as client:
            snapshots = client.snapshots("overlayfs")
            (mount,) = await snapshots.prepare(f"{key}-a", labels={"containerd.io/gc.root": "1"})
            await snapshots.commit(key, f"{key}-a", labels={"containerd.io/gc.root": "1"})
        number = int(Path(mount.source).parent.name)
        left = Path(mount.source).parents[1] / str(number + 1)
        (left / "fs").mkdir(parents=True)
        (left / "fs" / "left").touch()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        async with Containerd(server.endpoint, namespace="crash") as client:
            snapshots = client.snapshots("overlayfs")
            parent = key if make == "view" else ""
            assert await getattr(snapshots, make)(f"{key}-b", parent)
            assert not (left / "fs" / "left").exists()
            assert (await snapshots.stat(key)).name == key
