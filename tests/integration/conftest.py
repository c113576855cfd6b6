"""Fixtures of the integration tests: engines, and what a namespace holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from serpentine.containerd import Containerd
from tests.support.contents import Contents


@pytest.fixture
async def engine(containerd, namespace):
    """An engine on a real containerd, in a namespace of the test's own."""
    async with containerd.connect(namespace=namespace) as opened:
        yield opened


@pytest.fixture
def contents(containerd, namespace):
    """Return a function that looks what the namespace holds now."""

    async def look(snapshotter: str = "overlayfs") -> Contents:
        async with Containerd(containerd.endpoint, namespace=namespace) as c:
            return Contents(
                images=sorted(i.name for i in await c.images.all()),
                blobs=sorted(str(b.digest) for b in await c.content.all()),
                ingests=sorted(s.ref for s in await c.content.list_statuses()),
                snapshots=sorted(s.name for s in await c.snapshots(snapshotter).all()),
                leases=sorted(lease.id for lease in await c.leases.all()),
            )

    return look


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def command(containerd, namespace):
    """Return a function that runs the command line on the test's containerd and namespace."""

    def run(*arguments: str, timeout: float = 50, **environ: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "serpentine.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={
                **os.environ,
                **containerd.environ,
                "CONTAINERD_NAMESPACE": namespace,
                **environ,
            },
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    return run
