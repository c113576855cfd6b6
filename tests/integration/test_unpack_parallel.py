"""Layers that are applied at once come out as those that are applied one after the other."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serpentine.containerd import Containerd
from serpentine.containerd.content import MESSAGE_SIZE, Content
from serpentine.containerd.diff import Diff
from serpentine.containerd.introspection import Introspection
from serpentine.containerd.snapshots import Snapshots
from serpentine.errors import ContainerdError, LayerError, NoSpace, SerpentineError
from serpentine.pull import unpack
from serpentine.pull.scan import LABEL_ALONE, LayerScan
from serpentine.settings import Settings
from tests.conftest import _clean
from tests.integration.test_pull_cancel import CancelAtCall, resumable  # noqa: F401 - a fixture
from tests.support.contents import NOTHING
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import (
    Entry,
    Layer,
    file,
    folder,
    hardlink,
    image,
    index,
    make_tar,
    noise,
    opaque,
    sha256,
    symlink,
    whiteout,
)
from tests.support.trees import layer_folders, raw_walk, snapshot_tree

STACKS = int(os.environ.get("SERPENTINE_TEST_STACKS", "40"))

pytestmark = pytest.mark.timeout(max(120, 4 * STACKS))


@pytest.fixture
def fake():
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture(autouse=True)
def _processors(monkeypatch):
    """Let nothing depend on how many this machine has: layers are looked at as for many."""
    monkeypatch.setattr("serpentine.pull.pull._processors", lambda: 64)


@pytest.fixture
def connect(containerd, namespace, tmp_path):
    """Return a function that connects to the test's namespace, or another, with so many at once."""

    def open_engine(at_once: int = 4, name: str = "", **more):
        chosen = Settings(
            address=containerd.address,
            namespace=name or namespace,
            max_concurrent_unpacks=at_once,
            data_dir=tmp_path,
            **more,
        )
        return containerd.connect(settings=chosen)

    return open_engine


def rebases(containerd) -> bool:
    return not containerd.version.startswith("1.")


@pytest.fixture
def alone(monkeypatch):
    """The snapshots that got their parent on the commit."""
    found: list[str] = []
    original = Snapshots.commit

    async def commit(self, name, key, *, parent="", **more):
        await original(self, name, key, parent=parent, **more)
        if parent:
            found.append(name)

    monkeypatch.setattr(Snapshots, "commit", commit)
    return found


@pytest.fixture
def applying(monkeypatch):
    """Let a test act in an apply: ``act`` is called with its blob's digest before it."""

    class Applying:
        now = most = 0
        seen: list[str]
        act: Callable | None = None

        async def last_of(self, count: int) -> None:
            """Wait until so many have been begun, and all but the one that waits are done."""
            while len(self.seen) < count or self.now > 1:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    state = Applying()
    state.seen = []
    original = Diff.apply

    async def apply(self, blob, mounts, **more):
        state.seen.append(str(blob.digest))
        state.now += 1
        state.most = max(state.most, state.now)
        try:
            if state.act is not None:
                await state.act(str(blob.digest))
            return await original(self, blob, mounts, **more)
        finally:
            state.now -= 1

    monkeypatch.setattr(Diff, "apply", apply)
    return state


# --- the same trees ---------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)
OWNERS = st.sampled_from([0, 7, 1000])
TIMES = st.sampled_from([1, 1_000_000_000, 1_700_000_000])
MODES = st.sampled_from([0o755, 0o700, 0o750, 0o1777, 0o2770, 0o600])
XATTRS = st.sampled_from([{}, {}, {"user.x": "1"}, {"user.y": "long" * 40}])
KINDS = st.sampled_from(
    ["folder", "file", "file", "symlink", "hardlink", "whiteout", "opaque", "fifo", "root"]
)


