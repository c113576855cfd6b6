"""Pulls whose process, or whose containerd, is killed outright at random moments.

What the registry served is the judge: each blob once, and one chunk more for each kill while it
came.  The seed of a failing test makes the same image and the same moments.
``make chaos`` runs them all, ``make test`` a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serpentine
import serpentine.engine
from serpentine import Engine
from serpentine._session import current_session
from serpentine.containerd import Containerd
from serpentine.containerd.leases import Leases
from serpentine.daemon.embedded import Embedded, Process
from serpentine.errors import Unavailable
from serpentine.events import ignore
from serpentine.pull.leases import LABEL_PULL, LABEL_SESSION, LIFETIME
from tests.conftest import CONTAINERDS
from tests.support.faulty import FaultyRegistry
from tests.support.images import file, image, layer, noise
from tests.support.kills import (
    BANDWIDTH,
    CHUNK,
    IN_A_ROW,
    Killable,
    assert_only,
    series,
    until,
)
from tests.support.servers import ContainerdServer

# What may wait between a fast registry and a containerd that stands still.
AHEAD = CHUNK + CHUNK // 4

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not CONTAINERDS, reason="no containerd: the other tests fail and say so"),
]


@pytest.mark.parametrize("seed", series("SERPENTINE_TEST_KILLS", 10, len(CONTAINERDS)))
async def test_our_process(containerd, namespace, seed):
    """Done when 2."""
    chance = random.Random(f"our process {seed}")
    environ = {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}

    async def start(reference: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serpentine", "pull", "--quiet", reference),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environ,
        )

    kills = 0
    with FaultyRegistry(bandwidth=BANDWIDTH) as registry:
        # As a rule one image is enough; a moment at its end may be missed.
        for number in range(20):
            if kills == IN_A_ROW:
                break
            made = Killable.made(chance)
            reference = registry.add(made.image, f"killed/process{number}", "1")
            allowed: list[dict[str, int]] = []
            while True:
                process = await start(reference)
                if kills < IN_A_ROW and await made.moment(
                    registry, chance, lambda p=process: p.returncode is not None
                ):
                    may = await made.allowance(containerd.endpoint, namespace)
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        process.kill()
                _, err = await process.communicate()
                if process.returncode != -9:
                    break
                kills += 1
                allowed.append(may)
                await asyncio.to_thread(registry.settle)
            assert process.returncode == 0, err
            await asyncio.to_thread(registry.settle)
            made.judge(registry, allowed)
            await assert_only(containerd.endpoint, namespace, reference, made)
    assert kills == IN_A_ROW


async def test_our_process_far_ahead_of_containerd(containerd, namespace):
    """It takes from a fast registry about a chunk, and no more, beyond what containerd has got.

    A containerd that stands still is the worst there is: one that runs takes what waits for it.
    """
    environ = {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}
    made = layer([file("file", noise("ahead", 16_000_000))], compression="none")
    with FaultyRegistry() as registry:
        reference = registry.add(image([made]), "killed/ahead", "1")
        for _ in range(IN_A_ROW):
            before = registry.served(made.digest)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serpentine", "pull", "--quiet", reference), env=environ
            )
            await until(lambda start=before: registry.served(made.digest) > start + 2_000_000)
            with stopped(containerd.pid):
                # Until nothing moves: all that can wait on the way does.
                last = -1
                while last != (last := registry.served(made.digest)):  # noqa: ASYNC110
                    await asyncio.sleep(0.3)
                process.kill()
                await process.wait()
            await asyncio.to_thread(registry.settle)
            async with Containerd(containerd.endpoint, namespace=namespace) as client:
                [ingest] = await client.content.list_statuses()
            _, reached = registry.ranges(made.digest)[-1]
            assert 0 < reached - ingest.offset <= AHEAD
        async with containerd.connect(namespace=namespace) as engine:
            await engine.pull_image(reference)
        assert registry.served(made.digest) <= len(made.blob) + IN_A_ROW * AHEAD


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(params=CONTAINERDS)
def embedded(request, monkeypatch):
    """A containerd of our own in directories of the test's own; always stopped in the end."""
    base = Path(tempfile.mkdtemp(prefix="spt-"))
    base.chmod(0o711)
    monkeypatch.setenv("PATH", f"{CONTAINERDS[request.param].parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SERPENTINE_DATA_DIR", str(base / "data"))
    monkeypatch.setenv("SERPENTINE_RUN_DIR", str(base / "run"))
    daemon = Embedded(base / "data", base / "run")
    yield daemon
    asyncio.run(daemon.stop())
    shutil.rmtree(base)


