"""One blob, from endpoints and into a store that are made up: what goes on where, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from serpentine._concurrency import KeyedLock
from serpentine.errors import (
    DigestMismatch,
    FailedPrecondition,
    RegistryUnreachable,
    SizeMismatch,
    TransferError,
)
from serpentine.events import Event, Received, Retrying
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.pull import fetch
from serpentine.pull.fetch import fetch_blob
from serpentine.pull.job import Job
from serpentine.pull.lines import Line
from serpentine.registry.throttle import Throttle

DATA = bytes(range(256)) * 1000
BLOB = Descriptor(media_type="x", digest=Digest.of(DATA), size=len(DATA))


class Store:
    """A content store with one ingest."""

    def __init__(self) -> None:
        self.data = b""
        self.committed: bytes | None = None
        self.content = self
        self.namespace = "n"

    @asynccontextmanager
    async def writer(self, *_, **__):
        yield self

    @property
    def offset(self) -> int:
        return len(self.data)

    async def write(self, data: bytes) -> None:
        self.data += data

    async def reset(self) -> None:
        self.data = b""

    async def check(self) -> None:
        pass

    async def commit(self, _labels) -> None:
        if hashlib.sha256(self.data).hexdigest() != BLOB.digest.hex:
            self.data = b""
            raise FailedPrecondition("unexpected commit digest")
        self.committed = self.data


class Hosts:
    """Endpoints in their order, the last one the registry's own; each a function of the offset."""

    def __init__(self, **serve) -> None:
        self.serve = serve
        self.asked: list[str] = []
        self.throttle = Throttle(None)

    def is_mirror(self, host: str) -> bool:
        return host != list(self.serve)[-1]

    async def failed(self, host: str, why: str) -> None:
        pass

    @asynccontextmanager
    async def open_blob(self, _blob, *, offset, most_skipped, avoid):
        for host in sorted(self.serve, key=lambda one: one in avoid):
            self.asked.append(host)
            body = self.serve[host]
            if body is not None:
                yield Body(host, body(offset))
                return
        raise RegistryUnreachable("nobody answers")


class Body:
    def __init__(self, host, chunks) -> None:
        self.host = self.endpoint = host
        self.ranges = False
        self._chunks = chunks

    def __aiter__(self):
        return self._chunks


async def right(offset):
    yield DATA[offset:]


async def wrong_and_short(_offset):
    """A page that says where to log in, say."""
    yield b"<html>"
    raise TransferError("it ended after 6 bytes")


async def wrong(offset):
    yield bytes(len(DATA) - offset)


async def too_long(offset):
    yield DATA[offset : offset + 1000]
    raise SizeMismatch("it is longer")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr(fetch, "RETRY_DELAYS", (0.0,) * 5)


def job_of(store: Store, hosts: Hosts) -> Job:
    return Job(
        reference=Reference.parse("example.org/a/b:1"),
        repository=hosts,
        containerd=store,
        snapshots=SimpleNamespace(name="overlayfs"),
        lease="l",
        locks=KeyedLock(),
        on_event=lambda _event: None,
        sync_fs=True,
    )


async def fetched(**serve) -> tuple[bytes | None, list[str]]:
    store, hosts = Store(), Hosts(**serve)
    await fetch_blob(job_of(store, hosts), BLOB, (0,))
    return store.committed, hosts.asked


async def test_a_mirror_with_a_wrong_beginning():
    """The registry goes on behind it, and once that is known to be wrong, begins anew."""
    assert await fetched(mirror=wrong_and_short, own=right) == (DATA, ["mirror", "own", "own"])


async def test_a_mirror_with_something_longer():
    assert await fetched(mirror=too_long, own=right) == (DATA, ["mirror", "own"])


async def test_mirrors_with_something_else():
    data, asked = await fetched(one=wrong, two=wrong, own=right)
    assert data == DATA
    assert asked == ["one", "two", "own"]


@pytest.mark.parametrize("mirror", [wrong, wrong_and_short])
async def test_nobody_has_the_right_one(mirror):
    with pytest.raises(DigestMismatch):
        await fetched(mirror=mirror, own=wrong)


async def test_a_mirror_is_suspected_once_only():
    """Also while the registry itself is away, it is not asked for ever."""
    with pytest.raises(DigestMismatch):
        await fetched(mirror=wrong, own=None)


async def test_a_registry_with_something_longer():
    with pytest.raises(SizeMismatch):
        await fetched(own=too_long)


async def test_slow_by_nature_is_no_failure(monkeypatch):
    """Far behind the others on every connection, but it gets on."""
    monkeypatch.setattr(fetch, "WINDOW", 0.02)

    async def slow(offset):
        for start in range(offset, len(DATA), 2000):
            await asyncio.sleep(0.005)
            yield DATA[start : start + 2000]

    store, hosts = Store(), Hosts(own=slow)
    job = job_of(store, hosts)
    job.speeds.note("another", 1e12)
    await fetch_blob(job, BLOB, (0,))
    assert store.committed == DATA
    assert len(hosts.asked) == 1 + fetch.SLOW_TRIES


@pytest.mark.parametrize("held", [True, False])
async def test_a_connection_that_broke_while_we_did_not_read(held):
    """Whoever gave it up is not to blame, and the time is not his."""

    async def given_up(offset):
        yield DATA[offset : offset + 1000]
        if offset == 0:
            raise TransferError("it ended after 1000 bytes")
        yield DATA[offset + 1000 :]

    class Held(Line):
        async def turn(self) -> float:
            if not held or self.held_at is not None or self.left < len(DATA) - 1000:
                return 0.0
            self.held_at = self.left
            return 5.0

    store, hosts = Store(), Hosts(mirror=given_up, own=right)
    blamed: list[str] = []

    async def failed(host: str, _why: str) -> None:
        blamed.append(host)

    hosts.failed = failed
    events: list[Event] = []
    job = dataclasses.replace(job_of(store, hosts), on_event=events.append)
    await fetch_blob(job, BLOB, (0,), Held(job.lines, BLOB.size))
    assert store.committed == DATA
    assert hosts.asked == (["mirror", "mirror"] if held else ["mirror", "own"])
    assert blamed == ([] if held else ["mirror"])
    assert any(isinstance(event, Retrying) for event in events) is not held
    first = next(event for event in events if isinstance(event, Received))
    assert (first.seconds < 0) is held  # five of them were ours
