"""Moments of a pull at which something is killed, and how what came of it is judged."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serpentine.containerd import Containerd, Endpoint
from tests.support.faulty import FaultyRegistry
from tests.support.images import Image, Layer, file, image, layer, noise

# What may be fetched again for each kill, of each blob.
CHUNK = 1 << 20
# Of each connection, in bytes per second: a pull takes long enough to be met in the middle.
BANDWIDTH = 3_000_000
# Of one pull: a second kill meets what the first one left.
IN_A_ROW = 2
MIDDLE = 0.7


def series(variable: str, default: int, ways: int) -> range:
    """Return the seeds of so many kills, ``IN_A_ROW`` in each, on each of so many ways."""
    kills = int(os.environ.get(variable, str(default)))
    return range(-(-kills // (IN_A_ROW * max(1, ways))))


@dataclass(frozen=True)
class Killable:
    """An image of some layers, one of them many chunks long."""

    image: Image
    layers: list[Layer]

    @classmethod
    def made(cls, chance: random.Random) -> Killable:
        sizes = [chance.randrange(4_000_000, 5_000_000), chance.randrange(1_500_000, 2_500_000)]
        sizes += [chance.randrange(1, 1_000_000) for _ in range(3)]
        chance.shuffle(sizes)
        layers = [
            layer(
                [file(f"file{number}", noise(chance.random(), size))],
                compression=chance.choice(["gzip", "none"]),
            )
            for number, size in enumerate(sizes)
        ]
        return cls(image(layers), layers)

    @property
    def size(self) -> int:
        return sum(len(one.blob) for one in self.layers)

    def served(self, registry: FaultyRegistry) -> int:
        """Return how many bytes of the layers were served so far."""
        return sum(registry.served(one.digest) for one in self.layers)

    async def moment(
        self, registry: FaultyRegistry, chance: random.Random, over: Callable[[], bool]
    ) -> bool:
        """Wait for a random moment of a pull that begins now; tell whether it came in time.

        Before the first bytes, at some byte, or while the last ones are unpacked and recorded;
        the last kind may come too late.  over: whether the pull has ended.
        """
        kind, part = chance.random(), chance.random()
        requests, before = len(registry.requests), self.served(registry)
        pause, target = 0.0, before
        if kind < MIDDLE:
            target = before + round(part * max(0, self.size - before))
        elif kind < (1 + MIDDLE) / 2:
            pause = part * 0.1
        else:
            pause, target = part * 0.1, self.size
        while len(registry.requests) == requests or self.served(registry) < target:
            if over():
                return False
            await asyncio.sleep(0.002)
        await asyncio.sleep(pause)
        return not over()

    async def allowance(self, endpoint: Endpoint, namespace: str) -> dict[str, int]:
        """Return how much of each blob may come again because of a kill that happens now."""
        async with Containerd(endpoint, namespace=namespace) as client:
            whole = {str(one.digest) for one in await client.content.all()}
        return {digest: 0 if digest in whole else CHUNK for digest in self.image.blobs}

    def judge(self, registry: FaultyRegistry, kills: Sequence[dict[str, int]]) -> None:
        """Hold what was served of each blob against what may have been; kills: their allowances."""
        for digest, data in self.image.blobs.items():
            served = registry.served(digest)
            most = len(data) + sum(allowed[digest] for allowed in kills)
            told = f"{served} of {len(data)} bytes, {registry.ranges(digest)}, at most {most}"
            assert len(data) <= served <= most, told


async def assert_only(endpoint: Endpoint, namespace: str, reference: str, made: Killable) -> None:
    """The namespace holds this image, unpacked, and nothing else; without it, nothing."""
    async with Containerd(endpoint, namespace=namespace) as client:

        async def held() -> list[list[str]]:
            return [
                sorted(one.name for one in await client.images.all()),
                sorted(one.id for one in await client.leases.all()),
                sorted(one.ref for one in await client.content.list_statuses()),
                sorted(str(one.digest) for one in await client.content.all()),
                [one.name for one in await snapshots.all() if one.kind.name != "COMMITTED"],
            ]

        snapshots = client.snapshots("overlayfs")
        blobs = sorted([made.image.digest, *made.image.blobs])
        assert await held() == [[reference], [], [], blobs, []]
        assert len(await snapshots.all()) == len(made.layers)
        await client.images.delete(reference, sync=True)
        assert await held() == [[], [], [], [], []]
        assert await snapshots.all() == []


async def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something is so that nobody tells."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came about"
        await asyncio.sleep(0.002)
