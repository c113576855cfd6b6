"""What is particular to steps in a container of ours: in Docker, behind Envoy, in Podman.

That all else is the same there, ``test_run`` shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

from serpentine.errors import StepError, UserNotFound
from serpentine.events import StepOutput
from serpentine.run.contained import _Carried
from serpentine.run.options import Bind
from tests.integration.run.conftest import CONTAINED
from tests.support.images import busybox_layer, file, folder, image, layer, symlink

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.parametrize("machine", list(CONTAINED), indirect=True, scope="module"),
]


@pytest.mark.timeout(180)
async def test_fifty_megabytes_are_exact(runner):
    data = random.Random(2).randbytes(1 << 20)
    seen, size = hashlib.sha256(), 0

    def on_event(event):
        nonlocal size
        if isinstance(event, StepOutput):
            seen.update(event.data)
            size += len(event.data)

    async def use(step):
        for _ in range(50):
            await step.write(data)
        await step.close_stdin()

    result = await runner.run(["cat"], stdin=True, use=use, on_event=on_event, max_output=1000)
    expected = hashlib.sha256()
    for _ in range(50):
        expected.update(data)
    assert (result.exit_code, size, seen.hexdigest()) == (0, 50 << 20, expected.hexdigest())


async def test_this_machine_s_directories_are_not_there(runner):
    """Nor are those of the daemon's container in their place."""
    with pytest.raises(StepError, match="cannot mount /etc"):
        await runner.run(["ls", "/here"], binds=[Bind("/etc", "/here")])


# --- what the image says leads nowhere else ----------------------------------------------------


@pytest.fixture(scope="module")
def hostile(machine):
    """Images whose files of users are links to what is only in the daemon's container."""
    machine.inside("echo secret:x:4242:4242::/secret: >/run/secret-passwd")
    deep = "../" * 20
    return {
        name: machine.pull(
            f"hostile-{name}",
            image(
                [
                    busybox_layer(),
                    layer([folder(".serpentine"), symlink("lib64/libnss_files.so.2", "/x"),
                           *entries]),
                ]
            ),
        )
        for name, entries in {
            "absolute": [symlink("etc/passwd", "/run/secret-passwd")],
            "relative": [symlink("etc/passwd", f"{deep}run/secret-passwd")],
            "folder": [symlink("etc", f"{deep}run"), symlink("run/passwd", "secret-passwd")],
            "proc": [symlink("etc/passwd", "/proc/self/root/run/secret-passwd")],
            "process": [symlink("etc/passwd", "/proc/1/root/run/secret-passwd")],
            "tool": [symlink(".serpentine/busybox", "/bin/sh"),
                     file("etc/passwd", "root:x:0:0::/:\n")],
            "loop": [symlink("etc/passwd", "group"), symlink("etc/group", "passwd")],
        }.items()
    }  # fmt: skip


async def test_users_are_looked_up_in_the_image_alone(hostile, runner):
    for name, state in hostile.items():
        with pytest.raises(UserNotFound):
            await runner.run(["true"], state=state, user="secret")
        if name != "folder":
            assert (await runner.run(["id", "-u"], state=state, user="7")).stdout == b"7\n"


# --- the shell and the container ----------------------------------------------------------------


async def test_the_shell_is_opened_again(runner):
    assert (await runner.run(["echo", "1"])).stdout == b"1\n"
    # Their process groups: a kill of the shell alone would let its present child go on.
    runner.machine.inside(
        "for p in /proc/[0-9]*; do"
        " if tr '\\0' '\\n' <$p/cmdline 2>/dev/null | grep -qx serpentine-session; then"
        " kill -s KILL -- -${p#/proc/}; fi; done; :"
    )
    assert (await runner.run(["echo", "2"])).stdout == b"2\n"


async def test_what_carries_the_output_is_used_again_or_replaced(runner):
    for number in range(3):
        assert (await runner.run(["echo", str(number)])).stdout == b"%d\n" % number
    result = await runner.run("echo again >&2", terminal=True)
    assert result.stdout == b"again\r\n"
    runner.machine.inside(
        "for p in /proc/[0-9]*; do"
        " if tr '\\0' '\\n' <$p/cmdline 2>/dev/null | grep -qx '  cat stdout'; then"
        " kill -s KILL -- -${p#/proc/}; fi; done; :"
    )
    assert (await runner.run("echo out; echo err >&2")).stderr == b"err\n"


async def test_cancelled_while_the_pipes_are_made(runner, monkeypatch):
    """What was asked for by then is not there yet: it must not come after we have gone."""
    if runner.kind != "docker-envoy":
        pytest.skip("elsewhere, pipes are made by ourselves")
    original = _Carried.begin

    class CancelledAfterWriting:
        def __init__(self, stream, task) -> None:
            self.stream, self.task = stream, task

        async def write(self, data: bytes) -> None:
            await self.stream.write(data)
            self.task.cancel()

        async def read(self):
            return await self.stream.read()

    async def begin(self, stream, files):
        await original(self, CancelledAfterWriting(stream, steps[-1]), files)

    monkeypatch.setattr(_Carried, "begin", begin)
    steps = []
    for _ in range(10):
        steps.append(asyncio.create_task(runner.run(["true"])))
        await asyncio.wait(steps[-1:])
        assert steps[-1].cancelled()


async def test_a_container_that_starts_anew_has_no_old_addresses(machine, runner):
    """What a killed one noted would fill the network, little by little."""
    machine.inside(
        "mkdir -p /run/serpentine-cni/serpentine /run/serpentine-steps/old/step-1;"
        " echo x >/run/serpentine-cni/serpentine/10.205.9.9"
    )
    daemon = machine.server.daemon
    await asyncio.to_thread(daemon.engine.run, "kill", daemon.names.containerd)
    async with machine.connect() as engine:
        assert (await engine.run(runner.state, ["true"], commit=False)).exit_code == 0
        assert machine.inside("ls /run/serpentine-cni/serpentine | grep 10.205; :") == ""
        assert "old" not in machine.inside("ls /run/serpentine-steps")
