"""Our containerd in a real Docker is killed outright in the middle of pulls, which go on."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from serpentine.containerd import Endpoint
from tests.support.faulty import FaultyRegistry
from tests.support.kills import BANDWIDTH, IN_A_ROW, Killable, assert_only, series

pytestmark = pytest.mark.timeout(240)


def pid_of(serpentine) -> int:
    """Return containerd's process as this machine numbers it; 0 if it is down."""
    return serpentine.state()["State"]["Pid"]


@pytest.mark.parametrize("engine_server", ["docker"], indirect=True)
@pytest.mark.parametrize("seed", series("SERPENTINE_TEST_DAEMON_KILLS", 2, 1))
async def test_killed_at_random_moments(serpentine, ours, seed):
    """Done when 3."""
    chance = random.Random(f"our container {seed}")
    kills = 0
    found = await asyncio.to_thread(serpentine.done, "daemon", "start", "--json")
    endpoint = Endpoint.parse(found.json["endpoint"])

    async def pull_and_kill(number: int) -> int:
        """Pull an image; return how often its containerd was killed meanwhile."""
        made = Killable.made(chance)
        reference = registry.add(made.image, f"killed/container{number}", "1")
        killed: list[int] = []
        allowed: list[dict[str, int]] = []
        pull = serpentine.start("pull", "--quiet", reference)
        ended = asyncio.create_task(asyncio.to_thread(pull.wait))

        async def comes_back() -> None:
            while not ended.done() and await asyncio.to_thread(pid_of, serpentine) in (0, *killed):
                pass

        await comes_back()
        while kills + len(killed) < IN_A_ROW:
            pid = await asyncio.to_thread(pid_of, serpentine)
            if not await made.moment(registry, chance, ended.done):
                break
            allowed.append(await made.allowance(endpoint, "serpentine"))
            os.kill(pid, 9)
            killed.append(pid)
            await comes_back()
        done = await asyncio.to_thread(serpentine.wait, pull)
        await ended
        assert done.status == 0, done.err
        await asyncio.to_thread(registry.settle)
        made.judge(registry, allowed)
        # Killed when the pull was just done, it is down.
        await asyncio.to_thread(serpentine.done, "daemon", "start")
        await assert_only(endpoint, "serpentine", reference, made)
        return len(killed)

    with FaultyRegistry(bandwidth=BANDWIDTH) as registry:
        for number in range(20):
            if kills < IN_A_ROW:
                kills += await pull_and_kill(number)
    assert kills == IN_A_ROW
