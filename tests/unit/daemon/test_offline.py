"""Offline, nothing is built, pulled or downloaded for a containerd of our own either."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serpentine.daemon.container import ContainerDaemon
from serpentine.daemon.image import build_context
from serpentine.daemon.releases import install
from serpentine.doctor import Outcome, examine
from serpentine.errors import DaemonFailed
from serpentine.events import ignore
from serpentine.settings import load


@pytest.fixture
def settings():
    return replace(load(), offline=True, releases_url="http://127.0.0.1:1")


async def test_no_release_is_downloaded(settings):
    with pytest.raises(DaemonFailed, match="offline") as caught:
        await install(settings, on_event=ignore, machine="x86_64")
    assert "serpentine daemon install" in caught.value.hint


async def test_no_image_is_built(settings):
    class Nobody:
        """Not to be asked for anything."""

    daemon = ContainerDaemon.__new__(ContainerDaemon)
    object.__setattr__(daemon, "settings", settings)
    with pytest.raises(DaemonFailed, match="offline"):
        await daemon._build(Nobody(), build_context(settings), ignore, fresh=False)


async def test_the_doctor_asks_no_registry(settings):
    checks = [check async for check in examine(settings, registry="127.0.0.1:1")]
    (registry,) = [check for check in checks if check.name == "registry"]
    assert (registry.outcome, registry.remedy) == (Outcome.NOTE, "")
