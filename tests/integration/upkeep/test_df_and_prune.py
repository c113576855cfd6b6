"""Counting and pruning what real containerds hold, also beside pulls."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta

import pytest

from serpentine._session import current_session
from serpentine.cli._format import size
from serpentine.containerd.channel import Channel
from serpentine.containerd.content import MESSAGE_SIZE, ContentWriter
from serpentine.containerd.images import Images
from serpentine.errors import NotFound
from serpentine.model.digest import Digest
from serpentine.pull.leases import LABEL_PULL, LABEL_SESSION
from tests.support.contents import NOTHING
from tests.support.fake_registry import FakeRegistry
from tests.support.images import busybox_layer, file, image, index, layer, noise, push

BASE = layer([file("base", noise("upkeep base", 300_000))])


def made(name: str, size: int = 50_000):
    return image([BASE, layer([file(name, noise(name, size))])], config={"Cmd": [name]})


@pytest.fixture(scope="module")
def dead_session():
    """The session of a process that was there and is gone."""
    code = "from serpentine._session import current_session; print(current_session())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


async def left_by(engine, session: str, name: str) -> str:
    """Leave what a pull leaves: a lease with a partial blob and a snapshot."""
    client = engine.containerd
    labels = {LABEL_PULL: "x", LABEL_SESSION: session}
    await client.leases.create(name, expires=timedelta(hours=1), labels=labels)
    async with client.content.writer(f"layer-{name}", total=500_000, lease=name) as writer:
        await writer.write(bytes(MESSAGE_SIZE))
        await writer._settle()
    await client.snapshots("overlayfs").prepare(f"extract-{name}", lease=name)
    return name


def added(before, after):
    return {
        field: sorted({*getattr(after, field)} - {*getattr(before, field)})
        for field in ("images", "blobs", "ingests", "snapshots", "leases")
    }


async def test_df_counts_what_is_there(engine, registry, contents, command):
    a = push(registry, "upkeep/a", "1", made("a"))
    b = push(registry, "upkeep/b", "1", made("b", 80_000))
    await engine.pull_image(a)
    await engine.pull_image(b)
    now = await contents()
    usage = await engine.usage()
    client = engine.containerd
    blobs = {str(blob.digest): blob.size for blob in await client.content.all()}
    snapshots = client.snapshots("overlayfs")
    sizes = {key: (await snapshots.usage(key)).size for key in now.snapshots}
    assert (usage.blobs.count, usage.blobs.size) == (len(now.blobs), sum(blobs.values()))
    assert (usage.snapshots.count, usage.snapshots.size) == (3, sum(sizes.values()))
    assert (usage.ingests.count, usage.leases) == (0, 0)
    base = next(s.name for s in await snapshots.all() if not s.parent)
    assert usage.shared == blobs[BASE.digest] + sizes[base]
    assert [(i.name, i.shared) for i in usage.images] == [(a, usage.shared), (b, usage.shared)]
    assert usage.total == sum(i.size for i in usage.images) - usage.shared
    assert (usage.prunable, usage.prunable_all) == (0, usage.total)
    done = command("df", "--json")
    assert done.json["images"][1]["name"] == b
    assert done.json["total"] == usage.total
    done = command("df", "-v")
    assert done.status == 0
    assert a in done.out
    assert "frees 0 B, with --all" in done.out


async def test_df_asks_once_per_object(engine, registry, monkeypatch):
    """No file is read, and twice as much takes twice as many questions, not four times."""
    calls = []
    unary = Channel.unary

    def counted(self, method, *arguments, **more):
        calls.append(method)
        return unary(self, method, *arguments, **more)

    for count in (1, 2):
        layers = [layer([file(f"f{n}", f"{count}")]) for n in range(10)]
        await engine.pull_image(push(registry, "upkeep/many", str(count), image(layers)))
    monkeypatch.setattr(Channel, "unary", counted)
    usage = await engine.usage()
    assert usage.snapshots.count == 20
    assert len([m for m in calls if m.endswith("/Usage")]) == 20
    assert len(calls) < 30


async def test_prune_takes_what_clients_left_that_are_gone(
    engine, registry, contents, command, dead_session
):
    await engine.pull_image(push(registry, "upkeep/kept", "1", made("kept")))
    before = await contents()
    await left_by(engine, dead_session, "gone")
    await left_by(engine, current_session(), "here")
    await left_by(engine, "", "elsewhere")
    async with engine.containerd.content.writer("loose", total=MESSAGE_SIZE + 1) as writer:
        await writer.write(bytes(MESSAGE_SIZE))
        await writer._settle()
    full = await contents()
    usage = await engine.usage()
    assert usage.ingests.count == 4
    assert command("prune", "--older-than", "1h").out.startswith("0 B freed")
    assert await contents() == full
    would = command("prune", "--dry-run", "--json")
    assert await contents() == full
    removed = {(one["kind"], one["name"]) for one in would.json["removed"]}
    assert removed == {("lease", "gone"), ("partial", "loose")}
    assert would.json["freed"] == usage.prunable
    done = command("prune", "--json")
    assert done.json == {**would.json, "dry_run": False}
    assert added(before, await contents()) == {
        "images": [],
        "blobs": [],
        "ingests": ["layer-elsewhere", "layer-here"],
        "snapshots": ["extract-elsewhere", "extract-here"],
        "leases": ["elsewhere", "here"],
    }
    assert (await engine.usage()).total == would.json["left"]
    again = command("prune").out
    assert again == f"0 B freed (0 blobs, 0 snapshots); {size(would.json['left'])} left\n"


async def test_an_ingest_that_somebody_writes_stays(engine, contents):
    """Also one without a lease, of a client that knows of none."""
    async with engine.containerd.content.writer("theirs", total=9) as writer:
        await writer.write(b"12345")
        result = await engine.prune()
        assert result.skipped == ("partial theirs",)
        assert (await contents()).ingests == ["theirs"]
        await writer.write(b"6789")
        await writer.commit({"containerd.io/gc.root": "x"}, expected=Digest.of(b"123456789"))
    await engine.containerd.content.delete(Digest.of(b"123456789"))


async def test_prune_all_by_age_and_size(engine, registry, contents, command):
    references = []
    for name in "abc":
        references.append(push(registry, "upkeep/oldest", name, made(name)))
        await engine.pull_image(references[-1])
    full = await contents()
    assert command("prune", "--older-than", "1h", "--all").out.startswith("0 B freed")
    assert command("prune").out.startswith("0 B freed")
    usage = await engine.usage()
    keep = usage.total - 1
    would = command("prune", "--all", "--keep-size", str(keep), "--dry-run", "--json").json
    assert [(one["kind"], one["name"]) for one in would["removed"]] == [("image", references[0])]
    assert await contents() == full
    done = command("prune", "--all", "--keep-size", str(keep), "--json").json
    assert done == {**would, "dry_run": False}
    assert done["freed"] == usage.images[0].size - usage.images[0].shared
    assert [image.name for image in await engine.images()] == references[1:]
    left = await engine.usage()
    assert left.total == usage.total - done["freed"] == done["left"]
    done = command("prune", "--all")
    assert done.status == 0
    assert all(reference in done.out for reference in references[1:])
    assert await contents() == NOTHING


async def test_what_does_not_fit_is_told(engine, registry, command):
    await engine.pull_image(push(registry, "upkeep/fit", "1", made("fit")))
    done = command("prune", "--keep-size", "1kB")
    assert done.status == 0
    assert "the rest is in use; --all takes unused images, too" in done.err


async def test_images_and_states_of_containers_stay(engine, registry, contents):
    used = push(registry, "upkeep/used", "1", image([busybox_layer()]))
    await engine.pull_image(push(registry, "upkeep/unused", "1", made("unused")))
    state = await engine.pull_image(used)
    client = engine.containerd
    snapshots = client.snapshots("overlayfs")
    now = {"containerd.io/gc.root": "x"}
    for key in ("state-1", "state-2"):
        await snapshots.prepare("a", state.snapshot_key, labels=now)
        await snapshots.commit(key, "a", labels=now)
    await snapshots.prepare("b", "state-1")
    await client.containers.create("c", b"{}", snapshotter="overlayfs", snapshot_key="b")
    assert (await engine.prune()).removed == ()
    result = await engine.prune(unused=True)
    unused = f"{registry.address}/upkeep/unused:1"
    assert {one.name for one in result.removed} == {unused, "state-2"}
    after = await contents()
    assert after.images == [used]
    assert after.snapshots == sorted([state.snapshot_key, "state-1", "b"])
    await client.containers.delete("c")
    await engine.prune(unused=True)
    assert await contents() == NOTHING


async def test_a_killed_step_is_ended(engine, registry, contents, dead_session):
    """As the next step would have ended it."""
    state = await engine.pull_image(push(registry, "upkeep/step", "1", image([busybox_layer()])))
    client = engine.containerd
    labels = {"io.serpentine/step": "step-1", LABEL_SESSION: dead_session}
    before = await contents()
    await client.leases.create("step-1", expires=timedelta(hours=1), labels=labels)
    key = state.snapshot_key
    await client.snapshots("overlayfs").prepare("step-1", key, labels=labels, lease="step-1")
    await client.containers.create(
        "step-1", b"{}", snapshotter="overlayfs", snapshot_key="step-1", labels=labels
    )
    result = await engine.prune()
    assert [(str(one.kind), one.name) for one in result.removed] == [("step", "step-1")]
    assert await client.containers.all() == []
    assert await contents() == before


async def test_an_image_that_was_pulled_anew_meanwhile_stays(engine, registry, monkeypatch):
    """What prune saw is old by the time that it removes: it looks once more."""
    reference = push(registry, "upkeep/anew", "1", made("old"))
    await engine.pull_image(reference)
    get = Images.get

    async def moved(self, name):
        monkeypatch.undo()
        await asyncio.to_thread(push, registry, "upkeep/anew", "1", made("new"))
        await engine.pull_image(reference)
        return await get(self, name)

    monkeypatch.setattr(Images, "get", moved)
    result = await engine.prune(unused=True)
    assert result.skipped == (f"image {reference}",)
    assert (await engine.inspect(reference)).cmd == ("new",)


async def test_containerd_looks_once_more(containerd, engine, registry, monkeypatch):
    """Between our look and the removal, too, where it is not too old for that."""
    reference = push(registry, "upkeep/looks", "1", made("first"))
    await engine.pull_image(reference)
    delete = Images.delete

    async def moved(self, name, **more):
        monkeypatch.undo()
        await asyncio.to_thread(push, registry, "upkeep/looks", "1", made("second"))
        await engine.pull_image(reference)
        await delete(self, name, **more)

    monkeypatch.setattr(Images, "delete", moved)
    result = await engine.prune(unused=True)
    if containerd.version.startswith("1."):
        assert result.skipped == ()
        return
    assert result.skipped == (f"image {reference}",)
    assert (await engine.inspect(reference)).cmd == ("second",)


async def test_a_record_that_goes_while_it_is_written(engine, registry, monkeypatch):
    """The window that a pull had: it found the record, and then it was gone."""
    reference = push(registry, "upkeep/goes", "1", made("goes"))
    await engine.pull_image(reference)
    update = Images.update

    async def removed(self, record, fields):
        monkeypatch.undo()
        await engine.prune(unused=True)
        with pytest.raises(NotFound):
            await self.get(record.name)
        return await update(self, record, fields)

    push(registry, "upkeep/goes", "1", made("comes"))
    monkeypatch.setattr(Images, "update", removed)
    state = await engine.pull_image(reference)
    assert await engine.inspect(reference) == state


class PruneAtCall:
    """Prunes all that it can before the n-th call that a pull makes to containerd."""

    def __init__(self, monkeypatch, engine, number: int) -> None:
        self.engine, self.number = engine, number
        self.calls = 0
        self.removed: list[str] = []
        self._pruning = False
        for owner, name in ((Channel, "unary"), (ContentWriter, "_send")):
            self._wrap(monkeypatch, owner, name)

    def _wrap(self, monkeypatch, owner, name) -> None:
        original = getattr(owner, name)

        async def counted(*arguments, **more):
            if not self._pruning:
                self.calls += 1
                if self.calls == self.number:
                    self._pruning = True
                    try:
                        result = await self.engine.prune(unused=True)
                        self.removed = [one.name for one in result.removed]
                    finally:
                        self._pruning = False
            return await original(*arguments, **more)

        monkeypatch.setattr(owner, name, counted)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
async def test_prune_all_before_each_call_of_a_pull(engine, monkeypatch, again):
    """What it has found is held, or it looks again: at no moment does it miss anything."""
    with FakeRegistry() as registry:
        other = registry.add("upkeep/other", "1", made("other", 1000))
        reference = registry.add("upkeep/calls", "1", made("calls", 1000))
        removed = []
        number = 0
        while True:
            number += 1
            for one in (other, reference) if again else (other,):
                await engine.pull_image(one)
            with monkeypatch.context() as patch:
                prune = PruneAtCall(patch, engine, number)
                state = await engine.pull_image(reference)
            if prune.calls < number:
                break
            removed.append(prune.removed)
            if reference in [image.name for image in await engine.images()]:
                assert await engine.inspect(reference) == state
                await engine.remove_image(reference)
            else:
                # It was there before, and nothing had to be done; or it went when all was.
                assert reference in prune.removed
    assert number > (5 if again else 20)
    assert any(other in names for names in removed), "what is shared was nobody's at some time"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("unused", [False, True], ids=["default", "all"])
async def test_ten_pulls_beside_a_loop_of_prune(containerd, namespace, contents, unused):
    """Done when 8, in rounds: with what the others have, and with what is gone again."""
    shared = [layer([file(f"s{n}", noise(n, 200_000))]) for n in range(3)]
    images = []
    for number in range(5):
        part = image([*shared[: number % 4], layer([file("own", noise(f"own {number}", 400_000))])])
        images.append(index([(part, part.descriptor("linux/amd64"))]) if number % 2 else part)
    rounds = prunes = 0
    done = asyncio.Event()
    with FakeRegistry() as registry:
        references = [registry.add("upkeep/ten", str(n), one) for n, one in enumerate(images)]

        async def pulls(number: int) -> None:
            nonlocal rounds
            # Each with locks of its own: they have only containerd's in common.
            async with containerd.connect(namespace=namespace) as engine:
                for turn in range(3):
                    await engine.pull_image(references[(number + turn) % len(references)])
                    rounds += 1

        async def prune() -> None:
            nonlocal prunes
            async with containerd.connect(namespace=namespace) as engine:
                while not done.is_set():
                    await engine.prune(unused=unused)
                    prunes += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(prune())
            async with asyncio.TaskGroup() as pulling:
                for number in range(10):
                    pulling.create_task(pulls(number))
            done.set()
    assert rounds == 30
    assert prunes >= 5
    after = await contents()
    assert after.leases == after.ingests == []
    if not unused:
        assert after.images == sorted(references)
        async with containerd.connect(namespace=namespace) as engine:
            for reference in references:
                await engine.inspect(reference)
