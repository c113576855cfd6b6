"""What protects a pull, and what earlier attempts have left: with a containerd that only notes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from serpentine.errors import TransferError
from serpentine.pull import leases
from serpentine.pull.leases import LABEL_PLATFORM, LABEL_PULL, LABEL_SESSION, forget_earlier, leased

IMAGE = "example.org/a/b:1"


@dataclass
class Lease:
    id: str
    labels: dict[str, str]


@dataclass
class Noted:
    """Leases, as containerd keeps them; ``slow``: a collector that does not come to its end."""

    found: dict[str, Lease] = field(default_factory=dict)
    slow: bool = False

    @property
    def leases(self) -> Noted:
        return self

    async def create(self, lease_id, *, expires, labels):
        self.found[lease_id] = Lease(lease_id, labels)

    async def delete(self, lease_id, *, sync):
        if self.slow:
            await asyncio.sleep(3600)
        del self.found[lease_id]

    async def all(self, filters):
        return list(self.found.values())


def left(noted: Noted, session: str) -> None:
    noted.found[session] = Lease(session, {LABEL_PULL: IMAGE, LABEL_SESSION: session})


async def test_those_of_who_is_gone_and_our_own_go(monkeypatch):
    noted = Noted()
    for session in ("ours", "gone", "alive"):
        left(noted, session)
    monkeypatch.setattr(leases, "current_session", lambda: "ours")
    monkeypatch.setattr(leases, "is_dead", lambda session: session == "gone")
    await forget_earlier(noted, IMAGE)
    assert set(noted.found) == {"alive"}


async def test_another_platform_s_stays(monkeypatch):
    noted = Noted()
    for name in ("amd64", "arm64"):
        left(noted, name)
        noted.found[name].labels[LABEL_PLATFORM] = f"linux/{name}"
    monkeypatch.setattr(leases, "is_dead", lambda session: True)
    await forget_earlier(noted, IMAGE, "linux/arm64")
    assert set(noted.found) == {"amd64"}


async def test_where_processes_have_no_names_nobody_is_taken_for_us(monkeypatch):
    """Another process, which pulls the same image just now, has the same empty name."""
    noted = Noted()
    left(noted, "")
    monkeypatch.setattr(leases, "current_session", lambda: "")
    await forget_earlier(noted, IMAGE)
    assert set(noted.found) == {""}


async def test_a_slow_collector_does_not_hide_the_error(monkeypatch):
    monkeypatch.setattr(leases, "CLEANUP_TIMEOUT", 0.05)
    with pytest.raises(TransferError, match="broke off"):
        async with leased(Noted(slow=True), IMAGE):
            raise TransferError("it broke off")
