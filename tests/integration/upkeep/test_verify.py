"""Damage that is done to what real containerds hold, found and mended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from serpentine.containerd import Containerd
from serpentine.containerd.channel import Channel
from serpentine.containerd.content import ContentWriter
from serpentine.errors import NotFound
from serpentine.events import VerifyFound, VerifyProgress
from serpentine.upkeep import compare
from serpentine.upkeep.trees import own_directory
from tests.support.contents import NOTHING
from tests.support.fake_registry import FakeRegistry
from tests.support.images import (
    Entry,
    attestation,
    busybox_layer,
    file,
    folder,
    hardlink,
    image,
    index,
    layer,
    noise,
    opaque,
    push,
    symlink,
    whiteout,
)
from tests.support.trees import differences, snapshot_tree

# The middle layer is the one that is damaged; the one above names little of it.
LAYERS = [
    layer([folder("d", 0o750), file("d/old", "old"), folder("gone"), file("gone/a", "a")]),
    layer(
        [
            file("d/file", noise("file", 3_000), mode=0o4711, uid=3, gid=4),
            file("d/named", "named", xattrs={"user.mark": "1"}),
            hardlink("d/other", "d/named"),
            symlink("d/link", "file"),
            Entry("d/device", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o600),
            folder("empty", 0o1777, mtime=1_600_000_000),
            whiteout("d/old"),
            folder("gone"),
            opaque("gone"),
            file("gone/b", "b"),
            file("big", noise("big", 1_200_000)),
        ]
    ),
    layer([file("d/implied/x", "x"), file("top", "top")]),
]


@dataclass
class Place:
    """Where containerd has things on this machine."""

    containerd: object
    client: Containerd
    snapshotter: str = "overlayfs"

    def blob(self, digest: str) -> Path:
        blobs = "io.containerd.content.v1.content/blobs/sha256"
        return self.containerd.root / blobs / digest.partition(":")[2]

    async def directory(self, key: str) -> Path:
        snapshots = self.client.snapshots(self.snapshotter)
        mounts = await snapshots.view("look", key)
        with contextlib.suppress(NotFound):  # the collector may have it by now (trap 3)
            await snapshots.remove("look")
        return Path(own_directory(mounts))

    async def chain(self) -> list[str]:
        """Return the chain IDs, bottom first."""
        infos = await self.client.snapshots(self.snapshotter).all()
        found = [""]
        children = {info.parent: info.name for info in infos}
        while found[-1] in children:
            found.append(children[found[-1]])
        return found[1:]


@pytest.fixture
def place(containerd, engine):
    return Place(containerd, engine.containerd)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file and leave its times as they were, as a bad disk would."""
    status = path.lstat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def remove_xattr(path: Path, name: str) -> None:
    os.removexattr(path, name)


def break_link(path: Path) -> None:
    data, status = path.read_bytes(), path.lstat()
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    path.unlink()
    path.write_bytes(data)
    path.chmod(stat.S_IMODE(status.st_mode))
    for name, value in attributes.items():
        os.setxattr(path, name, value)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def retarget(path: Path) -> None:
    status = path.lstat()
    path.unlink()
    path.symlink_to("elsewhere")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def add(path: Path) -> None:
    (path / "added").mkdir()
    (path / "added/file").write_text("x")


