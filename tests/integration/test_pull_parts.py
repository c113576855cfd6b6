"""A large layer over several connections, where one does not bring all that it could."""

from __future__ import annotations

import asyncio
import itertools
import os
import re

import pytest

from serpentine.containerd import ContentWriter
from serpentine.events import Received, Retrying
from serpentine.pull import fetch, lines, processors
from serpentine.pull.processors import Idle
from serpentine.settings import Settings
from tests.support.contents import NOTHING
from tests.support.fake_registry import Answer, FakeRegistry, Seen
from tests.support.images import file, image, noise
from tests.support.images import layer as make_layer
from tests.support.trees import snapshot_tree

KIB = 1024
SIZE = 6 * KIB * KIB
PART = 256 * KIB
BOUNDED = re.compile(r"bytes=(\d+)-(\d+)")


@pytest.fixture
def fake(monkeypatch):
    """A registry that gives each connection a few MiB a second; what is decided is so sooner."""
    monkeypatch.setattr(fetch, "PARTS_FROM", 512 * KIB)
    monkeypatch.setattr(fetch, "PARTS_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "REPORT_EVERY", 0.02)
    monkeypatch.setattr(fetch, "PART", PART)
    # However busy the machine of the tests is.
    monkeypatch.setattr(fetch, "PROCESSORS_IDLE", 0.0)
    monkeypatch.setattr(processors, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(lines, "SETTLE", 0.05)
    monkeypatch.setattr(lines, "WINDOW", 0.1)
    with FakeRegistry() as registry:
        registry.pace = 2.0 * KIB * KIB
        yield registry


def add(fake: FakeRegistry, name: str):
    """Add an image of one large layer; return its reference and the layer."""
    layer = make_layer([file("large", noise(name, SIZE))], compression="none")
    return fake.add(f"parts/{name}", "1", image([layer])), layer


def ranges(fake: FakeRegistry) -> list[tuple[int, int]]:
    """Return the bounded ranges that were asked for, ends included."""
    asked = (BOUNDED.fullmatch(seen.headers.get("range", "")) for seen in fake.requests("/blobs/"))
    return [(int(found[1]), int(found[2])) for found in asked if found]


async def test_in_parts_and_right(containerd, namespace, fake):
    reference, layer = add(fake, "right")
    events = []
    async with containerd.connect(namespace=namespace, on_event=events.append) as engine:
        state = await engine.pull_image(reference)
        tree = await snapshot_tree(engine.containerd, "overlayfs", state.snapshot_key)
    assert fake.most_sending > 1
    asked = sorted(ranges(fake))
    # No byte twice.  (Where a slow machine takes them for no gain, some may have come otherwise.)
    assert len(asked) > 1
    assert all(start > end for (start, _), (_, end) in zip(asked[1:], asked, strict=False))
    assert asked[-1][1] <= len(layer.blob) - 1
    assert all(end - start < PART for start, end in asked)
    assert "large" in {name.strip("/") for name in tree}
    assert not [event for event in events if isinstance(event, Retrying)]
    received = sum(event.size for event in events if isinstance(event, Received))
    assert received >= len(layer.blob)
    assert state.image


async def test_not_with_a_limit_of_one(containerd, namespace, fake, tmp_path):
    reference, _ = add(fake, "one")
    settings = Settings(
        address=containerd.address,
        namespace=namespace,
        data_dir=tmp_path,
        max_concurrent_downloads=1,
    )
    async with containerd.connect(settings=settings) as engine:
        await engine.pull_image(reference)
    assert ranges(fake) == []


def whole(data: bytes) -> Answer:
    return Answer(body=data)


def elsewhere(data: bytes) -> Answer:
    return Answer(206, data[:PART], {"Content-Range": f"bytes 0-{PART - 1}/{len(data)}"})


def unnamed(data: bytes) -> Answer:
    return Answer(206, data[:PART])


def another_size(data: bytes) -> Answer:
    return Answer(206, data[:PART], {"Content-Range": f"bytes 0-{PART - 1}/{len(data) + 1}"})


def refused(_data: bytes) -> Answer:
    return Answer(416)


def forbidden(_data: bytes) -> Answer:
    return Answer(403, b"{}")


@pytest.mark.parametrize("answer", [whole, elsewhere, unnamed, another_size, refused, forbidden])
async def test_given_up_silently_where_ranges_do_not_work(containerd, namespace, fake, answer):
    reference, layer = add(fake, answer.__name__)
    events = []

    def bad(seen: Seen) -> Answer | None:
        return answer(layer.blob) if BOUNDED.fullmatch(seen.headers.get("range", "")) else None

    fake.on("/blobs/", bad)
    async with containerd.connect(namespace=namespace, on_event=events.append) as engine:
        await engine.pull_image(reference)
    assert 0 < len(ranges(fake)) < 20
    assert not [event for event in events if isinstance(event, Retrying)]


async def test_more_or_less_than_was_asked_for(containerd, namespace, fake):
    """The header is right, and the body is not: nothing of it counts but what was asked for."""
    reference, layer = add(fake, "bodies")
    count = 0

    def bad(seen: Seen) -> Answer | None:
        nonlocal count
        if not (found := BOUNDED.fullmatch(seen.headers.get("range", ""))):
            return None
        count += 1
        start, end = int(found[1]), int(found[2])
        body = layer.blob[start : end + 1]
        where = {"Content-Range": f"bytes {start}-{end}/{len(layer.blob)}"}
        if count == 2:
            return Answer(206, body, where, break_after=len(body) // 2)
        if count == 4:
            return Answer(206, body + b"more", where, length=-1)
        return None

    fake.on("/blobs/", bad)
    async with containerd.connect(namespace=namespace) as engine:
        await engine.pull_image(reference)
    assert count >= 2


async def test_not_where_nobody_says_that_it_can_be_done(containerd, namespace, fake):
    """The one connection that works is kept: it could not be gone on with."""
    reference, layer = add(fake, "unable")
    fake.on(f"/blobs/{layer.digest}", lambda _seen: Answer(body=layer.blob))
    async with containerd.connect(namespace=namespace) as engine:
        await engine.pull_image(reference)
    assert [seen.headers.get("range") for seen in fake.requests(layer.digest)] == [None]


@pytest.mark.parametrize("idle", [0.24, 0.26])
async def test_not_with_all_processors_at_work(containerd, namespace, fake, monkeypatch, idle):
    """Other connections would have nothing to bring more with."""
    monkeypatch.setattr(fetch, "PROCESSORS_IDLE", 0.25)
    looks = itertools.count()

    def looked() -> Idle:
        now = float(next(looks))
        return Idle(now, now * idle * (os.cpu_count() or 1))

    monkeypatch.setattr(processors, "idle_so_far", looked)
    reference, _ = add(fake, f"busy-{idle}")
    async with containerd.connect(namespace=namespace) as engine:
        await engine.pull_image(reference)
    assert next(looks) > 1, "it was never asked for"
    assert bool(ranges(fake)) == (idle > 0.25)


async def test_a_part_breaks_while_another_is_written(containerd, namespace, fake, monkeypatch):
    """Who writes is not interrupted by it: the write stream would be lost, and nobody told."""
    answer, begin = ContentWriter._answer, ContentWriter._open
    opened: list[str] = []
    broken = 0

    async def note(self):
        opened.append(self.ref)
        return await begin(self)

    monkeypatch.setattr(ContentWriter, "_open", note)

    async def slow(self):
        try:
            if ranges(fake):
                await asyncio.sleep(0.15)
        except asyncio.CancelledError:
            self._call.cancel()  # as grpcio does it, over TCP
            raise
        return await answer(self)

    monkeypatch.setattr(ContentWriter, "_answer", slow)
    reference, layer = add(fake, "while")
    digest = layer.digest

    def bad(seen: Seen) -> Answer | None:
        nonlocal broken
        found = BOUNDED.fullmatch(seen.headers.get("range", ""))
        if not found or broken or len(ranges(fake)) < 8:
            return None
        broken += 1
        start, end = int(found[1]), int(found[2])
        where = {"Content-Range": f"bytes {start}-{end}/{len(layer.blob)}"}
        return Answer(206, layer.blob[start : end + 1], where, break_after=PART // 4)

    fake.on("/blobs/", bad)
    async with containerd.connect(namespace=namespace) as engine, asyncio.timeout(30):
        await engine.pull_image(reference)
    assert broken
    assert opened.count(f"layer-{digest}") == 1


async def test_wrong_bytes_in_a_part_are_noticed(containerd, namespace, fake, contents):
    reference, _ = add(fake, "wrong")

    def bad(seen: Seen) -> Answer | None:
        if not (found := BOUNDED.fullmatch(seen.headers.get("range", ""))):
            return None
        start, end = int(found[1]), int(found[2])
        where = {"Content-Range": f"bytes {start}-{end}/*"}
        return Answer(206, bytes(end + 1 - start), where)

    fake.on("/blobs/", bad)
    async with containerd.connect(namespace=namespace) as engine:
        with pytest.raises(Exception, match="another digest"):
            await engine.pull_image(reference)
    left = await contents()
    assert left.images == []
    assert not left.snapshots


async def test_a_silent_part_is_given_up(containerd, namespace, fake, tmp_path):
    reference, _ = add(fake, "silent")
    gate = fake.gate()
    count = 0

    def bad(seen: Seen) -> Answer | None:
        nonlocal count
        if not (found := BOUNDED.fullmatch(seen.headers.get("range", ""))):
            return None
        count += 1
        if count != 2:
            return None
        start, end = int(found[1]), int(found[2])
        digest = seen.path.rpartition("/")[2]
        data = fake.blobs[digest]
        where = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return Answer(206, data[start : end + 1], where, gate=gate)

    fake.on("/blobs/", bad)
    settings = Settings(
        address=containerd.address, namespace=namespace, data_dir=tmp_path, stall_timeout=1.0
    )
    async with containerd.connect(settings=settings) as engine, asyncio.timeout(20):
        await engine.pull_image(reference)
    assert count > 2


async def test_cancelled_while_parts_come(containerd, namespace, fake, contents):
    """Nothing is left but what the next attempt goes on with, and that loses no more than parts."""
    reference, layer = add(fake, "cancelled")
    async with containerd.connect(namespace=namespace) as engine:
        loop, some = asyncio.get_running_loop(), asyncio.Event()

        def count(_seen: Seen) -> None:
            if len(ranges(fake)) >= 3:
                loop.call_soon_threadsafe(some.set)

        fake.on("/blobs/", count)
        task = asyncio.create_task(engine.pull_image(reference))
        async with asyncio.timeout(20):
            await some.wait()
        fake.hooks.clear()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=0.5)
        assert len(asyncio.all_tasks()) == 1, "a task was left behind"
        there = (await engine.containerd.content.list_statuses())[0].offset
        asked = max(end for _, end in ranges(fake)) + 1
        assert 0 < there <= asked
        assert asked - there <= fetch.PARTS_AHEAD * PART + KIB * KIB
        fake.seen.clear()
        await engine.pull_image(reference)
        first = fake.requests(f"/blobs/{layer.digest}")[0].headers.get("range", "")
        assert first == f"bytes={there}-"
        assert layer.digest in (await contents()).blobs
        await engine.remove_image(reference)
    assert await contents() == NOTHING
