"""Pulls from a registry that misbehaves by seeded schedules, judged by that one's own record.

For every fault, at every position, the pull succeeds and has fetched again at most one chunk for
each fault, or it ends soon with an error that names what it was about, and the next attempt
continues.  ``make chaos`` runs a thousand seeds, ``make test`` a slice of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from serpentine.errors import ImageError, RegistryError
from serpentine.pull import fetch
from serpentine.registry import retry, transport
from serpentine.settings import Settings
from tests.support.faulty import FaultyRegistry, describe, random_schedule
from tests.support.images import file, image, layer, noise

CHUNK = 1 << 20
SEEDS = range(int(os.environ.get("SERPENTINE_TEST_CHAOS", "24")))
# Each fault may cost an attempt; after the last one there is none left to fail.
MAX_ATTEMPTS = 8
# With the times below, an attempt that takes longer hangs.
BOUND = 60.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def impatient(monkeypatch):
    """Waits that suit a registry on loopback."""
    monkeypatch.setattr(fetch, "WINDOW", 0.4)
    monkeypatch.setattr(fetch, "RETRY_DELAYS", (0.01, 0.02, 0.05, 0.1, 0.2))
    monkeypatch.setattr(retry, "DELAYS", (0.02, 0.05, 0.1))
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT", 1.0)


def shaped(chance: random.Random):
    """An image of some shape: layers from nothing to some megabytes."""
    sizes = [
        chance.choice([0, 1, 20_000, 700_000, chance.randrange(1, 6_000_000)])
        for _ in range(chance.randint(1, 5))
    ]
    return image([layer([file("a", noise(chance.random(), size))]) for size in sizes])


@pytest.mark.parametrize("seed", SEEDS)
async def test_faults(containerd, namespace, contents, tmp_path, impatient, seed):
    """Done when 1."""
    chance = random.Random(f"shape {seed}")
    made = shaped(chance)
    content, tokens = chance.random() < 0.4, chance.random() < 0.3
    with FaultyRegistry(content=content, tokens=tokens) as registry:
        reference = registry.add(made, "chaos/image", "1")
        plan = random_schedule(seed, made, hosts=list(registry.hosts))
        registry.faults = plan
        settings = Settings(
            address=containerd.address,
            namespace=namespace,
            stall_timeout=0.4,
            data_dir=tmp_path,
            max_concurrent_downloads=chance.randint(1, 4),
        )
        where = f"seed {seed}, of which these fired:\n"
        state = None
        for _ in range(MAX_ATTEMPTS):
            began = time.monotonic()
            async with containerd.connect(settings=settings) as engine:
                try:
                    state = await engine.pull_image(reference)
                except (RegistryError, ImageError) as error:
                    failure = str(error)
                else:
                    break
            took = time.monotonic() - began
            where_now = where + describe(registry.fired) + f"\nfailed with: {failure}"
            assert took < BOUND, where_now
            assert reference in failure, where_now
            assert "127.0.0.1" in failure.replace(reference, ""), where_now
            left = await contents()
            assert not [s for s in left.snapshots if s.startswith("extract")], where_now
            assert left.images == [], where_now
        assert state is not None, where + describe(registry.fired)
        await asyncio.to_thread(registry.settle)
        fired = registry.fired
        where += describe(fired)
        now = await contents()
        assert (now.leases, now.ingests) == ([], []), where
        assert state.snapshot_key in now.snapshots
        sizes = {digest: len(data) for digest, data in made.blobs.items()}
        again = {digest: registry.served_again(digest) for digest in sizes}
        allowed = CHUNK * len(fired)
        # Wrong bytes are found at the end only.
        allowed += max(sizes.values()) * sum(fault.spoils for fault in fired)
        assert sum(again.values()) <= allowed, f"{again} of {sizes}, {where}"
