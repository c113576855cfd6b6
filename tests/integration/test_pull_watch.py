"""The watch on each download, and the patience that a registry asks for.

The registry's record of requests is the judge, at the real times: with the settings that everybody
has, a stalled download is noticed after some seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import subprocess
import sys
import time
import uuid

import pytest

import serpentine
from serpentine.errors import RateLimited
from serpentine.events import Event, PullPlanned
from serpentine.settings import load
from tests.conftest import CONTAINERDS, newest
from tests.support.faulty import REGISTRY, Fault, FaultyRegistry, Request, Where
from tests.support.images import Layer, file, image, layer, noise
from tests.support.kills import until
from tests.support.servers import ContainerdServer

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not CONTAINERDS, reason="no containerd: the other tests fail and say so"),
]


@pytest.fixture(scope="module")
def server():
    """One containerd: what is tested here is not its part."""
    with ContainerdServer(newest() / "containerd") as started:
        yield started


def layers(*sizes: int, seed: object = 0) -> list[Layer]:
    return [
        layer([file(f"file{number}", noise((seed, number), size))], compression="none")
        for number, size in enumerate(sizes)
    ]


# --- the watch -------------------------------------------------------------------------------

STALLS_AT = 100_000
# The first is still on its way when the third is given up after eight seconds; the others begin
# before and after that.
SPEED = 300_000
SIZES = (3_400_000, 900_000, 1_200_000, 500_000, 400_000)
BAD = 2


async def pull_with(server: ContainerdServer, fault: Fault) -> list[Request]:
    """Pull five layers with a fault in the third; return the two requests for that one.

    All others are asked for once, and every byte is served once.
    """
    made = layers(*SIZES, seed=fault.kind)
    given = {"address": server.address, "namespace": f"watch-{uuid.uuid4().hex[:8]}"}
    # A number, so that none is held for the others: they share the link to the end.
    given["max_concurrent_downloads"] = 3
    with FaultyRegistry(faults=[fault], bandwidth=SPEED) as registry:
        reference = registry.add(image(made), "watch/five", "1")
        async with serpentine.connect(settings=load(given)) as engine:
            await engine.pull_image(reference)
        await asyncio.to_thread(registry.settle)
        assert registry.fired == [fault]
        asked = [registry.seen(one.digest) for one in made]
        assert [len(one) for one in asked] == [1, 1, 2, 1, 1], fault
        assert [registry.served(one.digest) for one in made] == [len(one.blob) for one in made]
        first, second = asked[BAD]
        assert first.end is not None
        assert abs(first.end - second.arrival) < 1, "it was not given up, but ended"
        (other,) = asked[0]
        assert other.end is not None
        assert other.end > second.arrival, "the first was done too soon to be disturbed"
        return [first, second]


async def test_one_of_five_layers_stalls(server):
    """Done when 4.  Three ways to stall, side by side, for each takes its time."""
    where = Where("blob", BAD)
    async with asyncio.TaskGroup() as group:
        stalled, trickling, silent = [
            group.create_task(pull_with(server, fault))
            for fault in (
                Fault("stall", where, offset=STALLS_AT),
                Fault("trickle", where, offset=STALLS_AT, seconds=1.0),
                Fault("silent", where),
            )
        ]
    first, second = stalled.result()
    assert second.range == f"bytes={STALLS_AT}-"
    # From the request on, and so a little more than from the last byte on.
    assert second.arrival - first.arrival < 10

    first, second = trickling.result()
    # With the bytes that came meanwhile, one a second.
    assert second.range == f"bytes={first.sent}-"
    assert STALLS_AT < first.sent < STALLS_AT + 15
    assert second.arrival - first.arrival < 15

    first, second = silent.result()
    assert (first.status, second.range) == (None, None)
    assert second.arrival - first.arrival < 10


# --- patience --------------------------------------------------------------------------------

# Long enough for another process to be up before it is over.
PATIENCE = 4


@contextlib.asynccontextmanager
async def command(server: ContainerdServer, *arguments: str, namespace: str):
    """Start the command line beside us, with the same data directory."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serpentine", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **server.environ, "CONTAINERD_NAMESPACE": namespace},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
