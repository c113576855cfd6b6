"""How many connections a pull has: as many as are measured to bring more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.pull.lines import FIRST, FORGET, MOST, SETTLE, WINDOW, Lines, worth_having


class TestDecision:
    @pytest.mark.parametrize(
        ("rates", "used", "expected"),
        [
            ({1: 50}, 1, 2),  # nobody has tried
            ({3: 150}, 3, 5),  # twice as many, and not more than there may be
            ({1: 50, 2: 95}, 2, 4),
            ({1: 50, 2: 55}, 2, 1),  # no gain: back again,
            ({1: 50, 2: 55}, 1, 1),  # and not tried again
            ({1: 50, 2: 95, 4: 100}, 4, 2),
            ({1: 50, 2: 95, 4: 190}, 2, 4),  # known to be good
            ({1: 50, 2: 95, 4: 190}, 4, 5),
            ({1: 50, 2: 95, 4: 190, 5: 195}, 5, 4),
            ({5: 10}, 5, 5),
        ],
    )
    def test_worth_having(self, rates, used, expected):
        assert worth_having(rates, used, 5) == expected

    @given(st.dictionaries(st.integers(1, 5), st.floats(0, 1e9), min_size=1), st.integers(1, 8))
    def test_never_none_and_never_more_than_may_be(self, rates, most):
        for used in rates:
            assert 1 <= worth_having(rates, used, most) <= most


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """Brings bytes to lines as time goes by: ``rate`` of the number of those in use."""

    def __init__(self, lines: Lines, clock: Clock, rate: Callable[[int], float]) -> None:
        self._lines, self._clock, self._rate = lines, clock, rate

    def pass_on(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self._clock.now += 0.05
            self._lines.came(int(self._rate(self._lines.used) * 0.05))

    def window(self) -> None:
        self.pass_on(SETTLE + WINDOW + 0.1)


def made(rate: Callable[[int], float], most: int | None = None) -> tuple[Lines, Wire, Clock]:
    clock = Clock()
    lines = Lines(most, clock=clock)
    return lines, Wire(lines, clock, rate), clock


def each(limit: int) -> Callable[[int], float]:
    """Each connection brings a megabyte a second, up to so many."""
    return lambda used: 1e6 * min(used, limit)


async def test_blobs_get_one_in_the_order_in_which_they_ask():
    lines, _, _ = made(each(10))
    got: list[int] = []
    leave = [asyncio.Event() for _ in range(5)]

    async def blob(number: int) -> None:
        async with lines.one():
            got.append(number)
            await leave[number].wait()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(blob(number))
        await asyncio.sleep(0)
        assert got == list(range(FIRST))
        leave[1].set()
        for _ in range(3):
            await asyncio.sleep(0)
        assert got == [0, 1, 2, 3]
        assert lines.used == FIRST
        for event in leave:
            event.set()
    assert got == [0, 1, 2, 3, 4]
    assert lines.used == 0


async def test_more_blobs_at_once_where_that_brings_more():
    lines, wire, _ = made(each(10))
    leave = asyncio.Event()

    async def blob() -> None:
        async with lines.one():
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(blob())
        await asyncio.sleep(0)
        wire.window()
        await asyncio.sleep(0)
        assert lines.used == MOST
        leave.set()
    assert lines.used == 0


async def test_a_number_that_somebody_chose_stays():
    lines, wire, _ = made(each(10), most=2)
    leave = asyncio.Event()

    async def blob() -> None:
        async with lines.one():
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(blob())
        await asyncio.sleep(0)
        wire.window()
        await asyncio.sleep(0)
        assert lines.used == 2
        leave.set()


async def test_a_cancelled_blob_leaves_its_place_to_the_next():
    lines, _, _ = made(each(10), most=1)
    order: list[str] = []
    leave = asyncio.Event()

    async def blob(name: str) -> None:
        async with lines.one():
            order.append(name)
            await leave.wait()

    first = asyncio.create_task(blob("first"))
    await asyncio.sleep(0)
    second = asyncio.create_task(blob("second"))
    third = asyncio.create_task(blob("third"))
    await asyncio.sleep(0)
    second.cancel()
    leave.set()  # the first ends in the same moment
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert order == ["first", "third"]
    assert lines.used == 0


async def test_cancelled_in_the_moment_of_getting_it():
    lines, _, _ = made(each(10), most=1)
    leave = asyncio.Event()

    async def blob() -> None:
        async with lines.one():
            await leave.wait()

    first = asyncio.create_task(blob())
    await asyncio.sleep(0)
    second = asyncio.create_task(blob())
    await asyncio.sleep(0)
    leave.set()
    await first  # the second's turn has come, and it has not run yet
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert lines.used == 0
    async with lines.one():
        assert lines.used == 1


async def test_parts_get_as_many_as_bring_more():
    lines, wire, _ = made(each(4))
    async with lines.one():
        assert not lines.try_more()  # nothing is known yet
        wire.window()
        assert [lines.try_more(), lines.try_more()] == [True, False]
        wire.window()
        assert [lines.try_more() for _ in range(3)] == [True, True, False]
        assert not lines.too_many()
        wire.window()
        # Five were no better than four.
        assert lines.try_more()
        wire.window()
        assert lines.too_many()
        lines.give_back()
        assert not lines.too_many()
        assert not lines.more()
        for _ in range(3):
            lines.give_back()


async def test_one_that_fills_the_link_stays_alone_for_a_while():
    lines, wire, clock = made(each(1))
    async with lines.one():
        wire.window()
        assert lines.try_more()
        wire.window()
        assert lines.too_many()
        lines.give_back()
        wire.window()
        assert not lines.more()
        clock.now += FORGET
        wire.window()
        assert lines.more()


async def test_blobs_come_before_parts():
    lines, wire, _ = made(each(10))
    leave = asyncio.Event()

    async def blob() -> None:
        async with lines.one():
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        async with lines.one():
            wire.window()
            taken = 0
            while lines.try_more():
                taken += 1
            wire.window()
            while lines.try_more():
                taken += 1
            assert lines.used == 4
            group.create_task(blob())
            await asyncio.sleep(0)
            assert not lines.more()
            assert lines.too_many()
            lines.give_back()  # the blob gets it
            await asyncio.sleep(0)
            assert lines.used == 4
            assert not lines.too_many()
            for _ in range(taken - 1):
                lines.give_back()
        leave.set()
    assert lines.used == 0


async def test_with_fewer_blobs_is_measured_again_before_parts():
    """Three may have filled the link, and the one that is left may fill it, too."""
    lines, wire, _ = made(each(3))
    async with lines.one():
        async with lines.one(), lines.one():
            wire.window()
        assert not lines.more()
        wire.window()
        assert lines.more()


async def test_not_in_parts_where_that_does_not_work():
    lines, wire, _ = made(each(4))
    async with lines.one():
        wire.window()
        lines.parts = False
        assert not lines.more()
        assert not lines.try_more()


async def test_bytes_of_a_download_that_asked_for_none():
    lines, wire, _ = made(each(4))
    wire.window()
    assert not lines.more()
    assert lines.used == 0