# What is done to the tree of the middle layer: how, and what must be said of which path.
TREE = {
    "emptied": (lambda d: (d / "d/file").write_bytes(b""), {"d/file": {"size", "mode", "time"}}),
    "mode": (lambda d: (d / "d/named").chmod(0o600), {"d/named": {"mode"}, "d/other": {"mode"}}),
    "mode of a directory": (lambda d: (d / "empty").chmod(0o700), {"empty": {"mode"}}),
    "removed": (lambda d: (d / "big").unlink(), {"big": {"missing"}}),
    "directory removed": (lambda d: (d / "empty").rmdir(), {"empty": {"missing"}}),
    "content": (lambda d: rewrite(d / "big", flip), {"big": {"content"}}),
    "owner": (lambda d: os.chown(d / "d/device", 1, 1), {"d/device": {"owner"}}),
    "added": (add, {"added": {"added"}}),
    "target": (lambda d: retarget(d / "d/link"), {"d/link": {"target"}}),
    "kind": (
        lambda d: ((d / "big").unlink(), (d / "big").mkdir()),
        {"big": {"kind", "size"}},
    ),
    "a whiteout": (lambda d: (d / "d/old").unlink(), {"d/old": {"missing"}}),
    "all": (lambda d: [shutil.rmtree(d / name) for name in ("d", "gone")], {"d": {"missing"}}),
}
# What containerd's own comparison does not see.
UNSEEN = {
    "attribute": (
        lambda d: remove_xattr(d / "d/named", "user.mark"),
        {"d/named": {"attributes"}, "d/other": {"attributes"}},
    ),
    "hard link": (lambda d: break_link(d / "d/other"), {"d/other": {"links"}}),
    "opaque": (
        lambda d: remove_xattr(d / "gone", "trusted.overlay.opaque"),
        {"gone": {"attributes"}},
    ),
    "time of a directory": (lambda d: os.utime(d / "empty"), {"empty": {"time"}}),
}


@pytest.mark.parametrize("damage", [*TREE, *UNSEEN])
async def test_a_damaged_tree(engine, place, registry, namespace, containerd, contents, damage):
    """Done when 7."""
    reference = push(registry, "upkeep/tree", "1", image(LAYERS))
    state = await engine.pull_image(reference)
    client = engine.containerd
    before = await contents()
    fresh = await snapshot_tree(client, "overlayfs", state.snapshot_key)
    assert (await engine.verify()).findings == ()
    act, expected = {**TREE, **UNSEEN}[damage]
    middle = (await place.chain())[1]
    act(await place.directory(middle))

    found = await engine.verify([reference])
    assert not found.is_whole
    (finding,) = found.findings
    assert (finding.kind, finding.name, finding.repaired) == ("tree", middle, False)
    told = {one.path: set(one.what) for one in finding.differences}
    for path, what in expected.items():
        assert told[path] <= what
        assert told[path]
    if damage != "all":
        assert set(told) == set(expected)
    assert finding.count == len(finding.differences)

    mended = await engine.verify([reference], repair=True)
    assert mended.is_whole
    assert [(one.name, one.repaired) for one in mended.findings] == [(middle, True)]
    assert (await engine.verify([reference])).findings == ()
    assert await contents() == before
    after = await snapshot_tree(client, "overlayfs", state.snapshot_key)
    assert differences(after, fresh) == []
    # As somebody else has it who pulled it now.
    async with containerd.connect(namespace=f"{namespace}-b") as other:
        await other.pull_image(reference)
        theirs = await snapshot_tree(other.containerd, "overlayfs", state.snapshot_key)
        await other.remove_image(reference)
    assert differences(after, theirs) == []


@pytest.mark.parametrize("damage", TREE)
async def test_where_only_containerd_can_compare(
    engine, place, registry, contents, monkeypatch, damage
):
    """As on a machine that is not ours: what a step may find is found and mended."""

    async def no_look(*_: object) -> None:
        return None

    monkeypatch.setattr(compare, "compare_here", no_look)
    reference = push(registry, "upkeep/there", "1", image(LAYERS))
    state = await engine.pull_image(reference)
    before = await contents()
    fresh = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert (await engine.verify()).findings == ()
    act, expected = TREE[damage]
    middle = (await place.chain())[1]
    act(await place.directory(middle))
    found = await engine.verify()
    (finding,) = found.findings
    told = {one.path: set(one.what) for one in finding.differences}
    assert set(expected) <= set(told)
    for path, what in expected.items():
        assert told[path] & what
    mended = await engine.verify(repair=True)
    assert [(one.name, one.repaired) for one in mended.findings] == [(middle, True)], mended
    assert await contents() == before
    after = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert differences(after, fresh) == []