async def test_nobody_asks_before_the_time(server, date):
    """Done when 5: not the other layers, not another process."""
    small = layers(50_000, 50_000, 50_000, 60_000, 70_000, seed=date)
    plan = [Fault("status", Where("blob", BAD), status=429, seconds=PATIENCE, date=date)]
    # None of the others is there before that one is refused, and leaves its place to a fourth.
    plan += [Fault("slow", Where("blob", n), seconds=1.0) for n in range(len(small)) if n != BAD]
    namespace = f"patience-{uuid.uuid4().hex[:8]}"
    with FaultyRegistry(faults=plan) as registry:
        host = registry.hosts[REGISTRY]

        def on_event(event: Event) -> None:
            if isinstance(event, PullPlanned):
                # So the three that are asked for at once are all on their way when one is refused.
                host.latency = 0.6

        reference = registry.add(image(small), "patience/one", "1")
        other = registry.add(image(layers(10_000, seed=("other", date))), "patience/two", "1")
        async with server.connect(namespace=namespace) as engine:
            pull = asyncio.create_task(engine.pull_image(reference, on_event=on_event))
            await until(lambda: any(r.end for r in registry.requests if r.status == 429))
            host.latency = 0.0
            async with command(server, "pull", "-q", other, namespace=namespace) as process:
                (refused,) = [r for r in registry.requests if r.status == 429]
                assert time.monotonic() - refused.end < 1, "the other process is started too late"
                await pull
                _, err = await process.communicate()
                assert process.returncode == 0, err
        until_when = refused.end + PATIENCE
        if date:
            # In full seconds, rounded up, of the other clock.
            wall = time.time() - time.monotonic()
            until_when = math.ceil(refused.arrival + wall + PATIENCE) - wall
        after = [r for r in registry.requests if r.arrival > refused.end]
        early = [(r.method, r.target, r.arrival - until_when) for r in after]
        assert min(wait for *_, wait in early) >= 0, early
        # The three are asked for before, and all else was waiting for the time to come.
        before = [r for r in registry.requests if r.what == "blob" and r not in after]
        assert len(before) == 3
        assert [r.path for r in after if r.digest == small[BAD].digest] == [refused.path]
        assert {r.path.split("/blobs/")[0] for r in after if r.what == "blob"} == {
            "/v2/patience/one",
            "/v2/patience/two",
        }
        # And came soon after it.
        assert min(wait for *_, wait in early) < 2, early


async def test_too_long_a_time_is_an_error_that_names_it(server):
    """Done when 5: beyond a minute nobody waits, and the next command does not even ask."""
    small = layers(50_000, 50_000, 50_000, seed="long")
    plan = [Fault("status", Where("blob", 1), status=429, seconds=600)]
    namespace = f"patience-{uuid.uuid4().hex[:8]}"
    with FaultyRegistry(faults=plan) as registry:
        reference = registry.add(image(small), "patience/long", "1")
        began = time.monotonic()
        async with server.connect(namespace=namespace) as engine:
            with pytest.raises(RateLimited) as caught:
                await engine.pull_image(reference)
        assert time.monotonic() - began < 5
        assert caught.value.retry_after == 600
        assert caught.value.hint == "try again in 600 seconds"
        assert str(caught.value).startswith(f"{reference}: ")
        assert registry.address in str(caught.value).removeprefix(reference)
        await asyncio.to_thread(registry.settle)
        asked = len(registry.requests)
        async with command(server, "pull", "-q", reference, namespace=namespace) as process:
            _, err = await process.communicate()
        assert process.returncode == 1
        assert len(registry.requests) == asked
        assert err.decode().count("\n") == 1
        assert err.decode().startswith(f"serpentine: {reference}: ")
        found = re.search(r"try again in (\d+) seconds", err.decode())
        assert found, err
        assert 580 < int(found[1]) <= 600
