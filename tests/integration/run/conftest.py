"""Steps on every kind of daemon: each containerd of this machine, and ours in Docker and Podman."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from serpentine import Engine
from serpentine.containerd import Containerd
from serpentine.errors import NotFound
from serpentine.model.state import ContainerState
from serpentine.run.step import RunResult
from tests.conftest import CONTAINERDS, newest
from tests.support.engines import ContainedContainerd, OurDaemon
from tests.support.images import Image, push
from tests.support.servers import ContainerdServer, RegistryServer
from tests.support.steps import HERE, Left, addresses, bridges, cgroups, left, step_image

# Container engine and transport, by the name of the test's parameter.
CONTAINED = {
    "docker": ("docker", "socket"),
    "docker-envoy": ("docker", "envoy"),
    "podman": ("podman", "socket"),
}
KINDS = [*CONTAINERDS, *CONTAINED]


@dataclass
class Machine:
    """A daemon of some kind, with an image in a namespace of its own."""

    kind: str
    server: Any
    registry: RegistryServer
    namespace: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex[:12]}")
    _process: Path | None = None

    @property
    def is_contained(self) -> bool:
        return self.kind in CONTAINED

    def connect(self, **more: object) -> Engine:
        return self.server.connect(namespace=self.namespace, **more)

    def pull(self, name: str, made: Image) -> ContainerState:
        async def pull():
            async with self.connect() as engine:
                return await engine.pull_image(push(self.registry, f"run/{name}", "1", made))

        return asyncio.run(pull())

    def inside(self, script: str, *, check: bool = True) -> str:
        """Run a script in the daemon's container."""
        daemon = self.server.daemon
        return daemon.engine.run("exec", daemon.names.containerd, "sh", "-c", script, check=check)

    @property
    def process(self) -> Path:
        """A process on the daemon's machine, as /proc shows it here: its root, mounts, network.

        To look through it takes no time, where a command in the container takes 100 ms.
        """
        if not self.is_contained:
            return HERE
        # A container that was started anew has another one.
        if self._process is None or not self._process.exists():
            names = self.server.daemon.names
            state = self.server.daemon.engine.inspect(names.containerd)["State"]
            self._process = Path(f"/proc/{state['Pid']}")
        return self._process

    def in_network(self, *command: str) -> list[str]:
        """Return a command that runs here, but in the network of the daemon's machine."""
        return ["nsenter", f"--net={self.process}/ns/net", "--", *command]

    async def clean(self) -> None:
        async with Containerd(self.server.endpoint, namespace=self.namespace) as client:
            for image in await client.images.all():
                await client.images.delete(image.name)
            await forget_states(client)


async def forget_states(client: Containerd) -> None:
    """Remove the states that tests made, those that build on others too."""
    snapshots = client.snapshots("overlayfs")
    for found in await snapshots.all():
        if found.name.startswith("state-"):
            # Of a state that the test itself removed, the collector may be on its way.
            with suppress(NotFound):
                await snapshots.update_labels(found.name, {"containerd.io/gc.root": None})
    await client.leases.create("test-clean", expires=timedelta(minutes=1))
    await client.leases.delete("test-clean", sync=True)


@contextmanager
def contained(request, mirror, kind: str):
    """Bring up our containerd in a container; what it needed is removed at the end."""
    name, transport = CONTAINED[kind]
    engine = request.getfixturevalue(name)
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    daemon = OurDaemon(engine, mirror, folder)
    try:
        yield ContainedContainerd(daemon, newest(), transport=transport)
    finally:
        names = daemon.names
        engine.run("rm", "-f", names.containerd, names.envoy, check=False)
        engine.run("volume", "rm", "-f", names.data_volume, names.run_volume, check=False)
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=KINDS)
def machine(request, registry, mirror):
    """Each kind of daemon, with an image that has a shell."""
    if os.geteuid() != 0:
        pytest.fail("these tests need root: run 'make test' as root")
    kind = request.param
    with ExitStack() as stack:
        if kind in CONTAINED:
            server = stack.enter_context(contained(request, mirror, kind))
        else:
            server = stack.enter_context(ContainerdServer(CONTAINERDS[kind]))
        found = Machine(kind, server, registry)
        yield found
        asyncio.run(found.clean())


@pytest.fixture(scope="module")
def step_state(machine):
    """The state of an image with a shell, on each kind of daemon."""
    return machine.pull("steps", step_image(Cmd=["/bin/sh"]))


@dataclass
class Runner:
    """A connected engine on one kind of daemon, and a look at what is left there."""

    machine: Machine
    engine: Engine
    state: ContainerState
    run_dir: Path

    @property
    def kind(self) -> str:
        return self.machine.kind

    async def run(self, args: Any = None, *, state: Any = None, **options: Any) -> RunResult:
        """Run a step; by default nothing is committed, and there is no network."""
        chosen = {"commit": False, "network": "none", **options}
        return await self.engine.run(state or self.state, args, **chosen)

    async def left(self) -> Left:
        """Return what the namespace and the folders of steps hold now."""
        process = self.machine.process
        found = await left(self.engine.containerd, self.run_dir, process)
        if self.machine.is_contained:
            # Nobody else has steps there.
            root = process / "root"
            found.folders.extend(map(str, root.glob("run/serpentine-cni/*/10.*")))
            found.folders.extend(map(str, root.glob("run/serpentine-steps/*/step-*")))
            found.folders.extend(bridges(process))
            # Processes that were left in the folder of a step.
            for link in root.glob("proc/[0-9]*/cwd"):
                with suppress(OSError):
                    if re.search("serpentine-steps/.*/step-", str(link.readlink())):
                        found.folders.append(str(link))
        return found

    def addresses(self, steps: Iterable[str]) -> list[str]:
        """Return the addresses that are given to these steps."""
        return addresses(steps, self.machine.process)

    def cgroups(self, steps: Iterable[str]) -> list[str]:
        """Return the cgroups of these steps that are still there."""
        return cgroups(steps, self.machine.process)

    def skip_in_container(self, why: str) -> None:
        """Leave this test out where the daemon is in a container: it cannot hold there."""
        if self.machine.is_contained:
            pytest.skip(f"in a container: {why}")

    async def settled(self, same: Callable[[Left], bool], seconds: float = 10) -> Left:
        """Return what is left, once it is as wanted, or after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            found = await self.left()
            if same(found) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.05)


@pytest.fixture
async def runner(machine, step_state, isolated):
    """A connected engine on each kind of daemon; its test leaves nothing there.

    Where each is parametrised by ``machine``: containerds here, in Docker over the socket and
    through Envoy, and in Podman.
    """
    run_dir = (
        machine.server.daemon.folder / "run" / "engine"
        if machine.is_contained
        else isolated / "run"
    )
    async with machine.connect() as engine:
        found = Runner(machine, engine, step_state, run_dir)
        before = await found.left()
        yield found
        await forget_states(engine.containerd)
        assert await found.settled(lambda now: now == before) == before