async def test_what_containerd_does_not_see(engine, place, registry, monkeypatch):
    """Its blind spots, as they are told in the documentation."""

    async def no_look(*_: object) -> None:
        return None

    await engine.pull_image(push(registry, "upkeep/unseen", "1", image(LAYERS)))
    directory = await place.directory((await place.chain())[1])
    for act, _ in UNSEEN.values():
        act(directory)
    (finding,) = (await engine.verify()).findings
    assert finding.count == 4
    monkeypatch.setattr(compare, "compare_here", no_look)
    assert (await engine.verify()).findings == ()


BLOB = {
    "altered": (lambda path: rewrite(path, flip), "another digest"),
    "truncated": (lambda path: rewrite(path, lambda data: data[:100]), "100 bytes are left of"),
    "emptied": (lambda path: path.write_bytes(b""), "0 bytes are left"),
    "its file removed": (lambda path: path.unlink(), "cannot be read"),
}


@pytest.mark.parametrize("damage", BLOB)
@pytest.mark.parametrize("which", ["index", "manifest", "config", "layer"])
async def test_a_damaged_blob(engine, place, registry, contents, which, damage):
    made = image(LAYERS)
    config = next(d for d, b in made.blobs.items() if b.startswith(b"{"))
    whole = index([(made, made.descriptor("linux/amd64"))])
    digest = {
        "index": whole.digest,
        "manifest": made.digest,
        "config": config,
        "layer": LAYERS[1].digest,
    }[which]
    reference = push(registry, "upkeep/blob", "1", whole)
    state = await engine.pull_image(reference)
    before = await contents()
    labels = {b.digest: b.labels for b in await engine.containerd.content.all()}
    act, problem = BLOB[damage]
    path = place.blob(digest)
    path.chmod(0o600)
    act(path)
    found = await engine.verify()
    (finding,) = found.findings
    assert (finding.kind, finding.name, finding.repaired) == ("blob", digest, False)
    assert problem in finding.problem
    if which == "layer":
        assert any("is damaged" in line for line in found.unchecked)
    mended = await engine.verify(repair=True)
    assert [(one.name, one.repaired) for one in mended.findings] == [(digest, True)], mended
    assert mended.trees == 3
    whole_now = await engine.verify()
    assert (whole_now.findings, whole_now.unchecked) == ((), ())
    assert await contents() == before
    assert {b.digest: b.labels for b in await engine.containerd.content.all()} == labels
    assert await engine.inspect(reference) == state
    await engine.remove_image(reference)
    assert await contents() == NOTHING


async def test_what_is_whole(engine, registry, contents, command):
    """Each form of image, and nothing is told twice, fetched, or left."""
    parts = [
        image(LAYERS),
        image([busybox_layer(compression="zstd"), layer([])], platform="linux/arm64"),
        image([layer([file("a", "1")], compression="none", docker=True)], docker=True),
        image([]),
    ]
    proof, entry = attestation(parts[0])
    both = index(
        [(parts[0], parts[0].descriptor("linux/amd64")), (proof, entry),
         (parts[1], parts[1].descriptor("linux/arm64"))]
    )  # fmt: skip
    names = []
    for number, made in enumerate([both, parts[2], parts[3], parts[0]]):
        names.append(push(registry, "upkeep/whole", str(number), made))
        await engine.pull_image(names[-1])
    await engine.pull_image(names[0], platform="linux/arm64")
    before, asked = await contents(), len(registry.fetches())
    done = command("verify", "--all", "--repair", "--json", "-q")
    assert (done.status, done.err) == (0, "")
    assert done.json["findings"] == done.json["unchecked"] == []
    assert done.json["images"] == names
    assert (done.json["blobs"], done.json["trees"]) == (len(before.blobs), 6)
    assert done.json["size"] == (await engine.usage()).blobs.size
    assert await contents() == before
    assert len(registry.fetches()) == asked
    out = command("verify", names[1], "-q").out
    assert re.fullmatch(r"1 images: 3 blobs \(.*\) and 1 file trees checked, 0 damaged\n", out)