@st.composite
def _layers(draw) -> list[Entry]:
    """A layer; most directories are named before what is in them, as by usual tools."""
    entries: list[Entry] = []
    named: set[str] = set()
    files: list[str] = []
    tidy = draw(st.booleans()) or draw(st.booleans())

    def attributes() -> dict:
        return {"uid": draw(OWNERS), "gid": draw(OWNERS), "mtime": draw(TIMES)}

    def name_parents(path: str) -> None:
        parts = path.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            parent = "/".join(parts[:count])
            if parent not in named:
                named.add(parent)
                entries.append(folder(parent, draw(MODES), xattrs=draw(XATTRS), **attributes()))

    for _ in range(draw(st.integers(0, 5))):
        path, kind = draw(NAMES), draw(KINDS)
        if tidy or draw(st.booleans()):
            name_parents(path)
        prefix = draw(st.sampled_from(["", "", "./", "/"]))
        if kind == "folder":
            named.add(path)
            entries.append(folder(prefix + path, draw(MODES), xattrs=draw(XATTRS), **attributes()))
        elif kind == "file":
            files.append(path)
            entries.append(
                file(
                    prefix + path,
                    draw(st.binary(max_size=3)),
                    mode=draw(MODES),
                    xattrs=draw(XATTRS),
                    **attributes(),
                )
            )
        elif kind == "symlink":
            target = draw(st.sampled_from(["a", "../b", "/c", "nowhere"]))
            entries.append(symlink(prefix + path, target, **attributes()))
        elif kind == "hardlink" and files:
            entries.append(hardlink(prefix + path, draw(st.sampled_from(files)), **attributes()))
        elif kind == "whiteout":
            entries.append(whiteout(prefix + path))
        elif kind == "opaque":
            entries.append(opaque(prefix + path))
        elif kind == "fifo":
            entries.append(Entry(prefix + path, kind=b"6", mode=0o600, **attributes()))
        elif kind == "root":
            root = draw(st.sampled_from(["./", "."]))
            entries.append(folder(root, draw(MODES), xattrs=draw(XATTRS), **attributes()))
    return entries


@st.composite
def _stacks(draw) -> list[list[Entry]]:
    made = draw(st.lists(_layers(), min_size=2, max_size=5))
    if draw(st.integers(0, 4)) == 0:
        made.append(draw(st.sampled_from(made)))
    return made


_numbers = itertools.count()


def packed(entries: list[Entry], number: int) -> Layer:
    """Compress a layer so that no other one has the same blob: containerd must not have it."""
    tar = make_tar(entries)
    if number % 3 == 1:
        # A frame that is to be passed over.
        blob = zstandard.compress(tar, 1) + struct.pack("<III", 0x184D2A50, 4, number)
    else:
        blob = gzip.compress(tar, 1, mtime=number)
    return Layer(blob, sha256(tar), "application/vnd.oci.image.layer.v1.tar")


