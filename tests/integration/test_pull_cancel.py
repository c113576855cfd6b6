"""Cancelled or killed anywhere, a pull leaves what the next one goes on with, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from serpentine._session import current_session
from serpentine.containerd.channel import Channel
from serpentine.containerd.content import ContentWriter
from serpentine.events import LayerProgress, LayerStatus
from serpentine.registry.transport import Transport
from tests.support.contents import NOTHING
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import file, image, index, layer, noise


@pytest.fixture
def fake():
    with FakeRegistry() as registry:
        yield registry


def made(seed: object = 0):
    part = image([layer([file("a", noise(seed, 1_500_000))]), layer([file("b", str(seed))])])
    return index([(part, part.descriptor("linux/amd64"))])


class CancelAtCall:
    """Cancels a task when the n-th call to containerd or a registry is about to be made."""

    def __init__(self, monkeypatch, number: int) -> None:
        self.number = number
        self.calls = 0
        self.task: asyncio.Task | None = None
        for owner, name in (
            (Channel, "unary"),
            (ContentWriter, "_send"),
            (ContentWriter, "_answer"),
            (Transport, "send"),
        ):
            self._wrap(monkeypatch, owner, name)

    def _wrap(self, monkeypatch, owner, name) -> None:
        original = getattr(owner, name)

        def counted(*arguments, **more):
            if self.task is not None:
                self.calls += 1
                if self.calls == self.number:
                    self.task.cancel()
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def resumable(contents):
    """Return a function that looks at what a broken pull has left, and tells if that is anything.

    It is no more than can be gone on with.  ours: whether that was a pull of this process.
    """

    async def look(engine, *, ours=True):
        left = await contents()
        assert not [name for name in left.snapshots if name.startswith("extract")]
        if not left.leases:
            assert left == NOTHING
            return False
        (lease,) = await engine.containerd.leases.all()
        # It goes by itself, and the next pull knows whose it was.
        assert "containerd.io/gc.expire" in lease.labels
        assert (lease.labels["io.serpentine/session"] == current_session()) is ours
        assert left.ingests or left.blobs, "nothing worth keeping"
        assert left.images == []
        return True

    return look


@pytest.mark.timeout(300)
async def test_cancelled_at_every_call(
    containerd, namespace, fake, contents, monkeypatch, resumable
):
    """Done when 6: from the first request to the last label, at each call in turn."""

    reference = fake.add("cancel/calls", "1", made())
    number = kept = 0
    while True:
        number += 1
        with monkeypatch.context() as patch:
            cancel = CancelAtCall(patch, number)
            async with containerd.connect(namespace=namespace) as engine:
                cancel.task = task = asyncio.create_task(engine.pull_image(reference))
                await asyncio.wait([task])
                cancel.task = None
            # What is grpcio's own ends in a turn or two of the loop.
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others, timeout=0.5)
            assert len(asyncio.all_tasks()) == 1, "a task was left behind"
        if not task.cancelled():
            break
        async with containerd.connect(namespace=namespace) as engine:
            if not (await contents()).images:
                # (Otherwise the image stood already when the cancellation arrived.)
                if not await resumable(engine):
                    continue
                kept += 1
            await engine.pull_image(reference)
            left = await contents()
            assert (left.leases, left.ingests) == ([], []), f"after call {number}"
            await engine.remove_image(reference)
        assert await contents() == NOTHING, f"after call {number}"
    assert number > 30, "the cancellations did not reach far into the pull"
    assert kept > 10, "nothing was kept to go on with"
    assert task.result().snapshot_key in (await contents()).snapshots


@pytest.mark.parametrize(
    "stage", [LayerStatus.DOWNLOADING, LayerStatus.DOWNLOADED, LayerStatus.APPLYING]
)
async def test_cancelled_while_a_layer_is(engine, fake, contents, stage, resumable):
    task = None

    def on_event(event):
        if getattr(event, "status", None) is stage:
            task.cancel()

    reference = fake.add("cancel/stage", "1", made(stage))
    task = asyncio.create_task(engine.pull_image(reference, on_event=on_event))
    await asyncio.wait([task])
    assert task.cancelled()
    assert await resumable(engine) or stage is LayerStatus.DOWNLOADING
    await engine.pull_image(reference)
    left = await contents()
    assert (left.leases, left.ingests) == ([], [])


async def test_cancelled_while_the_registry_says_nothing(engine, fake, contents):
    reference = fake.add("cancel/silent", "1", made("silent"))
    digest, data = max(fake.blobs.items(), key=lambda item: len(item[1]))
    fake.on(f"GET .*{digest}", Answer(body=data, gate=fake.gate()))
    arrived = asyncio.Event()

    def on_event(event):
        if getattr(event, "status", None) is LayerStatus.DOWNLOADING:
            arrived.set()

    task = asyncio.create_task(engine.pull_image(reference, on_event=on_event))
    await arrived.wait()
    task.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([task])
    assert task.cancelled()
    assert await contents() == NOTHING


async def test_a_cancelled_leader_hands_over(engine, fake, contents):
    """Two pulls of one image; the one that downloads is cancelled, the other one finishes."""
    reference = fake.add("cancel/leader", "1", made("leader"))
    digest, data = max(fake.blobs.items(), key=lambda item: len(item[1]))
    stalled = [Answer(body=data, gate=fake.gate())]
    fake.on(f"GET .*{digest}", lambda _: stalled.pop() if stalled else None)
    downloading = asyncio.Event()

    def on_event(event):
        if not isinstance(event, LayerProgress) or event.digest != digest:
            return
        if event.status is LayerStatus.DOWNLOADING:
            downloading.set()

    leader = asyncio.create_task(engine.pull_image(reference, on_event=on_event))
    await downloading.wait()
    while stalled:  # noqa: ASYNC110 - the fake runs in a thread
        await asyncio.sleep(0)
    follower = asyncio.create_task(engine.pull_image(reference))
    while len(fake.requests("HEAD")) < 2:  # noqa: ASYNC110 - the fake runs in a thread
        await asyncio.sleep(0)
    leader.cancel()
    state = await follower
    assert leader.cancelled() or await asyncio.wait([leader])
    now = await contents()
    assert state.snapshot_key in now.snapshots
    assert (now.leases, now.ingests) == ([], [])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
async def test_a_signal_to_the_command(
    containerd, namespace, fake, contents, engine, resumable, number, status
):
    reference = fake.add("cancel/signal", "1", made("signal"))
    digest, data = max(fake.blobs.items(), key=lambda item: len(item[1]))
    stalled = [Answer(body=data, gate=fake.gate())]
    fake.on(f"GET .*{digest}", lambda _: stalled.pop() if stalled else None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serpentine", "pull", "--progress", "plain", reference),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            **containerd.environ,
            "CONTAINERD_NAMESPACE": namespace,
        },
    )
    while not fake.requests(f"GET .*{digest}"):  # noqa: ASYNC110 - the fake runs in a thread
        await asyncio.sleep(0)
    process.send_signal(number)
    out, err = await process.communicate()
    assert process.returncode == status, err
    assert out == b""
    assert b"Traceback" not in err
    await resumable(engine, ours=False)
    await engine.pull_image(reference)
    left = await contents()
    assert (left.leases, left.ingests) == ([], [])


async def test_killed_outright_only_the_lease_is_left(
    containerd, namespace, fake, contents, engine
):
    """kill -9: what it held stays under its lease, which expires; the next pull ends with it."""
    reference = fake.add("cancel/killed", "1", made("killed"))
    digest, data = max(fake.blobs.items(), key=lambda item: len(item[1]))
    stalled = [Answer(body=data, gate=fake.gate())]
    fake.on(f"GET .*{digest}", lambda _: stalled.pop() if stalled else None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serpentine", "pull", "--progress", "plain", reference),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            **containerd.environ,
            "CONTAINERD_NAMESPACE": namespace,
        },
    )
    while not fake.requests(f"GET .*{digest}"):  # noqa: ASYNC110 - the fake runs in a thread
        await asyncio.sleep(0)
    process.kill()
    await process.communicate()
    left = await contents()
    assert len(left.leases) == 1
    lease = (await engine.containerd.leases.all())[0]
    assert "containerd.io/gc.expire" in lease.labels
    state = await engine.pull_image(reference)
    assert state.snapshot_key in (await contents()).snapshots
    now = await contents()
    assert (now.leases, now.ingests) == ([], [])