async def test_the_command(engine, place, registry, command):
    reference = push(registry, "upkeep/command", "1", image(LAYERS))
    await engine.pull_image(reference)
    middle = (await place.chain())[1]
    (await place.directory(middle) / "big").unlink()
    done = command("verify", reference)
    assert done.status == 1
    assert f"damaged: {reference}: tree {middle}" in done.out
    assert "  big: missing\n" in done.out
    assert "1 damaged\n" in done.out
    assert "--repair" in done.err
    done = command("verify", "--all", "--repair", "--progress", "json", "--json")
    assert done.status == 0
    assert done.json["is_whole"]
    assert done.json["findings"][0]["repaired"]
    assert '"verify_found"' in done.err
    assert '"what": "repair"' in done.err
    assert command("verify", reference, "-q").status == 0
    for bad in (["verify"], ["verify", reference, "--all"]):
        assert command(*bad).status == 2
    done = command("verify", "no.such/image:1")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("serpentine: there is no image")


async def test_only_the_damaged_layer_is_told(engine, place, registry):
    """Also when what is above inherits from it, and it stays as it is."""
    await engine.pull_image(push(registry, "upkeep/above", "1", image(LAYERS)))
    bottom, middle, _ = await place.chain()
    (await place.directory(bottom) / "d").chmod(0o500)
    found = await engine.verify()
    assert [one.name for one in found.findings] == [bottom]
    assert found.trees == 3
    (await place.directory(middle) / "big").unlink()
    found = await engine.verify()
    assert [one.name for one in found.findings] == [bottom, middle]
    mended = await engine.verify(repair=True)
    assert [(one.name, one.repaired) for one in mended.findings] == [(bottom, True), (middle, True)]


async def test_a_blob_that_was_never_here(engine, place, registry, contents):
    """The snapshot was there already: the layer was not downloaded."""
    base = push(registry, "upkeep/never", "base", image(LAYERS[:2]))
    reference = push(registry, "upkeep/never", "top", image(LAYERS))
    await engine.pull_image(base)
    await engine.pull_image(reference)
    await engine.remove_image(base)
    content = engine.containerd.content
    for one in await content.all():
        if str(one.digest) == LAYERS[1].digest:
            await content.delete(one.digest)
    middle = (await place.chain())[1]
    (await place.directory(middle) / "big").unlink()
    found = await engine.verify()
    assert found.is_whole
    (line,) = found.unchecked
    assert f"the tree of {middle} cannot be checked: blob {LAYERS[1].digest} is not here" in line
    mended = await engine.verify(repair=True)
    assert [(one.name, one.repaired) for one in mended.findings] == [(middle, True)]
    assert mended.unchecked == ()


async def test_a_snapshot_that_is_gone(engine, place, registry, contents):
    reference = push(registry, "upkeep/gone", "1", image(LAYERS))
    state = await engine.pull_image(reference)
    before = await contents()
    await engine.containerd.snapshots("overlayfs").remove(state.snapshot_key)
    found = await engine.verify()
    # The collector may have taken those below by now, which nothing held any more.
    assert found.findings[-1].name == state.snapshot_key
    assert all(one.problem.endswith("is not there") for one in found.findings)
    assert (await engine.verify(repair=True)).is_whole
    assert await contents() == before


async def test_a_registry_that_is_gone(containerd, namespace, engine, place, contents):
    """Nothing is thrown away that cannot be had again."""
    async with containerd.connect(namespace=namespace) as other:
        with FakeRegistry() as registry:
            reference = registry.add("upkeep/gone", "1", image(LAYERS))
            await other.pull_image(reference)
    before = await contents()
    place.blob(LAYERS[0].digest).chmod(0o600)
    rewrite(place.blob(LAYERS[0].digest), flip)
    found = await engine.verify(repair=True)
    (finding,) = found.findings
    assert not finding.repaired
    assert reference.partition("/")[0] in finding.reason
    assert await contents() == before