def test_comes_out_as_one_after_the_other(containerd, namespace, connect, fake, alone):
    """Entry by entry, of each layer's own directory too; what fails does so in both ways."""
    counts = {"alone": 0, "stacks": 0, "failed": 0}
    before = time.time() - 1

    async def pull(at_once: int, name: str, reference: str):
        async with connect(at_once, name, check_space=False, sync=False) as engine:
            try:
                state = await engine.pull_image(reference)
            except SerpentineError as error:
                assert await engine.containerd.snapshots("overlayfs").all() == []
                return type(error), None, None
            key = state.snapshot_key
            folders = await layer_folders(engine.containerd, "overlayfs", key)
            tree = await snapshot_tree(engine.containerd, "overlayfs", key)
            return state, tree, [raw_walk(one, before) for one in folders]

    async def compare(stack: list[list[Entry]]) -> None:
        number = next(_numbers)
        made = {id(entries): packed(entries, number * 16 + n) for n, entries in enumerate(stack)}
        reference = fake.add(f"stack/{number}", "1", image([made[id(one)] for one in stack]))
        ways = {}
        already = len(alone)
        for way, at_once in (("several", 4), ("chain", 1)):
            name = f"{namespace}-{way}"
            try:
                ways[way] = await pull(at_once, name, reference)
            finally:
                await _clean(containerd, name)
        assert ways["several"][1] == ways["chain"][1]
        assert ways["several"] == ways["chain"]
        counts["stacks"] += 1
        counts["alone"] += len(alone) - already
        counts["failed"] += ways["chain"][1] is None
        fake.blobs.clear()
        fake.seen.clear()

    with asyncio.Runner() as runner:

        @settings(
            max_examples=STACKS if rebases(containerd) else max(1, STACKS // 6),
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(_stacks())
        # What the naive way gets wrong: implied parents, whiteouts, opaque directories.
        @example([[folder("a", 0o700, uid=7), file("a/b")], [file("a/c")]])
        @example([[folder("a", 0o700, uid=7), file("a/b/c")], [folder("a"), file("a/b/d")]])
        @example([[folder("a"), file("a/b")], [folder("a"), whiteout("a/b")]])
        @example([[folder("a"), file("a/b")], [folder("a"), opaque("a"), file("a/c")]])
        @example([[folder("a", 0o700), file("a/b")], [whiteout("a/b")]])
        @example([[folder("a"), file("a/b")], [file("a")], [folder("a"), file("a/c")]])
        @example([[folder("./", 0o700, uid=7)], [folder("./", 0o711, uid=1000), file("b")], []])
        def run(stack):
            runner.run(compare(stack))

        run()
    if rebases(containerd):
        assert counts["alone"] > counts["stacks"] // 3, "hardly anything was tried"
    else:
        assert counts["alone"] == 0
    assert counts["failed"] < counts["stacks"] // 2


# --- when, and how many -----------------------------------------------------------------------


def stack_of(*seeds: object, size: int = 200) -> list[Layer]:
    """Layers each of which can be applied alone."""
    return [
        packed([folder(f"d{n}"), file(f"d{n}/file", noise(seed, size))], n)
        for n, seed in enumerate(seeds)
    ]


async def test_several_are_applied_at_once(containerd, connect, fake, alone, applying):
    """The lowest waits for those that can go alone; never more than the setting says."""
    layers = stack_of(*"abcdef")
    reference = fake.add("at/once", "1", image(layers))

    async def meet(digest):
        if digest == layers[0].digest:
            await applying.last_of(4)
        else:
            await asyncio.sleep(0.05)

    if rebases(containerd):
        applying.act = meet
    async with connect(2) as engine:
        state = await engine.pull_image(reference)
        snapshots = engine.containerd.snapshots("overlayfs")
        key, chain = state.snapshot_key, []
        while key:
            chain.append(key)
            key = (await snapshots.stat(key)).parent
        labels = (await snapshots.stat(state.snapshot_key)).labels
    assert len(chain) == 6
    assert labels[unpack.LABEL_ROOT] == "0:0"
    if rebases(containerd):
        assert applying.most == 2
        assert alone
        assert set(alone) < set(chain[:-1])
    else:
        assert applying.most == 1
        assert not alone


async def test_the_lowest_is_committed_first(containerd, connect, fake, alone, applying):
    """All others are done with before it, wait, and are committed in their order."""
    if not rebases(containerd):
        pytest.skip("this containerd cannot")
    layers = stack_of(*"ghijk")
    reference = fake.add("at/last", "1", image(layers))

    async def last(digest):
        if digest == layers[0].digest:
            await applying.last_of(5)

    applying.act = last
    async with connect(5) as engine:
        state = await engine.pull_image(reference)
        assert len(alone) == 4
        assert alone[-1] == state.snapshot_key
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert {f"d{n}/file" for n in range(5)} < set(tree)


async def test_no_more_than_so_far_ahead(containerd, connect, fake, monkeypatch, applying):
    """Each that waits holds a lock."""
    monkeypatch.setattr(unpack, "LOOK_AHEAD", 2)
    layers = stack_of(*range(8))
    reference = fake.add("at/most", "1", image(layers))
    order = [one.digest for one in layers]

    async def look(digest):
        done = [s for s in await snapshots.all() if s.kind.name == "COMMITTED"]
        assert order.index(digest) - len(done) <= 2
        if digest == order[0]:
            await asyncio.sleep(0.2)

    applying.act = look
    async with connect(4) as engine:
        snapshots = engine.containerd.snapshots("overlayfs")
        await engine.pull_image(reference)


async def test_one_at_once_is_the_chain(connect, fake, alone, applying, monkeypatch):
    """Nothing is looked at then, and containerd is not asked."""

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(LayerScan, "__init__", never)
    monkeypatch.setattr(Introspection, "capabilities", never)
    reference = fake.add("one/by-one", "1", image(stack_of(*"lmn")))
    async with connect(1) as engine:
        await engine.pull_image(reference)
    assert (applying.most, alone) == (1, [])


async def test_containerd_is_asked_once(connect, fake, monkeypatch):
    asked = []
    original = Introspection.capabilities

    def capabilities(self, snapshotter):
        asked.append(snapshotter)
        return original(self, snapshotter)

    monkeypatch.setattr(Introspection, "capabilities", capabilities)
    async with connect() as engine:
        single = fake.add("asked/single", "1", image(stack_of("o")))
        await engine.pull_image(single)
        assert asked == []
        for tag in "pq":
            await engine.pull_image(fake.add("asked/once", tag, image(stack_of(tag, "r", "s"))))
    assert asked == ["overlayfs"]


async def test_other_snapshotters_go_one_after_the_other(connect, fake, alone, applying):
    reference = fake.add("other/native", "1", image(stack_of(*"tuv")))
    async with connect(snapshotter="native") as engine:
        await engine.pull_image(reference)
    assert (applying.most, alone) == (1, [])


async def test_implied_directories_wait_for_the_layer_below(containerd, connect, fake, alone):
    secret = packed([folder("secret", 0o700, uid=7, gid=8), file("secret/x")], 1)
    implied = packed([file("secret/y")], 2)
    plain = packed([file("z")], 3)
    reference = fake.add("implied/parent", "1", image([secret, implied, plain]))
    async with connect() as engine:
        state = await engine.pull_image(reference)
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert (tree["secret"]["mode"], tree["secret"]["owner"]) == ("0o700", (7, 8))
    assert set(alone) <= {state.snapshot_key}


@pytest.mark.parametrize("known", [True, False])
async def test_a_root_of_somebody_else(containerd, connect, fake, alone, known):
    """A base that we know nothing of may have another owner of its root, which goes upwards."""
    first, *more = stack_of("w", "x", "y", "z")
    base = fake.add("root/base", "1", image([first]))
    reference = fake.add("root/upper", "1", image([first, *more]))
    async with connect() as engine:
        state = await engine.pull_image(base)
        snapshots = engine.containerd.snapshots("overlayfs")
        if not known:
            await snapshots.update_labels(state.snapshot_key, {unpack.LABEL_ROOT: None})
            (root,) = await layer_folders(engine.containerd, "overlayfs", state.snapshot_key)
            os.chown(root, 1234, 4321)
        state = await engine.pull_image(reference)
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
        labels = (await snapshots.stat(state.snapshot_key)).labels
    assert tree["."]["owner"] == ((0, 0) if known else (1234, 4321))
    assert (unpack.LABEL_ROOT in labels) is known
    assert bool(alone) is (known and rebases(containerd))


async def test_a_base_that_somebody_else_puts_there_meanwhile(
    containerd, connect, fake, alone, applying
):
    """The layers above are done with, and all the same go onto that one as the chain would."""
    if not rebases(containerd):
        pytest.skip("this containerd cannot")
    layers = stack_of("A", "B", "C")
    reference = fake.add("root/meanwhile", "1", image(layers))

    async def act(digest):
        if digest != layers[0].digest:
            return
        await applying.last_of(3)
        snapshots = engine.containerd.snapshots("overlayfs")
        (key,) = [
            s.labels["containerd.io/snapshot.ref"]
            for s in await snapshots.all()
            if layers[0].diff_id in s.name
        ]
        lease = "somebody-else"
        await engine.containerd.leases.create(lease, expires=timedelta(minutes=1))
        (mount,) = await snapshots.prepare("theirs", lease=lease)
        os.chown(mount.source, 1234, 4321)
        await snapshots.commit(key, "theirs", lease=lease)

    applying.act = act
    async with connect(3) as engine:
        state = await engine.pull_image(reference)
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert tree["."]["owner"] == (1234, 4321)
    assert not alone


async def test_what_was_begun_is_not_looked_at(containerd, connect, fake, alone, monkeypatch):
    """Of the first part nothing is known: here, it implies a directory, and the rest does not."""
    # A message to containerd, less the header: what came is a number of whole ones.
    size = MESSAGE_SIZE - 512
    tar = make_tar([file(name, noise(name, size)) for name in ("d0/w", "x", "y", "z")])
    layers = [*stack_of("D"), Layer(tar, sha256(tar), "application/vnd.oci.image.layer.v1.tar")]
    reference = fake.add("not/seen", "1", image(layers))
    half = [
        Answer(
            body=layers[1].blob, break_after=2 * MESSAGE_SIZE + 80_000, length=len(layers[1].blob)
        )
    ]
    fake.on(f"GET .*{layers[1].digest}", lambda _: half.pop() if half else Answer(reset=True))
    monkeypatch.setattr("serpentine.pull.fetch.RETRY_DELAYS", (0.01,))
    async with connect() as engine:
        with pytest.raises(SerpentineError):
            await engine.pull_image(reference)
        fake.hooks.clear()
        await engine.pull_image(reference)
        last = fake.requests(f"GET .*{layers[1].digest}")[-1]
        assert last.headers["range"] in (f"bytes={MESSAGE_SIZE}-", f"bytes={2 * MESSAGE_SIZE}-")
    assert not alone


@pytest.mark.parametrize("rules", ["1", "0"])
async def test_what_was_seen_of_a_blob_is_known_afterwards(
    containerd, connect, fake, alone, applying, monkeypatch, rules
):
    """A pull that finds the blobs unpacks them as the one that brought them would have."""
    layers = stack_of(*"HIJK")
    reference = fake.add("seen/before", "1", image(layers))
    monkeypatch.setattr("serpentine.pull.fetch.ALONE_BY", rules)
    applying.act = lambda _: asyncio.Event().wait()  # for ever
    async with connect(4) as engine:
        blobs = engine.containerd.content

        async def all_there() -> bool:
            there = {str(info.digest): info.labels for info in await blobs.all()}
            looked_at = layers[1:] if rebases(containerd) else []
            return all(one.digest in there for one in layers) and all(
                there[one.digest].get(LABEL_ALONE) == rules for one in looked_at
            )

        pull = asyncio.create_task(engine.pull_image(reference))
        async with asyncio.timeout(20):
            while not await all_there():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        pull.cancel()
        await asyncio.wait([pull])

    async def last(digest):
        if digest == layers[0].digest:
            await applying.last_of(4)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("serpentine.pull.fetch.ALONE_BY", "1")
    monkeypatch.setattr(LayerScan, "__init__", never)
    known = rebases(containerd) and rules == "1"
    applying.act = last if known else None
    applying.seen.clear()
    async with connect(4) as engine, asyncio.timeout(20):
        await engine.pull_image(reference)
    assert len(alone) == (3 if known else 0)


async def test_a_download_that_breaks_is_looked_at_all_the_same(containerd, connect, fake, alone):
    """It goes on in the same stream."""
    layers = stack_of("F", "G", size=300_000)
    reference = fake.add("broken/off", "1", image(layers))
    half = [Answer(body=layers[1].blob, break_after=200_000, length=len(layers[1].blob))]
    fake.on(f"GET .*{layers[1].digest}", lambda _: half.pop() if half else None)
    held = [Answer(body=layers[0].blob, gate=fake.gate())]
    fake.on(f"GET .*{layers[0].digest}", lambda _: held[0])
    async with connect() as engine:
        pull = asyncio.create_task(engine.pull_image(reference))
        while len(fake.requests(f"GET .*{layers[1].digest}")) < 2:  # noqa: ASYNC110 - a thread
            await asyncio.sleep(0.002)
        snapshots = engine.containerd.snapshots("overlayfs")
        while rebases(containerd) and not await snapshots.all():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.002)
        held[0].gate.set()
        state = await pull
    assert alone == ([state.snapshot_key] if rebases(containerd) else [])


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("how", ["content", "digest"])
async def test_the_error_of_each_layer_is_told(
    containerd, connect, fake, contents, applying, bad, how
):
    """Whichever it is, and while others are applied or wait."""
    layers = stack_of(*(f"bad {bad} {how} {n}" for n in range(4)))
    ids = [one.diff_id for one in layers]
    if how == "content":
        broken = gzip.compress(make_tar([folder("x"), file("x/y", "1")])[:-700] + b"!" * 700)
        layers[bad] = Layer(broken, ids[bad], layers[bad].media_type)
    else:
        ids[bad] = "sha256:" + "0" * 64
    reference = fake.add("bad/layer", "1", image(layers, diff_ids=ids))
    async with connect() as engine:
        with pytest.raises(LayerError) as caught:
            await engine.pull_image(reference)
    assert layers[bad].digest in str(caught.value)
    assert await contents() == NOTHING


async def test_a_full_disk_is_told_at_once(containerd, connect, fake, contents, applying):
    layers = stack_of(*"FGHI")
    reference = fake.add("full/disk", "1", image(layers))

    async def act(digest):
        if digest == layers[2].digest:
            raise NoSpace("no space left on device")

    applying.act = act
    async with connect() as engine:
        with pytest.raises(NoSpace):
            await engine.pull_image(reference)
    assert applying.seen.count(layers[2].digest) == 1
    left = await contents()
    assert not [name for name in left.snapshots if name.startswith("extract")]


async def test_one_that_cannot_be_applied_alone_is_applied_to_its_parent(
    containerd, connect, fake, alone, monkeypatch
):
    """In a user namespace some containerds say that they can, and cannot."""
    original = Diff.apply

    async def apply(self, blob, mounts, **more):
        if any(option.startswith("upperdir") for option in mounts[0].options) and not any(
            option.startswith("lowerdir") for option in mounts[0].options
        ):
            raise ContainerdError("mount: invalid argument")
        return await original(self, blob, mounts, **more)

    monkeypatch.setattr(Diff, "apply", apply)
    reference = fake.add("user/namespace", "1", image(stack_of(*"JKL")))
    async with connect() as engine:
        await engine.pull_image(reference)
        snapshots = await engine.containerd.snapshots("overlayfs").all()
    assert not alone
    assert len(snapshots) == 3


async def test_a_wrong_parent_is_noticed(containerd, connect, fake, applying, monkeypatch):
    """None is a wrong one."""
    if not rebases(containerd):
        pytest.skip("this containerd cannot")
    original = Snapshots.commit

    async def commit(self, name, key, *, parent="", **more):
        await original(self, name, key, **more)

    monkeypatch.setattr(Snapshots, "commit", commit)
    layers = stack_of(*"MNO")
    reference = fake.add("wrong/parent", "1", image(layers))

    async def last(digest):
        # What finds its parent there is applied to it.
        if digest == layers[0].digest:
            while len(applying.seen) < 3:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    applying.act = last
    async with connect() as engine:
        with pytest.raises(ContainerdError, match="instead of sha256"):
            await engine.pull_image(reference)
        for snapshot in await engine.containerd.snapshots("overlayfs").all():
            assert snapshot.parent or layers[0].diff_id in snapshot.name


async def test_a_look_that_fails_fails_no_pull(connect, fake, alone, monkeypatch):
    def feed(self, piece):
        raise MemoryError

    monkeypatch.setattr("serpentine.pull.scan._Tar.feed", feed)
    reference = fake.add("look/fails", "1", image(stack_of(*"PQR")))
    async with connect() as engine:
        await engine.pull_image(reference)
    assert not alone


@pytest.mark.timeout(300)
async def test_cancelled_at_every_call(
    containerd,
    connect,
    fake,
    contents,
    monkeypatch,
    resumable,  # noqa: F811
):
    """From the first request to the last label, at each call in turn."""
    part = image(stack_of(*"STUV"))
    made = index([(part, part.descriptor("linux/amd64"))])
    reference = fake.add("cancel/calls", "1", made)
    number = kept = 0
    step = 1 if "SERPENTINE_TEST_STACKS" in os.environ else 3
    while True:
        number += step
        with monkeypatch.context() as patch:
            cancel = CancelAtCall(patch, number)
            async with connect() as engine:
                cancel.task = task = asyncio.create_task(engine.pull_image(reference))
                await asyncio.wait([task])
                cancel.task = None
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others, timeout=0.5)
            assert len(asyncio.all_tasks()) == 1, "a task was left behind"
        if not task.cancelled():
            break
        async with connect() as engine:
            if not (await contents()).images:
                if not await resumable(engine):
                    continue
                kept += 1
            await engine.pull_image(reference)
            left = await contents()
            assert (left.leases, left.ingests) == ([], []), f"after call {number}"
            assert not [name for name in left.snapshots if name.startswith("extract")]
            await engine.remove_image(reference)
        assert await contents() == NOTHING, f"after call {number}"
    assert number > 60, "the cancellations did not reach far into the pull"
    assert kept > 30 // step, "nothing was kept to go on with"
    assert task.result().snapshot_key in (await contents()).snapshots


