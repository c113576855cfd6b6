"""Parts of a blob come in any order, and are read in theirs; no more of them than may be."""

from __future__ import annotations

import asyncio
import random

import pytest

from serpentine.pull.parts import Part, Parts

DATA = random.Random(1).randbytes(1000)


async def gather(parts: Parts) -> bytes:
    return b"".join([chunk async for chunk in parts.read()])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("start", [0, 1, 999])
async def test_read_in_order_whatever_comes_first(seed, start):
    chance = random.Random(seed)
    parts = Parts(start, len(DATA), size=70, ahead=4)

    async def work() -> None:
        while (part := await parts.take()) is not None:
            at = part.start
            while at < part.end:
                await asyncio.sleep(chance.random() / 1000)
                size = min(chance.randint(1, 40), part.end - at)
                part.put(DATA[at : at + size])
                at += size

    async with asyncio.TaskGroup() as group:
        read = group.create_task(gather(parts))
        for _ in range(3):
            group.create_task(work())
    assert read.result() == DATA[start:]


async def test_no_more_are_handed_out_than_may_wait():
    parts = Parts(0, len(DATA), size=100, ahead=3)
    taken = [await parts.take() for _ in range(3)]
    fourth = asyncio.create_task(parts.take())
    await asyncio.sleep(0.01)
    assert not fourth.done()
    # That the later ones are there makes no room: they are in memory.
    for part in taken[1:]:
        assert isinstance(part, Part)
        part.put(DATA[part.start : part.end])
    await asyncio.sleep(0.01)
    assert not fourth.done()
    reading = parts.read()
    first = taken[0]
    assert first is not None
    first.put(DATA[:100])
    assert await anext(reading) == DATA[:100]
    assert await anext(reading) == DATA[100:200]  # so the first one is over
    part = await fourth
    assert part is not None
    assert (part.start, part.end) == (300, 400)
    await reading.aclose()


async def test_the_first_one_is_passed_on_while_it_comes():
    parts = Parts(0, 100, size=100, ahead=2)
    part = await parts.take()
    assert part is not None
    reading = parts.read()
    part.put(b"abc")
    assert await anext(reading) == b"abc"
    assert not part.whole
    assert part.chunks == []  # and not kept
    await reading.aclose()


async def test_stopped_it_ends_after_what_was_handed_out():
    parts = Parts(0, 1000, size=100, ahead=2)
    for _ in range(2):
        part = await parts.take()
        assert part is not None
        part.put(DATA[part.start : part.end])
    parts.stop()
    assert await parts.take() is None
    assert await gather(parts) == DATA[:200]


async def test_the_next_one_is_asked_for_before_the_end():
    part = Part(0, 100)
    part.put(bytes(74))
    assert not part.nearly.is_set()
    part.put(bytes(1))
    assert part.nearly.is_set()
    assert not part.whole


async def test_a_failure_is_raised_behind_what_has_come():
    parts = Parts(0, 200, size=100, ahead=2)
    first, second = [await parts.take() for _ in range(2)]
    assert first is not None
    assert second is not None
    second.put(DATA[100:150])
    second.fail(ValueError("broke"))
    reading = parts.read()
    first.put(DATA[:100])
    assert await anext(reading) == DATA[:100]
    assert await anext(reading) == DATA[100:150]
    with pytest.raises(ValueError, match="broke"):
        await anext(reading)