@pytest.mark.parametrize("seed", series("SERPENTINE_TEST_DAEMON_KILLS", 4, len(CONTAINERDS)))
async def test_our_containerd(embedded, seed):
    """Done when 3: the pull itself brings it back and goes on."""
    chance = random.Random(f"our daemon {seed}")
    kills = 0

    async def pull_and_kill(engine: Engine, number: int) -> int:
        """Pull an image; return how often its containerd was killed meanwhile."""
        made = Killable.made(chance)
        reference = registry.add(made.image, f"killed/daemon{number}", "1")
        killed: list[Process] = []
        allowed: list[dict[str, int]] = []
        pull = asyncio.create_task(engine.pull_image(reference))
        while kills + len(killed) < IN_A_ROW and await made.moment(registry, chance, pull.done):
            process = embedded.process()
            assert process is not None
            allowed.append(await made.allowance(embedded.endpoint, "serpentine"))
            os.kill(process.pid, 9)
            killed.append(process)
            await until(lambda: pull.done() or embedded.process() not in (None, *killed))
        await pull
        await asyncio.to_thread(registry.settle)
        made.judge(registry, allowed)
        # Killed when the pull was just done, it is down.
        await embedded.start(on_event=ignore)
        await assert_only(embedded.endpoint, "serpentine", reference, made)
        return len(killed)

    with FaultyRegistry(bandwidth=BANDWIDTH) as registry:
        async with serpentine.connect() as engine:
            for number in range(20):
                if kills < IN_A_ROW:
                    kills += await pull_and_kill(engine, number)
    assert kills == IN_A_ROW


async def kill(daemon: Embedded) -> None:
    def ended() -> None:
        process = daemon.process()
        assert process is not None
        os.kill(process.pid, 9)
        while process.is_alive():
            pass

    # In a thread: nothing that a pull waits for may block.
    await asyncio.to_thread(ended)


async def test_our_containerd_when_all_is_done(embedded, monkeypatch):
    """At the very end, when only the leases have to go, this pull's and an earlier one's."""
    killed = []
    delete = Leases.delete

    async def delete_late(self: Leases, lease_id: str, **more: bool) -> None:
        if lease_id not in killed:
            killed.append(lease_id)
            await kill(embedded)
        await delete(self, lease_id, **more)

    async def leave_a_lease(engine: Engine, reference: str) -> None:
        labels = {LABEL_PULL: reference, LABEL_SESSION: current_session()}
        await engine.containerd.leases.create("earlier", expires=LIFETIME, labels=labels)

    monkeypatch.setattr(Leases, "delete", delete_late)
    await pull_and_look(embedded, before=leave_a_lease)
    assert len(killed) == 2
    assert killed[1] == "earlier"


async def test_our_containerd_while_it_is_brought_back(embedded, monkeypatch):
    """It goes away again before the pull has a connection to it."""
    found = 0
    find = serpentine.engine.find

    async def find_dying(*arguments: Any, **more: Any) -> Any:
        nonlocal found
        daemon = await find(*arguments, **more)
        found += 1
        if found == 2:
            await kill(embedded)
        return daemon

    monkeypatch.setattr(serpentine.engine, "find", find_dying)
    await pull_and_look(embedded, meanwhile=lambda: kill(embedded))
    assert found == 3


async def pull_and_look(
    embedded: Embedded,
    *,
    before: Callable[[Engine, str], Awaitable[None]] | None = None,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Pull an image and judge it, with something done before, or in the middle."""
    made = Killable.made(random.Random("at a certain moment"))
    with FaultyRegistry(bandwidth=BANDWIDTH if meanwhile else None) as registry:
        reference = registry.add(made.image, "killed/certain", "1")
        allowed = []
        async with serpentine.connect() as engine:
            if before is not None:
                await before(engine, reference)
            pull = asyncio.create_task(engine.pull_image(reference))
            if meanwhile is not None:
                await until(lambda: made.served(registry) > made.size // 2)
                allowed.append(await made.allowance(embedded.endpoint, "serpentine"))
                await meanwhile()
            await pull
        await asyncio.to_thread(registry.settle)
        made.judge(registry, allowed)
        await assert_only(embedded.endpoint, "serpentine", reference, made)


@pytest.mark.parametrize("version", CONTAINERDS)
async def test_somebody_elses_containerd(version):
    """Done when 3: it is not ours to start; once somebody has, a pull goes on where one stopped."""
    made = Killable.made(random.Random(f"somebody else's {version}"))
    with (
        ContainerdServer(CONTAINERDS[version]) as server,
        FaultyRegistry(bandwidth=BANDWIDTH) as registry,
    ):
        reference = registry.add(made.image, "killed/foreign", "1")
        async with server.connect() as engine:
            pull = asyncio.create_task(engine.pull_image(reference))
            await until(lambda: made.served(registry) > made.size // 2)
            may = await made.allowance(server.endpoint, "serpentine")
            server.kill()
            with pytest.raises(Unavailable) as caught:
                await pull
        assert caught.value.hint == "start it, then pull again: it goes on from there"
        told = str(caught.value)
        assert told.startswith(f"{reference}: containerd at ")
        assert server.address in told
        assert "\n" not in told
        server.start()
        async with server.connect() as engine:
            await engine.pull_image(reference)
        await asyncio.to_thread(registry.settle)
        made.judge(registry, [may])
        await assert_only(server.endpoint, "serpentine", reference, made)