async def test_two_that_want_the_same(containerd, connect, fake, contents):
    """Engines that know nothing of each other: each layer is made once, nobody waits for ever."""
    # containerd 1.6 takes half a second for each lock that somebody holds.
    rounds, count = (3, 8) if rebases(containerd) else (1, 3)
    for number in range(rounds):
        layers = stack_of(*(f"two {number} {n}" for n in range(count)))
        reference = fake.add("two/engines", str(number), image(layers))
        lower = fake.add("two/lower", str(number), image(layers[: count - 1]))
        async with (
            connect(2) as one,
            connect(1) as two,
            connect(3) as three,
            asyncio.timeout(60),
            asyncio.TaskGroup() as group,
        ):
            for engine in (one, two, three):
                group.create_task(engine.pull_image(reference))
                group.create_task(engine.pull_image(lower))
        left = await contents()
        assert (left.leases, left.ingests) == ([], [])
        assert len(left.snapshots) == count
        async with connect() as engine:
            await engine.remove_image(reference)
            await engine.remove_image(lower)
    assert await contents() == NOTHING


@pytest.mark.parametrize("at_once", [1, 3])
async def test_a_lock_that_is_held_while_the_layer_below_comes(
    containerd, connect, fake, monkeypatch, at_once
):
    """However long that takes: who wants the same waits for it, too, and then for the lock."""
    # (containerd 1.6 does nothing else for half a second when a ref is tried that is held.)
    monkeypatch.setattr("serpentine.pull.unpack.UNPACK_LOCK_WAIT", 2.5)
    layers = stack_of(*(f"held {at_once} {name}" for name in "ABC"))
    reference = fake.add("held/long", str(at_once), image(layers))
    gate = fake.gate()
    fake.on(f"GET .*{layers[1].digest}", Answer(body=layers[1].blob, gate=gate))
    held: list[str] = []
    lock = Content.lock

    def noted(self, ref, **more):
        held.append(ref)
        return lock(self, ref, **more)

    monkeypatch.setattr(Content, "lock", noted)
    async with connect(at_once) as one, connect(1) as two, asyncio.timeout(60):
        first = asyncio.create_task(one.pull_image(reference))
        while len(held) < 2:  # noqa: ASYNC110 - the lowest, and the one on top
            await asyncio.sleep(0.01)
        second = asyncio.create_task(two.pull_image(reference))
        while len(held) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(4)
        assert not second.done()
        gate.set()
        assert (await first).snapshot_key == (await second).snapshot_key


