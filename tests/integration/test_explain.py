"""What a pull leaves to be told of it: after success, failure, cancellation and resumption."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serpentine.containerd.content import MESSAGE_SIZE
from serpentine.errors import DigestMismatch, NotFound, RegistryNotFound
from serpentine.events import LayerProgress, LayerStatus, PullFailed
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import file, image, layer, noise, push

MiB = 1 << 20


@pytest.fixture
def fake():
    with FakeRegistry() as server:
        yield server


def made(name: str, size: int = 3 * MiB):
    return image(
        [
            layer([file("small", noise(name, 10_000))]),
            layer([file("large", noise(f"{name} large", size))], compression="none"),
        ]
    )


def pulls(engine) -> list[Path]:
    return sorted((engine.settings.data_dir / "pulls").glob("*"))


async def test_a_pull_and_what_there_was_already(engine, registry):
    one = made("first")
    other = image([layer([file("small", noise("first", 10_000))]), layer([file("new", "new")])])
    first = push(registry, "explain/first", "1", one)
    second = push(registry, "explain/second", "1", other)
    state = await engine.pull_image(first)
    await engine.pull_image(second)
    record = await engine.explain(first)
    layers = json.loads(one.data)["layers"]
    assert (record.outcome, record.platform, record.pull) == ("done", "linux/amd64", "always")
    assert record.namespace == engine.settings.namespace
    assert record.manifest_digest == state.manifest_digest
    assert [x.found for x in record.layers] == ["nothing", "nothing"]
    assert [x.digest for x in record.layers] == [x["digest"] for x in layers]
    assert all(x.unpack_seconds is not None for x in record.layers)
    assert [[(y.host, y.size) for y in x.fetched] for x in record.layers] == [
        [(registry.address, x["size"])] for x in layers
    ]
    assert record.size_fetched == sum(x["size"] for x in layers)
    (host,) = record.hosts
    assert (host.host, host.size, host.requests) == (registry.address, record.size_fetched, 2)
    assert 0 < host.seconds <= record.seconds

    last = await engine.explain()
    assert last.image == second
    assert [x.found for x in last.layers] == ["snapshot", "nothing"]
    assert (await engine.explain(layers[1]["digest"][:20])).image == first
    assert len(pulls(engine)) == 2

    # The third finds everything: it is recorded as well, and needs one request.
    await engine.pull_image(first)
    record = await engine.explain(first)
    assert [x.found for x in record.layers] == ["snapshot", "snapshot"]
    assert (record.registry_requests, record.size_fetched) == (1, 0)
    # What is no pull leaves nothing.
    await engine.pull_image(first, pull="missing")
    assert len(pulls(engine)) == 3


async def test_what_was_retried_and_why(engine, fake):
    one = made("retried")
    reference = fake.add("explain/retried", "1", one)
    large = json.loads(one.data)["layers"][1]["digest"]
    broken = iter([MiB, MiB])

    def break_off(seen):
        after = next(broken, None)
        return after and Answer(body=one.blobs[large], break_after=after)

    fake.on(f"GET .*{large}", break_off)
    await engine.pull_image(reference)
    record = await engine.explain()
    assert record.outcome == "done"
    assert record.retries_total == len(record.retries) >= 1
    assert {retry.what for retry in record.retries} == {f"layer {large}"}
    assert all(fake.address in retry.reason for retry in record.retries)
    (layer_record,) = [x for x in record.layers if x.digest == large]
    assert layer_record.fetched[0].requests >= 2
    assert layer_record.fetched[0].size == len(one.blobs[large])


async def test_a_failure_is_recorded_and_the_next_attempt_tells_of_it(engine, fake):
    one = made("broken")
    reference = fake.add("explain/broken", "1", one)
    large = json.loads(one.data)["layers"][1]["digest"]
    wrong = Answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"unknown"}]}')
    first = Answer(body=one.blobs[large], break_after=MiB)
    answers = iter([first])
    fake.on(f"GET .*{large}", lambda _: next(answers, wrong))
    failed: list = []
    with pytest.raises(RegistryNotFound) as caught:
        await engine.pull_image(reference, on_event=failed.append)
    (event,) = [x for x in failed if isinstance(x, PullFailed)]
    assert (event.error, event.reason) == ("RegistryNotFound", str(caught.value))
    record = await engine.explain()
    assert (record.outcome, record.error) == ("failed", "RegistryNotFound")
    assert record.reason.startswith(str(caught.value)[:200])
    came = {x.digest: x.fetched for x in record.layers}[large][0].size
    assert 0 < came <= MiB
    # What did not fill a message has not gone to containerd.
    there = came - came % MESSAGE_SIZE

    fake.hooks.clear()
    await engine.pull_image(reference)
    record = await engine.explain()
    (again,) = [x for x in record.layers if x.digest == large]
    assert (again.found, again.size_found) == ("partial", there)
    assert again.fetched[0].size == len(one.blobs[large]) - there


async def test_a_cancellation(engine, fake):
    one = made("cancelled")
    reference = fake.add("explain/cancelled", "1", one)
    large = json.loads(one.data)["layers"][1]["digest"]
    fake.on(f"GET .*{large}", Answer(body=one.blobs[large], gate=fake.gate()))
    begun = asyncio.Event()

    def on_event(event):
        if isinstance(event, LayerProgress) and event.status is LayerStatus.DOWNLOADING:
            begun.set()

    task = asyncio.create_task(engine.pull_image(reference, on_event=on_event))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    record = await engine.explain()
    assert (record.outcome, record.error, record.reason) == ("cancelled", "CancelledError", "")


async def test_offline_and_unpinned_say_why(engine, registry):
    reference = push(registry, "explain/never", "1", made("never", 1000))
    with pytest.raises(NotFound):
        await engine.pull_image(reference, pull="never")
    record = await engine.explain()
    assert (record.outcome, record.pull) == ("failed", "never")
    assert "no registry is asked" in record.reason
    lock = await engine.lock([reference])
    await engine.pull_image(reference, lock=lock)
    assert (await engine.explain()).frozen is True


async def test_no_signature_of_a_redirect(engine, fake):
    """A content network's URL is signed: whoever has it may fetch."""
    one = made("signed", 50_000)
    reference = fake.add("explain/signed", "1", one)
    large = json.loads(one.data)["layers"][1]["digest"]
    url = f"{fake.url}/cdn/{large}?X-Signature=SECRET"
    fake.on(f"GET /v2/.*{large}", Answer(307, headers={"Location": url}))
    fake.on("GET /cdn/", Answer(body=noise("other", len(one.blobs[large]))))
    with pytest.raises(DigestMismatch):
        await engine.pull_image(reference)
    (path,) = pulls(engine)
    assert "SECRET" not in path.read_text()
    assert fake.address in path.read_text()


