"""How many connections a pull has: as many as are measured to bring more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.pull import lines as module
from serpentine.pull.lines import (
    FIRST,
    FORGET,
    LATE,
    MOST,
    SETTLE,
    SOON,
    WINDOW,
    Line,
    Lines,
    enough,
    worth_having,
)


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

    @pytest.mark.parametrize(
        ("rates", "expected"),
        [({3: 50}, 3), ({2: 49, 3: 50}, 2), ({1: 48, 2: 49, 3: 50}, 1), ({2: 40, 3: 50}, 3)],
    )
    def test_enough(self, rates, expected):
        assert enough(rates) == expected


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


class Downloads:
    """Blobs over a link of ``total`` bytes a second; a connection gets ``each`` at most."""

    def __init__(
        self, sizes: list[int], each: float, total: float, *, most: int | None = None
    ) -> None:
        self.clock = Clock()
        self.lines = Lines(most, clock=self.clock)
        self.ends: dict[int, float] = {}
        self.most_at_once = 0
        self.silent: set[int] = set()
        self.silence_at: dict[int, float] = {}
        self.slower_from = 1e9, 1.0
        self.patient = True
        self.seen_held: set[int] = set()
        self.at_once: list[tuple[float, int]] = []
        self._sizes, self._each, self._total = sizes, each, total
        self._there: dict[int, Line] = {}
        self._done = [asyncio.Event() for _ in sizes]

    async def _one(self, place: int) -> None:
        async with self.lines.one(self._sizes[place]) as line:
            line.patient = self.patient
            self._there[place] = line
            await self._done[place].wait()
            del self._there[place]

    def held(self) -> list[int]:
        return [place for place, line in self._there.items() if not line.go.is_set()]

    async def run(self, seconds: float = 1000.0) -> None:
        """Let all of them come, or as much as comes in so many seconds."""
        began = self.clock.now
        async with asyncio.TaskGroup() as group:
            self.tasks = [group.create_task(self._one(place)) for place in range(len(self._sizes))]
            await self._until(began + seconds)
            for task in self.tasks:
                task.cancel()
        self.ends = {place: end - began for place, end in self.ends.items()}

    async def cancel(self, place: int) -> None:
        """Cancel one, which is forgotten then."""
        self.tasks[place].cancel()
        await asyncio.wait([self.tasks[place]])
        del self._there[place]

    async def _until(self, end: float) -> None:
        while len(self.ends) < len(self._sizes) and self.clock.now < end:
            for _ in range(4):
                await asyncio.sleep(0)
            moving = {p: line for p, line in self._there.items() if line.go.is_set()}
            self.seen_held.update(self.held())
            self.at_once.append((self.clock.now, len(moving)))
            self.most_at_once = max(self.most_at_once, len(moving))
            quiet = {p for p, time in self.silence_at.items() if self.clock.now >= time}
            bringing = {p: m for p, m in moving.items() if p not in self.silent | quiet}
            self.clock.now += 0.05
            slower = self.slower_from[1] if self.clock.now >= self.slower_from[0] else 1.0
            for place, line in bringing.items():
                line.came(int(0.05 * slower * min(self._each, self._total / len(bringing))))
                if line.left <= 0:
                    self.ends[place] = self.clock.now
                    self._done[place].set()


# As the layers of an image are.
SIZES = [115_000, 206_000, 237_000, 200_000, 112_000, 111_000]
# Seconds of the bytes alone, at 50,000 a second.
BYTES = sum(SIZES) / 50_000


async def test_one_after_the_other_where_one_fills_the_link():
    link = Downloads(SIZES, each=50_000, total=50_000)
    await link.run()
    assert max(link.ends.values()) < BYTES + 0.3
    ends = [link.ends[place] for place in range(len(SIZES))]
    assert ends == sorted(ends)
    # What is the last to come has not shared the link with what came before it.
    assert ends[-1] - ends[-2] > 0.9 * SIZES[-1] / 50_000


async def test_two_at_once_where_two_fill_the_link():
    link = Downloads(SIZES, each=25_000, total=50_000)
    await link.run()
    assert max(link.ends.values()) < BYTES * 1.15
    assert link.ends[0] < 1.3 * SIZES[0] / 25_000


async def test_to_find_that_out_costs_little_where_each_brings_more():
    link = Downloads(SIZES, each=10_000, total=1_000_000)
    await link.run()
    assert link.most_at_once == MOST
    usual = Downloads(SIZES, each=10_000, total=1_000_000, most=MOST)
    await usual.run()
    assert max(link.ends.values()) < max(usual.ends.values()) + 2.5


@pytest.mark.parametrize("seconds", [SOON - 1, 2 * LATE + 20])
@pytest.mark.parametrize("blobs", [3, 8])
async def test_none_is_held_where_it_is_too_early_or_too_late(seconds, blobs):
    link = Downloads([int(seconds * 50_000 / blobs)] * blobs, each=50_000, total=50_000)
    async with watched(link, 6.0):
        pass
    assert link.most_at_once >= 3


@asynccontextmanager
async def watched(link: Downloads, seconds: float = 1000.0) -> AsyncIterator[None]:
    """Let blobs come; none may be held at any moment."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(link.run(seconds))
        yield
        while not task.done():
            await asyncio.sleep(0)
            assert not link.held()