async def test_killed_while_layers_wait_for_the_one_below(
    containerd, namespace, fake, contents, connect
):
    layers = stack_of("kill", "W", "X", "Y")
    reference = fake.add("killed/waiting", "1", image(layers))
    stalled = [Answer(body=layers[0].blob, gate=fake.gate())]
    fake.on(f"GET .*{layers[0].digest}", lambda _: stalled.pop() if stalled else None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serpentine", "pull", "--progress", "plain", reference),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            **containerd.environ,
            "CONTAINERD_NAMESPACE": namespace,
            "SERPENTINE_MAX_UNPACKS": "4",
            "SERPENTINE_STALL_TIMEOUT": "60",
        },
    )
    waiting = 3 if rebases(containerd) else 0
    async with Containerd(containerd.endpoint, namespace=namespace) as client:
        snapshots = client.snapshots("overlayfs")
        # All others are here, and applied where that can be done.
        while (
            len(await snapshots.all()) < waiting
            or len(await client.content.all([f'digest=="{one.digest}"' for one in layers])) < 3
        ):
            assert process.returncode is None
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    async with connect() as engine:
        state = await engine.pull_image(reference)
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
        assert {f"d{n}/file" for n in range(4)} < set(tree)
        left = await contents()
        assert (left.leases, left.ingests) == ([], [])
        assert len(left.snapshots) == 4
        await engine.remove_image(reference)
    assert await contents() == NOTHING