async def test_a_container_that_runs_keeps_its_tree(engine, place, registry, command):
    layers = [busybox_layer(), layer([file("data", "data")])]
    reference = push(registry, "upkeep/used", "1", image(layers))
    state = await engine.pull_image(reference)
    bottom = (await place.chain())[0]
    damaged = await place.directory(bottom) / "etc/passwd"

    async def damage(step) -> None:
        damaged.write_text("")
        found = await engine.verify(repair=True)
        (finding,) = found.findings
        assert not found.is_whole
        assert f"container {step.id} runs on it" in finding.reason
        assert damaged.read_text() == ""
        done = await asyncio.to_thread(command, "verify", "--all", "--repair", "-q")
        assert done.status == 1
        assert f"not repaired: in use: container {step.id}" in done.out
        await step.kill(9)

    await engine.run(state, ["sleep", "100"], use=damage, network="none", commit=False)
    assert (await engine.verify(repair=True)).is_whole
    assert damaged.read_text().startswith("root:")


async def test_the_native_snapshotter(containerd, namespace, registry, contents):
    reference = push(registry, "upkeep/native", "1", image(LAYERS))
    async with containerd.connect(namespace=namespace, snapshotter="native") as engine:
        state = await engine.pull_image(reference)
        before = await contents("native")
        assert (await engine.verify()).findings == ()
        place = Place(containerd, engine.containerd, "native")
        (await place.directory(state.snapshot_key) / "d/file").write_bytes(b"")
        found = await engine.verify()
        assert [one.name for one in found.findings] == [state.snapshot_key]
        assert (await engine.verify(repair=True)).is_whole
        assert (await engine.verify()).findings == ()
        assert await contents("native") == before
        await engine.remove_image(reference)
    assert await contents("native") == NOTHING


async def test_the_events(engine, place, registry):
    await engine.pull_image(push(registry, "upkeep/events", "1", image(LAYERS)))
    middle = (await place.chain())[1]
    (await place.directory(middle) / "big").unlink()
    events = []
    await engine.verify(repair=True, on_event=events.append)
    blobs = {e.digest for e in events if isinstance(e, VerifyProgress) and e.what == "blob"}
    assert len(blobs) == 5
    assert [e.digest for e in events if getattr(e, "what", "") == "repair"] == [middle]
    assert [(e.digest, e.repaired) for e in events if isinstance(e, VerifyFound)] == [
        (middle, True)
    ]
    trees = [e for e in events if isinstance(e, VerifyProgress) and e.what == "tree"]
    assert [e.offset == e.size for e in trees] == [False, True] * 3


@pytest.mark.timeout(300)
async def test_cancelled_at_every_call(engine, place, registry, contents, monkeypatch):
    """It leaves nothing, and a repair that was cut off is done by the next."""
    await engine.pull_image(push(registry, "upkeep/cancel", "1", image(LAYERS[:2])))
    middle = (await place.chain())[1]
    damaged = await place.directory(middle) / "d/file"
    before = await contents()
    number = 0
    tasks: list[asyncio.Task] = []
    while True:
        number += 1
        damaged.write_bytes(b"")
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in ((Channel, "unary"), (ContentWriter, "_send")):
                original = getattr(owner, name)

                def counted(*arguments, original=original, number=number, **more):
                    nonlocal calls
                    calls += 1
                    if calls == number:
                        tasks[-1].cancel()
                    return original(*arguments, **more)

                patch.setattr(owner, name, counted)
            tasks.append(task := asyncio.create_task(engine.verify(repair=True)))
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert await contents() == before, f"after call {number}"
        if not task.cancelled():
            break
    assert number > 25
    assert task.result().is_whole
    assert damaged.stat().st_size == 3000