async def test_none_is_held_any_more_after_it_went_wrong():
    link = Downloads(SIZES, each=50_000, total=50_000)
    link.lines.hold_no_more()
    async with watched(link):
        pass


async def test_none_is_held_beside_parts():
    link = Downloads([600_000, 600_000], each=50_000, total=50_000)
    async with watched(link, 4.0):
        for _ in range(3):
            await asyncio.sleep(0)
        link.lines._worth = 4  # as if more had been worth a try
        assert link.lines.try_more()
    # What is taken for parts is never given back here.
    assert link.lines.used == 1


async def test_none_is_held_that_could_not_be_continued():
    link = Downloads(SIZES, each=50_000, total=50_000)
    link.patient = False
    async with watched(link):
        pass
    # But those that come after them do not begin before their turn.
    assert link.ends[5] - link.ends[4] > 0.9 * SIZES[5] / 50_000


async def test_none_is_held_where_somebody_chose_a_number():
    link = Downloads(SIZES, each=50_000, total=50_000, most=3)
    async with watched(link):
        pass
    assert link.most_at_once == 3


@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_the_link_is_not_left_to_one_that_brings_nothing(monkeypatch, place):
    """It may wait for another client, who may wait for a blob that we would hold."""
    monkeypatch.setattr(module, "QUIET", 0.001)
    link = Downloads(SIZES, each=50_000, total=50_000)
    link.silent = {place}
    await link.run(200.0)
    assert set(link.ends) == set(range(len(SIZES))) - {place}


async def test_one_that_falls_silent_counts_as_silent():
    link = Downloads([400_000] * 3, each=50_000, total=50_000)
    link.silence_at[0] = 100.75
    await link.run(3.0)
    assert link.seen_held == {2}


async def test_who_is_held_goes_on_when_the_others_fall_silent(monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.001)
    lines = Lines(clock=(clock := Clock()))
    async with lines.one(50_000) as first, lines.one(50_000) as second:
        second.patient = True
        while second.go.is_set():
            clock.now += 0.25
            first.came(1000)
            second.came(1000)
        waiting = asyncio.create_task(second.turn())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        lines._worth = MOST
        assert not lines.more()  # it comes before parts of the other
        assert lines.too_many()
        clock.now += 0.01
        assert await waiting == pytest.approx(0.01)
        # And none is held again, though it would be time.
        assert lines.used == 2
        for _ in range(20):
            clock.now += 0.25
            first.came(1000)
            second.came(1000)
        assert second.go.is_set()


async def test_enough_stays_enough_while_processors_are_busy():
    """As the rate of the link falls for everyone, it is no reason for more at once."""
    link = Downloads(SIZES, each=50_000, total=50_000)
    link.slower_from = 104.0, 0.7
    await link.run()
    ends = [link.ends[place] for place in range(len(SIZES))]
    assert ends == sorted(ends)
    assert max(number for time, number in link.at_once if 104 < time < 118) == 1


async def test_nobody_is_held_for_too_long(monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.001)
    lines = Lines(clock=(clock := Clock()))
    async with lines.one(700_000) as a, lines.one(700_000) as b, lines.one(700_000) as c:
        b.patient = c.patient = True

        def pass_on() -> None:
            clock.now += 0.25
            for line in (one for one in (a, b, c) if one.go.is_set()):
                line.came(12_500 // lines.used)

        while c.go.is_set():
            pass_on()
        began = clock.now
        waiting = asyncio.create_task(c.turn())
        while not waiting.done():
            pass_on()
            await asyncio.sleep(0.002)
            assert clock.now < began + LATE + 5
        assert clock.now > began + LATE
        assert lines.used == 3
        assert not await c.turn()
    assert lines.used == 0


async def test_cancelled_while_held():
    link = Downloads([400_000] * 3, each=50_000, total=50_000)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(link.run())
        while link.held() != [1, 2]:  # noqa: ASYNC110 - the link is a task, too
            await asyncio.sleep(0)
        assert link.lines.used == 1
        await link.cancel(2)
        assert link.held() == [1]
        assert link.lines.used == 1
        await link.cancel(0)
        assert link.held() == []
        assert link.lines.used == 1
        await link.cancel(1)
        task.cancel()
    assert link.lines.used == 0


async def test_who_has_all_bytes_leaves_the_link_to_others():
    lines, _, _ = made(each(10), most=1)
    async with lines.one(10) as first:
        second = asyncio.create_task(lines.one(10).__aenter__())
        await asyncio.sleep(0)
        assert not second.done()
        first.done()
        await second
        assert lines.used == 1
    assert lines.used == 1