async def test_a_folder_that_cannot_be_written_fails_no_pull(engine, registry):
    engine.settings.data_dir.mkdir(parents=True, exist_ok=True)
    (engine.settings.data_dir / "pulls").write_text("a file")
    await engine.pull_image(push(registry, "explain/full", "1", made("full", 1000)))
    with pytest.raises(NotFound):
        await engine.explain()


async def test_what_a_registry_says_is_left(engine, fake):
    one = made("limited", 1000)
    reference = fake.add("explain/limited", "1", one)
    left = iter(range(76, 0, -1))

    def limited(seen):
        kind = {"Content-Type": one.media_type, "Docker-Content-Digest": one.digest}
        limits = {"RateLimit-Limit": "100;w=21600", "ratelimit-remaining": f"{next(left)};w=21600"}
        return Answer(body=one.data, headers={**kind, **limits})

    fake.on("/manifests/", limited)
    await engine.pull_image(reference)
    record = await engine.explain()
    asked = len(fake.requests("/manifests/"))
    (limit,) = record.limits
    assert (limit.host, limit.remaining) == (fake.address, 77 - asked)
    assert (limit.limit, limit.window) == (100, 21600)


def test_from_the_command_line(command, registry):
    one_line = command("explain")
    assert one_line.status == 1
    assert one_line.err == "serpentine: no pull is recorded; pull something first\n"
    reference = push(registry, "explain/told", "1", made("told", 100_000))
    assert command("pull", "-q", reference).status == 0
    # No containerd is needed for it.
    done = command("explain", reference, CONTAINERD_ADDRESS="/no/such/socket")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{reference} for linux/amd64, ")
    assert ": done after " in lines[0]
    assert any(line.startswith("  layers: 2: 2 fetched") for line in lines)
    assert any(f" from {registry.address}, 2 requests, " in line for line in lines)
    value = command("explain", "--json").json
    assert value["image"] == reference
    assert [x["found"] for x in value["layers"]] == ["nothing", "nothing"]
    assert value["hosts"][0]["bytes_per_second"] > 0
    assert command("explain", "no/such:image").status == 1
    assert command("explain", "UPPER case").status == 1


def test_ctrl_c_is_told(containerd, namespace, command, fake):
    one = made("interrupted")
    reference = fake.add("explain/interrupted", "1", one)
    large = json.loads(one.data)["layers"][1]["digest"]
    fake.on(f"GET .*{large}", Answer(body=one.blobs[large], gate=fake.gate()))
    process = subprocess.Popen(
        [sys.executable, "-m", "serpentine.cli", "pull", "-q", reference],
        env={**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while not fake.requests(f"GET .*{large}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert b"interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    value = command("explain", "--json").json
    assert (value["image"], value["outcome"]) == (reference, "cancelled")
