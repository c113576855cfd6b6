"""Steps: what the process sees, and what is left of it.

On each real containerd of this machine, and on ours in Docker, over its socket and through Envoy,
and in Podman.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from serpentine.containerd.channel import Channel
from serpentine.errors import (
    CommandNotExecutable,
    CommandNotFound,
    InvalidSetting,
    NotFound,
    StepError,
    StepFailed,
    StepTimeout,
    UserNotFound,
)
from serpentine.events import StepFinished, StepOutput, StepStarted
from serpentine.model.state import ContainerState
from serpentine.run.layers import layers_of
from serpentine.run.options import Bind, Tmpfs
from tests.integration.run.conftest import KINDS
from tests.support.images import busybox_layer, file, folder, image, layer, symlink
from tests.support.steps import (
    HERE,
    interfaces_without_address,
    scratch_image,
    status_of,
    step_image,
)
from tests.support.trees import walk

# Of each step, on its link to the daemon's machine.
GATEWAY = "10.205.0.1"
# Two hundred for "Done when 2"; a slice of them at every run of the tests.
STEPS = int(os.environ.get("SERPENTINE_TEST_STEPS", "40"))


pytestmark = [
    # The first test of each kind brings up its daemon.
    pytest.mark.timeout(120),
    # Our container in Podman is the same as in Docker: what differs is in test_run_contained.py.
    pytest.mark.parametrize(
        "machine", [kind for kind in KINDS if kind != "podman"], indirect=True, scope="module"
    ),
]


@dataclass(frozen=True)
class Ground:
    """The states of images, for all tests of this file on one daemon."""

    state: ContainerState
    configured: ContainerState
    scratch: ContainerState


@pytest.fixture(scope="module")
def ground(machine, step_state):
    configured = step_image(
        Env=["A=image", "B=image", "PATH=/data:/bin", "HOME=/image"],
        WorkingDir="/data",
        User="app",
        Entrypoint=["/bin/echo", "entry"],
        Cmd=["cmd"],
        StopSignal="SIGINT",
    )
    return Ground(
        step_state, machine.pull("configured", configured), machine.pull("scratch", scratch_image())
    )


async def collect(client):
    """Let the collector take what nothing holds any more."""
    await client.leases.create("test-clean", expires=timedelta(minutes=1))
    await client.leases.delete("test-clean", sync=True)


@pytest.fixture(autouse=True)
def nothing_left(ground, runner):
    """Whatever a test does with steps: ``runner`` sees that there is no more than before."""


@pytest.fixture
def engine(runner):
    return runner.engine


@pytest.fixture
def run(runner):
    """Return a function that runs a step; nothing is committed, and there is no network."""
    return runner.run


@pytest.fixture
def said(run):
    """Return a function that runs a step that must succeed, and returns its lines on stdout."""

    async def said(args=None, **options):
        result = await run(args, **options)
        assert (result.exit_code, result.stderr) == (0, b"")
        return result.stdout.decode().splitlines()

    return said


def when(text: bytes, action):
    """Return a ``use`` that does something with a step once it printed something.

    The text may come in several pieces, and before the step is used.
    """

    seen = bytearray()
    arrived = asyncio.Event()

    def on_event(event):
        if isinstance(event, StepOutput):
            seen.extend(event.data)
            if text in seen:
                arrived.set()

    async def use(step):
        await arrived.wait()
        await action(step)

    return {"use": use, "on_event": on_event}


# --- output -----------------------------------------------------------------------------------


async def test_hello(run):
    events = []
    result = await run(["echo", "hello"], on_event=events.append)
    assert result.exit_code == 0
    assert result.output == result.stdout == b"hello\n"
    assert result.stderr == b""
    assert result.dropped == 0
    assert result.state is None
    assert 0 < result.seconds < 30
    assert [type(e) for e in events] == [StepStarted, StepOutput, StepFinished]
    started, output, finished = events
    assert started.args == ("echo", "hello")
    assert (output.stream, output.data) == (1, b"hello\n")
    assert started.step == output.step == finished.step
    assert finished.exit_code == 0


async def test_streams_are_apart_and_bytes_are_bytes(run):
    """Trap 47: what is not UTF-8, NUL bytes, no newline at the end."""
    result = await run(r"printf '\377\376\000a\r\n\n'; printf '\200\303' >&2")
    assert result.stdout == b"\xff\xfe\x00a\r\n\n"
    assert result.stderr == b"\x80\xc3"
    assert result.exit_code == 0


async def test_a_stream_is_in_order(run):
    result = await run("i=0; while [ $i -lt 3000 ]; do echo $i; echo e$i >&2; i=$((i+1)); done")
    assert result.stdout.split() == [b"%d" % i for i in range(3000)]
    assert result.stderr.split() == [b"e%d" % i for i in range(3000)]


async def test_a_hundred_megabytes_of_output(run):
    """All of it is streamed, the last bytes are kept, and memory stays where it was."""
    size, seen = 100_000_000, 0

    def on_event(event):
        nonlocal seen
        if isinstance(event, StepOutput):
            seen += len(event.data)

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    result = await run(f"yes | head -c {size}; echo the end", on_event=on_event, max_output=1000)
    peak = memory("VmHWM")
    assert seen == size + 8
    assert result.output == (b"y\n" * 496 + b"the end\n")
    assert result.dropped == size + 8 - 1000
    assert peak - before < 30_000, f"{peak - before} KiB more"


def memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(status_of(text)[name].removesuffix("kB"))


@pytest.mark.parametrize("stream", ["", ">/dev/null 2>&1"], ids=["keeps", "leaves"])
async def test_a_background_child_does_not_hang_the_step(run, stream):
    """Trap 46: it holds the pipes' other ends, and goes with the first process."""
    began = time.monotonic()
    result = await run(f"sleep 600 {stream} & echo started")
    assert result.output == b"started\n"
    assert result.exit_code == 0
    assert time.monotonic() - began < 10


async def test_a_step_that_closes_its_output_goes_on(run, said):
    result = await run("exec >&- 2>&-; sleep 0.1; echo done >/data/done", commit=True)
    assert (result.exit_code, result.output) == (0, b"")
    assert await said("cat /data/done", state=result.state) == ["done"]


# --- input ------------------------------------------------------------------------------------


async def test_input(run):
    async def use(step):
        await step.write(b"first\n")
        await step.write(b"\xff second")
        await step.close_stdin()

    result = await run("cat; echo end", stdin=True, use=use)
    assert result.output == b"first\n\xff secondend\n"


async def test_much_input(run):
    """More than any pipe holds, while as much comes back."""
    data = random.Random(1).randbytes(20_000_000)

    async def use(step):
        for place in range(0, len(data), 1_000_000):
            await step.write(data[place : place + 1_000_000])
        await step.close_stdin()

    result = await run(["cat"], stdin=True, use=use, max_output=len(data))
    assert result.stdout == data


async def test_without_input_there_is_none(said):
    assert await said("cat; readlink /proc/self/fd/0") == ["/dev/null"]


async def test_input_ends_with_whoever_gives_it(said):
    """Nobody could write any more: a program that reads to the end would wait for ever."""

    async def use(step):
        await step.write(b"all\n")

    assert await said(["cat"], stdin=True, use=use) == ["all"]
    assert await said(["cat"], stdin=True) == []


async def test_input_is_a_conversation(runner):
    """What is written arrives while more is still to come."""
    heard = asyncio.Event()
    said = bytearray()

    def on_event(event):
        if isinstance(event, StepOutput):
            said.extend(event.data)
            heard.set()

    async def use(step):
        for word in (b"one\n", b"two\n"):
            await step.write(word)
            await heard.wait()
            heard.clear()
        await step.close_stdin()

    result = await runner.run(["cat"], stdin=True, use=use, on_event=on_event)
    assert result.stdout == said == b"one\ntwo\n"


async def test_input_that_nobody_reads(run):
    """The process ends while it is being written to."""

    async def use(step):
        while True:
            await step.write(b"x" * 1_000_000)

    result = await run("exit 3", stdin=True, use=use)
    assert result.exit_code == 3


async def test_input_after_the_end_of_the_output(run, said):
    """More than all pipes hold, so that most of it comes after the step closed its own ends."""
    data = random.Random(2).randbytes(5_000_000)

    async def use(step):
        await step.write(data)
        await step.close_stdin()

    script = "exec >&- 2>&-; sleep 0.2; cat >/data/in"
    result = await run(script, stdin=True, use=use, commit=True)
    expected = hashlib.sha256(data).hexdigest()
    assert await said("sha256sum </data/in", state=result.state) == [f"{expected}  -"]


async def test_input_that_comes_when_the_step_has_ended(run, monkeypatch):
    """Whoever writes is cancelled then; it is no error, however late we hear of the end."""
    unary, written = Channel.unary, asyncio.Event()

    async def late(channel, method, *more, **options):
        answer = await unary(channel, method, *more, **options)
        if method.endswith("Tasks/Wait"):
            await written.wait()
        return answer

    async def use(step):
        await step.folder.stdio.wait()
        await step.write(b"x")
        written.set()
        while True:
            await step.write(b"x" * 1_000_000)

    monkeypatch.setattr(Channel, "unary", late)
    assert (await run("exit 3", stdin=True, use=use)).exit_code == 3


# --- ends -------------------------------------------------------------------------------------


async def test_exit_codes(run):
    codes = [0, 1, 7, 126, 127, 255]
    results = await asyncio.gather(*(run(f"echo said; exit {c}", commit=True) for c in codes))
    assert [r.exit_code for r in results] == codes
    assert {r.output for r in results} == {b"said\n"}
    # What failed is not worth keeping.
    assert [r.state is not None for r in results] == [True, *[False] * 5]


async def test_a_failure_as_an_exception(run):
    with pytest.raises(StepFailed, match="status 7") as caught:
        await run("echo said; exit 7", check=True)
    assert caught.value.exit_code == 7
    assert caught.value.output == b"said\n"
    assert (await run("true", check=True)).exit_code == 0


async def test_no_such_command(run):
    commands = ["none", "/bin/none", "./none", "/none/none", "bin", "unexecutable", ""]
    raised = await asyncio.gather(*(run([c]) for c in commands), return_exceptions=True)
    for command, error in zip(commands, raised, strict=True):
        assert isinstance(error, CommandNotFound), (command, error)
        assert error.exit_code == 127
        assert repr(command) in str(error)


async def test_no_such_interpreter(run):
    """The kernel says the same of it as of a program that is not there."""
    with pytest.raises(CommandNotFound, match="needs to run") as caught:
        await run(["/bin/no-interpreter"])
    assert caught.value.exit_code == 127


NOT_EXECUTABLE = {
    "/data": "it is a directory",
    "/etc/../data": "it is a directory",
    "/bin/unexecutable": "permission denied",
    "/bin/garbage": "not a program",
    "/etc/passwd/none": "",
}


async def test_not_executable(run):
    raised = await asyncio.gather(*(run([c]) for c in NOT_EXECUTABLE), return_exceptions=True)
    for (command, why), error in zip(NOT_EXECUTABLE.items(), raised, strict=True):
        assert isinstance(error, CommandNotExecutable), (command, error)
        assert error.exit_code == 126
        assert repr(command) in str(error)
        assert why in str(error)


async def test_a_script(said):
    assert await said(["script", "a b", "c"]) == ["script 2"]


async def test_what_looks_as_if_it_were_refused(run):
    """Only the first program counts, and only if nothing else was said."""
    other = "echo exec /bin/other: exec format error; exit 1"
    assert (await run(other)).output == b"exec /bin/other: exec format error\n"
    more = "echo first; echo exec /bin/sh: exec format error; exit 1"
    assert (await run(more)).exit_code == 1
    well = "echo exec /bin/sh: exec format error; exit 3"
    assert (await run(well)).exit_code == 3


@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", 137), ("SIGUSR1", 138), (15, 143)])
async def test_ended_by_a_signal(run, signal, code):
    """The first process of a namespace gets only signals that it wants, and SIGKILL."""

    async def kill(step):
        await step.kill(signal)

    number = code - 128
    script = f"trap 'exit {code}' {number}; echo ready; while :; do sleep 0.02; done"
    if number == 9:
        script = script.partition(";")[2]
    result = await run(script, **when(b"ready", kill))
    assert result.exit_code == code


async def test_a_signal_after_the_end_does_nothing(run):
    kept = []

    async def use(step):
        kept.append(step)

    assert (await run(["true"], use=use)).exit_code == 0
    await kept[0].kill("SIGTERM")
    with pytest.raises(BrokenPipeError):
        await kept[0].write(b"x")


async def test_out_of_time_and_obedient(run):
    began = time.monotonic()
    with pytest.raises(StepTimeout, match=r"0\.5 seconds") as caught:
        await run(
            "trap 'echo stopping; exit 9' TERM; echo started; while :; do sleep 0.02; done",
            timeout=0.5,
        )
    assert caught.value.exit_code == 9
    assert caught.value.output == b"started\nstopping\n"
    # Well before the grace period was over.
    assert time.monotonic() - began < 8


async def test_out_of_time_and_deaf(run):
    """Not only the first process: all of its group."""
    began = time.monotonic()
    with pytest.raises(StepTimeout) as caught:
        await run("sleep 600 & trap '' TERM; while :; do sleep 0.02; done", timeout=0.3, grace=0.2)
    assert caught.value.exit_code == 137
    assert time.monotonic() - began < 10


async def test_the_stop_signal(run, ground):
    script = "trap 'exit 5' INT; trap 'exit 6' HUP; while :; do sleep 0.02; done"
    # The image's own, and another one in its place.
    for more, code in (({}, 5), ({"stop_signal": "HUP"}, 6)):
        with pytest.raises(StepTimeout) as caught:
            await run(script, state=ground.configured, timeout=0.5, **more)
        assert caught.value.exit_code == code


async def test_a_timeout_that_is_not_reached(said):
    assert await said("echo quick", timeout=50) == ["quick"]


@pytest.mark.parametrize("network", ["none", "bridge"])
async def test_cancelled_in_the_middle(runner, network):
    """The fixture sees that nothing is left."""
    printed = asyncio.Event()

    def on_event(event):
        if isinstance(event, StepOutput):
            printed.set()

    task = asyncio.create_task(
        runner.run("echo started; sleep 600", on_event=on_event, network=network, stdin=True)
    )
    async with asyncio.timeout(30):
        await printed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_a_helper_raises_is_raised(run):
    async def use(step):
        raise KeyError("mine")

    began = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        await run(["sleep", "600"], use=use)
    assert time.monotonic() - began < 10


# --- users ------------------------------------------------------------------------------------

WHO = "grep -E '^(Uid|Gid|Groups):' /proc/self/status | sed 's/[[:space:]]*$//'; echo $HOME"


USERS = {
    None: (0, 0, "0 10", "/root"),
    "": (0, 0, "0 10", "/root"),
    "root": (0, 0, "0 10", "/root"),
    "app": (1000, 100, "10 29 100", "/home/app"),
    "1000": (1000, 100, "10 29 100", "/home/app"),
    "app:staff": (1000, 50, "50", "/home/app"),
    "app:7": (1000, 7, "7", "/home/app"),
    "4242": (4242, 0, "0", "/"),
    "4242:4243": (4242, 4243, "4243", "/"),
    "12": (12, 0, "0", "/"),
    "homeless": (1001, 101, "101", "/"),
}


async def test_users(said):
    answers = await asyncio.gather(*(said(WHO, user=user) for user in USERS))
    for (user, (uid, gid, groups, home)), lines in zip(USERS.items(), answers, strict=True):
        found = status_of("\n".join(lines[:3]))
        assert found["Uid"].split() == [str(uid)] * 4, user
        assert found["Gid"].split() == [str(gid)] * 4, user
        assert found["Groups"] == groups, user
        assert lines[3] == home, user


async def test_no_such_user(run):
    for user in ("nobody", "app:nobody", "4294967295", "-1"):
        with pytest.raises(UserNotFound):
            await run(["true"], user=user)


async def test_users_are_read_from_what_the_steps_wrote(engine, ground, said):
    """Not from the image, and through its links, but not out of it."""
    result = await engine.run(
        ground.state,
        "echo new:x:7:8::/new: >/data/passwd; rm /etc/passwd; ln -s ../data/passwd /etc/passwd",
        network="none",
    )
    assert (await said(WHO, state=result.state, user="new"))[3] == "/new"
    with pytest.raises(UserNotFound):
        await said(WHO, state=result.state, user="app")
    outside = await engine.run(
        ground.state, "ln -sf ../../../../../../../../etc/passwd /etc/passwd", network="none"
    )
    with pytest.raises(UserNotFound):
        await said(WHO, state=outside.state, user="root")


@pytest.fixture(scope="module")
def linked(machine):
    """An image whose files of users are links inside it."""
    entries = [
        folder("usr/etc"),
        file("usr/etc/passwd", "deep:x:77:78::/deep:\n"),
        symlink("etc/passwd", "/usr/etc/passwd"),
    ]
    return machine.pull("linked", image([busybox_layer(), layer(entries)]))


async def test_links_inside_the_image_are_followed(linked, runner):
    assert (await runner.run(["id", "-u"], state=linked, user="deep")).stdout == b"77\n"


# --- what the process sees --------------------------------------------------------------------


async def test_the_image_s_configuration(said, ground):
    assert await said(state=ground.configured) == ["entry cmd"]
    assert await said(["x"], state=ground.configured) == ["entry x"]
    assert await said([], state=ground.configured) == ["entry"]
    assert await said(["pwd"], state=ground.configured, entrypoint=[]) == ["/data"]
    lines = await said(
        "pwd; id -un; echo $A $B $C $PATH $HOME",
        state=ground.configured,
        env={"B": "mine", "C": "mine"},
    )
    assert lines == ["/data", "app", "image mine mine /data:/bin /image"]
    lines = await said(
        ["-c", "pwd; id -u; echo $A.$HOME"],
        state=ground.configured,
        entrypoint=["/bin/sh"],
        working_dir="/etc",
        user="root",
        env={"A": None, "HOME": "/there"},
    )
    assert lines == ["/etc", "0", "./there"]


async def test_the_environment_by_default(said):
    lines = await said(["env"], hostname="me")
    assert sorted(lines) == [
        "HOME=/root",
        "HOSTNAME=me",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]
    terminal = await said(["env"], hostname="me", terminal=True)
    assert sorted({*terminal} - {*lines}) == ["TERM=xterm"]


async def test_no_command(run, ground):
    with pytest.raises(StepError, match="no command"):
        await run(state=ground.scratch)


async def test_a_working_directory_that_is_not_there(said, engine, ground):
    assert await said(["pwd"], working_dir="/a/b c") == ["/a/b c"]
    # It stays, as with WORKDIR.
    result = await engine.run(ground.state, ["true"], working_dir="/a/b", network="none")
    assert await said("stat -c %u:%a /a/b", state=result.state) == ["0:755"]


async def test_a_working_directory_that_is_none(run):
    with pytest.raises(StepError) as caught:
        await run(["pwd"], working_dir="/etc/passwd")
    assert "/etc/passwd" in str(caught.value)
    # Not the user's: of this container runtime.
    assert caught.value.exit_code in (125, 126)


async def test_hostname(said):
    lines = await said("hostname; cat /etc/hostname; echo $HOSTNAME; grep -c . /etc/hosts")
    assert re.fullmatch("[0-9a-f]{12}", lines[0])
    assert lines[:3] == [lines[0]] * 3
    lines = await said("hostname; cat /etc/hostname; echo $HOSTNAME", hostname="db-1.example")
    assert lines == ["db-1.example"] * 3


async def test_hosts_and_resolvers(said):
    lines = await said(
        "cat /etc/hosts; echo; cat /etc/resolv.conf",
        hostname="me",
        extra_hosts={"db": "10.9.9.9", "db6": "fe80::1"},
    )
    hosts = [line.split() for line in lines[: lines.index("")]]
    assert ["127.0.0.1", "localhost"] in hosts
    assert ["10.9.9.9", "db"] in hosts
    assert ["fe80::1", "db6"] in hosts
    assert ["127.0.0.1", "me"] in hosts
    servers = [line.split() for line in lines if line.startswith("nameserver")]
    assert servers
    assert not any(server.startswith("127.") for _, server, *_ in servers)


async def test_a_root_that_cannot_be_written(run):
    result = await run(
        "touch /x || touch /etc/x || rm /etc/passwd || touch /dev/shm/ok && echo shm",
        read_only=True,
    )
    assert result.stdout == b"shm\n"
    assert result.stderr.count(b"Read-only file system") == 3


async def test_tmpfs(said):
    lines = await said(
        "for d in /tmp /new/deep /new/small; do stat -c '%n %a %u' $d; done; ls -A /data;"
        " df -k /new/small | tail -n 1; touch /new/deep/x; cat /proc/mounts",
        tmpfs=[
            Tmpfs("/tmp"),
            Tmpfs("/new/deep"),
            Tmpfs("/new/small", size=64 << 10, mode=0o750),
            Tmpfs("/data"),
        ],
    )
    assert lines[:3] == ["/tmp 1777 0", "/new/deep 1777 0", "/new/small 750 0"]
    assert lines[3].split()[:2] == ["tmpfs", "64"]
    found = {x.split()[1]: x.split()[3].split(",") for x in lines[4:]}
    assert {"rw", "nosuid", "nodev", "size=64k"} <= {*found["/new/small"]}


NO_BINDS = "the directories of this machine are not there, and binds are refused"


async def test_binds(runner, run, tmp_path):
    runner.skip_in_container(NO_BINDS)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("from outside")
    (tmp_path / "out").mkdir()
    binds = [
        Bind(str(tmp_path / "in"), "/in", read_only=True),
        Bind(str(tmp_path / "out"), "/deep/out"),
        Bind(str(tmp_path / "in/file"), "/etc/hosts", read_only=True),
    ]
    result = await run(
        "cat /in/file /etc/hosts; echo inside >/deep/out/file; touch /in/x; echo x >/etc/hosts",
        binds=binds,
    )
    assert result.stdout == b"from outsidefrom outside"
    assert result.stderr.count(b"Read-only file system") == 2
    assert (tmp_path / "out/file").read_text() == "inside\n"
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["file"]


async def test_a_bind_of_what_is_not_there(run, tmp_path):
    with pytest.raises(StepError) as caught:
        await run(["true"], binds=[Bind(str(tmp_path / "none"), "/in")])
    assert str(tmp_path / "none") in str(caught.value)
    assert not (tmp_path / "none").exists()


async def test_ulimits(said):
    lines = await said(
        "ulimit -Sn; ulimit -Hn; ulimit -c", ulimits={"nofile": (64, 128), "core": (0, 0)}
    )
    assert lines == ["64", "128", "0"]


async def test_out_of_memory(run):
    result = await run(
        ["dd", "if=/dev/zero", "of=/dev/null", "bs=200000000", "count=1"], memory=16 << 20
    )
    assert (result.exit_code, result.out_of_memory) == (137, True)
    with pytest.raises(StepFailed, match="out of memory") as caught:
        await run(
            ["dd", "if=/dev/zero", "of=/dev/null", "bs=200000000", "count=1"],
            memory=16 << 20,
            check=True,
        )
    assert caught.value.exit_code == 137
    enough = await run(
        ["dd", "if=/dev/zero", "of=/dev/null", "bs=2000000", "count=1"], memory=16 << 20
    )
    assert (enough.exit_code, enough.out_of_memory) == (0, False)


async def test_a_fork_bomb_under_a_limit(runner, run):
    """It cannot have more than its processes, and goes as one."""
    limits = []

    async def use(step):
        # In the one tree of version 2, or in one of the many of version 1.
        files = [Path(folder, "pids.max") for folder in runner.cgroups([step.id])]
        limits.extend(file.read_text().strip() for file in files if file.exists())

    with pytest.raises(StepTimeout):
        await run(
            "f() { f & f; }; f 2>/dev/null & exec sleep 600",
            pids=20,
            timeout=1,
            grace=0,
            use=use,
        )
    assert limits == ["20"]
    result = await run(
        "i=0; while [ $i -lt 50 ]; do sleep 600 & i=$((i+1)); done; echo 50", pids=20
    )
    assert result.stdout == b""
    assert b"fork" in result.stderr


async def test_limits(runner):
    files = "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
    unified = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    result = await runner.run(f"cat {files} 2>/dev/null || cat {unified}", memory=64 << 20, pids=20)
    assert result.stdout == b"67108864\n20\n"


async def test_cpus(said):
    script = "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null; true"
    found = await said(script, cpus=0.5)
    assert found in (["50000"], ["50000 100000"])


SHOW = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status"
DOCKER = 0xA80425FB


async def test_privileges(said):
    found = status_of("\n".join(await said(SHOW)))
    masks = {k: int(v, 16) for k, v in found.items() if k.startswith("Cap")}
    assert masks == {
        "CapInh": 0, "CapPrm": DOCKER, "CapEff": DOCKER, "CapBnd": DOCKER, "CapAmb": 0,
    }  # fmt: skip
    assert found["NoNewPrivs"] == "0"
    assert found["Seccomp"] == "2"
    # A user who is not root has them in the bounding set only.
    found = status_of("\n".join(await said(SHOW, user="app")))
    assert [int(found[k], 16) for k in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, DOCKER]
    found = status_of("\n".join(await said(SHOW, cap_drop=["ALL"])))
    assert {v for k, v in found.items() if k.startswith("Cap")} == {"0" * 16}
    found = status_of("\n".join(await said(SHOW, cap_add=["NET_ADMIN"], cap_drop=["chown"])))
    assert int(found["CapEff"], 16) == (DOCKER | 1 << 12) & ~1


async def test_no_new_privileges(run, said):
    """A set-user-ID program of the image gains nothing."""
    assert (await run(["/data/suid"], user="app")).exit_code == 0
    assert (await run(["/data/suid"], user="app", no_new_privileges=True)).exit_code == 1000 & 255
    found = status_of("\n".join(await said(SHOW, user="app", no_new_privileges=True)))
    assert found["NoNewPrivs"] == "1"


async def test_capabilities_that_were_dropped_are_gone(run):
    result = await run("touch /x; chown app /x; mknod /n c 1 3; hostname other", cap_drop=["ALL"])
    assert result.stderr.count(b"not permitted") + result.stderr.count(b"must be root") == 3


async def test_paths_that_are_masked(run):
    result = await run(
        "cat /proc/kcore /proc/keys /proc/timer_list | head -c 1 | wc -c; ls /sys/firmware;"
        " echo 1 >/proc/sys/kernel/panic || echo 1; echo x >/sys/kernel/x || echo 2;"
        " mkdir /sys/fs/cgroup/memory/x /sys/fs/cgroup/x || echo 3; mount -t tmpfs x /tmp || echo 4"
    )
    assert result.stdout.split() == [b"0", b"1", b"2", b"3", b"4"]
    assert b"/proc/sys/kernel/panic: Read-only file system" in result.stderr


async def test_its_own_namespaces(runner, said):
    lines = await said("for n in pid ipc uts mnt cgroup net; do readlink /proc/self/ns/$n; done")
    ours = {
        str((process / "ns" / n).readlink())
        for process in (HERE, runner.machine.process)
        for n in ("pid", "ipc", "uts", "mnt", "cgroup", "net")
    }
    assert len(lines) == 6
    assert not ours & set(lines)
    assert await said("echo $$; cat /proc/self/cgroup | cut -d: -f3 | sort -u") == ["1", "/"]


async def test_devices(said, run):
    lines = await said("ls /dev | sort; stat -c '%n %a %t:%T' /dev/null /dev/zero /dev/tty")
    usual = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    # Where the kernel has a /proc/kcore, the runtime makes a link to it, which is masked.
    assert [x for x in lines[:-3] if x != "core"] == usual.split()
    assert lines[-3:] == ["/dev/null 666 1:3", "/dev/zero 666 1:5", "/dev/tty 666 5:0"]
    # What it makes itself it cannot open: the first disk, or any other.
    result = await run("mknod /disk b 8 0 && cat /disk; mknod /mem c 1 1 && cat /mem")
    assert result.stderr.count(b"not permitted") == 2


# --- terminals --------------------------------------------------------------------------------


async def test_a_terminal(run):
    async def use(step):
        await step.resize(101, 37)
        await step.write(b"go\n")

    result = await run(
        "read x; stty size; test -t 0 && test -t 1 && test -t 2 && tty; echo err >&2",
        terminal=True,
        stdin=True,
        use=use,
    )
    assert result.exit_code == 0
    assert result.stderr == b""
    lines = result.stdout.replace(b"\r", b"").splitlines()
    assert lines == [b"go", b"37 101", b"/dev/pts/0", b"err"]


async def test_ctrl_c_through_a_terminal(run):
    async def type_it(step):
        await step.write(b"\x03")

    result = await run(
        "trap 'exit 9' INT; echo ready; while :; do sleep 0.02; done",
        terminal=True,
        stdin=True,
        **when(b"ready", type_it),
    )
    assert result.exit_code == 9


# --- states -----------------------------------------------------------------------------------


async def test_a_chain_of_steps(engine, ground):
    """Each sees what those before it did, and nothing of what they removed."""
    state = ground.state
    for number in range(4):
        result = await engine.run(
            state, f"ls /data | sort; echo {number} >/data/{number}; rm -r /data/old /data/"
            f"{number - 1} 2>/dev/null; true", network="none",
        )  # fmt: skip
        expected = {0: ["old", "suid"], 1: ["0", "suid"]}.get(number, [str(number - 1), "suid"])
        assert result.stdout.decode().split() == expected
        assert result.state
        assert result.state.snapshot_key != state.snapshot_key
        assert result.state.platform == state.platform
        state = result.state
        # Nothing but the state itself keeps its snapshot from the collector.
        await collect(engine.containerd)
    # Those before are as they were: a fork of the first does not see the second.
    result = await engine.run(ground.state, "ls /data", network="none")
    assert result.stdout.decode().split() == ["old", "suid"]


async def test_the_configuration_stays_with_the_state(engine, ground):
    result = await engine.run(
        ground.configured, ["x"], network="none", env={"A": "step"}, user="root", working_dir="/etc"
    )
    for name in ("env", "working_dir", "user", "entrypoint", "cmd", "stop_signal", "labels"):
        assert getattr(result.state, name) == getattr(ground.configured, name)


@pytest.fixture
def top(runner):
    """Return a function: what a state's own snapshot holds, without those that it builds on."""

    async def top(state) -> dict:
        snapshots = runner.engine.containerd.snapshots(state.snapshotter)
        key = f"view-{uuid.uuid4().hex}"
        root = {"containerd.io/gc.root": "while we look"}
        mounts = await snapshots.view(key, state.snapshot_key, labels=root)
        try:
            folder = str(layers_of(mounts)[0])
            found = walk(runner.machine.process / "root" / folder.lstrip("/"))
        finally:
            await snapshots.remove(key)
        del found["."]
        return found

    return top


OPTIONS = {
    "usual": {},
    "bridge": {"network": "bridge"},
    "host": {"network": "host"},
    "tmpfs": {"tmpfs": [Tmpfs("/new/deep"), Tmpfs("/home/app/t")]},
    "mounts": {
        "tmpfs": [Tmpfs("/new/deep"), Tmpfs("/home/app/t")],
        "binds": [Bind("/usr", "/opt/usr"), Bind("/etc/hostname", "/opt/x/file"), Bind("/", "/m")],
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("image", ["state", "scratch"])
async def test_mount_points_are_not_committed(runner, engine, ground, top, image, options):
    """Trap 51: neither files nor directories that the runtime made to mount on."""
    if "binds" in options:
        runner.skip_in_container(NO_BINDS)
    command = ["/busybox", "true"] if image == "scratch" else ["true"]
    result = await engine.run(getattr(ground, image), command, **{"network": "none", **options})
    assert await top(result.state) == {}


async def test_what_the_step_made_itself_is_committed(engine, ground, top):
    """Also where something was mounted: the directory is used, or the file not empty."""
    result = await engine.run(
        ground.scratch,
        ["/busybox", "sh", "-c", "echo x >/etc/x; mkdir /a; echo mounted >/new/deep/x; echo x >/f"],
        tmpfs=[Tmpfs("/new/deep")],
        network="none",
    )
    assert {name: e["type"] for name, e in (await top(result.state)).items()} == {
        "etc": "d",
        "etc/x": "-",
        "a": "d",
        "f": "-",
    }


CHANGES = {
    "nothing": ("true", 1),
    "a file beside": ("echo >/etc/mine", 3),
    "the mode of what is above": ("chmod 700 /etc", 2),
    "an attribute of what is above": ("chown 7 /etc", 2),
    "a removed file beside": ("rm /etc/passwd", 3),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_the_step_did_is_committed(runner, change):
    """Nothing more than that: directories that were copied for a mount point go as well."""
    script, inodes = CHANGES[change]
    after = (await runner.run(script, commit=True)).state
    snapshots = runner.engine.containerd.snapshots("overlayfs")
    assert (await snapshots.usage(after.snapshot_key)).inodes == inodes


async def test_changes_of_directories_are_committed(engine, ground, said):
    """A directory in which nothing but our mount points was made keeps what the step did to it."""
    result = await engine.run(
        ground.state, "chmod 700 /etc; rm -r /home; mkdir /home", network="none"
    )
    lines = await said("stat -c %a /etc; ls /home; cat /etc/passwd | head -n 1", state=result.state)
    assert lines == ["700", "root:x:0:0:root:/root:/bin/sh"]


@pytest.mark.parametrize(
    "mount",
    [{"binds": [Bind("/etc/hostname", "/data/old", read_only=True)]}, {"tmpfs": [Tmpfs("/data")]}],
    ids=["bind", "tmpfs"],
)
async def test_files_of_the_image_that_are_mounted_over_stay(runner, engine, ground, top, mount):
    if "binds" in mount:
        runner.skip_in_container(NO_BINDS)
    first = await engine.run(
        ground.state, "cat /etc/hosts >/data/seen", network="none", extra_hosts={"a": "10.0.0.1"}
    )
    second = await engine.run(
        first.state, "! grep ^old /data/old", network="none", check=True, **mount
    )
    assert await top(second.state) == {}
    third = await engine.run(second.state, "cat /data/old", network="none", commit=False)
    assert third.output == b"old"


async def test_mount_points_through_links_are_not_committed(engine, ground, top):
    """A link in the image may lead the runtime elsewhere."""
    linked = await engine.run(
        ground.state, "mkdir /real; ln -s /real /to; ln -s /gone /dangling", network="none"
    )
    result = await engine.run(
        linked.state,
        ["true"],
        tmpfs=[Tmpfs("/to/a/b"), Tmpfs("/dangling")],
        network="none",
    )
    assert await top(result.state) == {}


async def test_removing_states(engine, ground):
    first = (await engine.run(ground.state, "echo 1 >/data/1", network="none")).state
    second = (await engine.run(first, "echo 2 >/data/2", network="none")).state
    await engine.remove_state(first)
    result = await engine.run(second, "cat /data/1 /data/2", network="none", commit=False)
    assert result.output == b"1\n2\n"
    await engine.remove_state(second)
    with pytest.raises(NotFound):
        await engine.remove_state(second)
    with pytest.raises(InvalidSetting, match="image"):
        await engine.remove_state(ground.state)
    with pytest.raises(StepError, match="not there"):
        await engine.run(second, ["true"], network="none")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"snapshotter": "zfs"}, "'zfs'"),
        ({"platform": "linux/s390x"}, "linux/s390x"),
        ({"platform": "windows/amd64"}, "windows/amd64"),
        ({"snapshot_key": "sha256:0"}, "sha256:0"),
    ],
)
async def test_states_that_do_not_fit(engine, ground, change, said, monkeypatch):
    """Said before anything is made."""
    calls = []
    unary = Channel.unary

    def counted(self, method, *more, **options):
        calls.append(method.rpartition("/")[2])
        return unary(self, method, *more, **options)

    monkeypatch.setattr(Channel, "unary", counted)
    values = {name: getattr(ground.state, name) for name in ground.state.__struct_fields__}
    with pytest.raises(StepError) as caught:
        await engine.run(ContainerState(**{**values, **change}), ["true"])
    assert said in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 125
    if "snapshot_key" not in change:
        assert not {"Create", "Prepare", "Start"} & set(calls)


# --- many ------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_thirty_at_once(run):
    results = await asyncio.gather(
        *(run(f"echo {n}; exit {n}", network=["none", "bridge"][n % 2]) for n in range(30))
    )
    assert [(r.exit_code, r.output) for r in results] == [(n, b"%d\n" % n) for n in range(30)]


# --- networks ---------------------------------------------------------------------------------


async def test_without_a_network(said):
    lines = await said("ls /sys/class/net; ip -4 addr show lo | grep -o 'inet [^ ]*'; ip route")
    assert lines == ["lo", "inet 127.0.0.1/8"]


async def test_the_host_s_network(runner, said):
    """The daemon's."""
    name = f"spt-{uuid.uuid4().hex[:8]}"
    link = runner.machine.in_network("ip", "link")
    subprocess.run([*link, "add", name, "type", "bridge"], check=True)
    try:
        lines = await said(f"ls -d /sys/class/net/{name}; ip link show {name}", network="host")
    finally:
        subprocess.run([*link, "del", name], check=True)
    assert lines[0] == f"/sys/class/net/{name}"
    assert name in lines[1]


async def test_the_bridge(runner, said):
    """A namespace of its own; the test's server answers on the gateway's address."""
    # On that alone, so that nothing else could have answered.
    async with serving(runner.machine.in_network(), GATEWAY) as port:
        lines = await said(
            "ls /sys/class/net; ip route | grep -o 'default via [0-9.]*';"
            f" nc $(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p') {port} </dev/null;"
            " ip -4 addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p';"
            " grep $(hostname) /etc/hosts; cat /etc/resolv.conf | grep -c nameserver",
            network="bridge",
        )
    # Its own address, not one of ours: what comes from it is not translated on the way to us.
    assert lines[:4] == ["eth0", "lo", f"default via {GATEWAY}", f"you are {lines[4]}"]
    assert lines[4].startswith("10.205.")
    assert lines[5].split()[0] == lines[4]
    assert int(lines[6]) >= 1


SERVER = """
import socket, sys

with socket.socket() as server:
    # The gateway's address is there with the first step only.  Python has no name for IP_FREEBIND.
    server.setsockopt(socket.IPPROTO_IP, 15, 1)
    server.bind((sys.argv[1], 0))
    server.listen()
    print(server.getsockname()[1], flush=True)
    while True:
        connection, (address, _) = server.accept()
        with connection:
            connection.sendall(b"you are %s\\n" % address.encode())
"""


@asynccontextmanager
async def serving(network: list[str], address: str):
    """Serve in a network, which is the beginning of a command; gives the port."""
    process = await asyncio.create_subprocess_exec(
        *network, sys.executable, "-c", SERVER, address, stdout=subprocess.PIPE
    )
    try:
        yield int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


@contextmanager
def outside():
    """A server at an address of this machine that is not the step's nor loopback's."""
    a, b = os.urandom(2)
    address = f"198.18.{a}.{b}"
    subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    try:
        with socket.create_server((address, 0)) as server:
            server.setblocking(False)
            yield server
    finally:
        subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=True)


async def test_a_bridge_leads_outside(runner):
    loop = asyncio.get_running_loop()
    with outside() as server:
        host, port = server.getsockname()

        async def answer():
            connection, _ = await loop.sock_accept(server)
            with connection:
                await loop.sock_sendall(connection, b"from outside\n")

        async with asyncio.TaskGroup() as group:
            group.create_task(answer())
            result = await runner.run(
                f"nc {host} {port} </dev/null; cat /etc/resolv.conf; hostname -i;"
                " ls /sys/class/net",
                network="bridge",
            )
    lines = result.stdout.decode().splitlines()
    assert lines[0] == "from outside"
    assert any(line.startswith("nameserver ") for line in lines)
    assert lines[-3].startswith("10.205.")
    assert lines[-2:] == ["eth0", "lo"]


async def test_steps_on_the_bridge(runner, engine, ground):
    """Two have two addresses and do not reach each other; both are given back at the end."""
    steps, found = [], {}
    both = asyncio.Event()

    def on_event(event):
        if isinstance(event, StepStarted):
            steps.append(event.step)
        if isinstance(event, StepOutput):
            found.setdefault(event.step, bytearray()).extend(event.data)
            if len(found) == 2 and all(b"\n" in text for text in found.values()):
                both.set()

    async def use(step):
        await both.wait()
        (other,) = (text.split()[0].decode() for key, text in found.items() if key != step.id)
        assert runner.addresses([step.id])
        await step.write(f"{other}\n".encode())

    script = (
        "ip -4 addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'; read other;"
        f" ping -c 1 -W 5 {GATEWAY} >/dev/null && echo outside;"
        " ping -c 1 -W 1 $other >/dev/null && echo reached; :"
    )
    results = await asyncio.gather(
        *(
            engine.run(ground.state, script, stdin=True, use=use, on_event=on_event, commit=False)
            for _ in range(2)
        )
    )
    first, second = (r.stdout.decode().split() for r in results)
    assert first[1:] == second[1:] == ["outside"]
    assert first[0] != second[0]
    assert len(steps) == 2
    assert runner.addresses(steps) == []
    assert runner.cgroups(steps) == []


async def test_a_step_cannot_write_into_its_neighbours_files(runner):
    """Each has its own copies, also of the resolvers."""
    spoil = "for f in hosts hostname resolv.conf; do echo spoilt >/etc/$f; done"
    await runner.run(spoil, network="bridge")
    result = await runner.run("cat /etc/hosts /etc/hostname /etc/resolv.conf", network="bridge")
    assert b"spoilt" not in result.stdout


async def test_loopback_of_the_host_is_not_the_step_s(runner, run):
    """Neither this machine's nor the daemon's container's."""
    async with (
        serving([], "127.0.0.1") as here,
        serving(runner.machine.in_network(), "127.0.0.1") as there,
    ):
        for port in (here, there):
            for network in ("bridge", "none"):
                result = await run(f"nc -w 2 127.0.0.1 {port} </dev/null", network=network)
                assert result.exit_code != 0
                result = await run(f"nc -w 2 localhost {port} </dev/null", network=network)
                assert result.exit_code != 0


async def test_no_address_is_left_after_a_failure(runner, run):
    steps = []

    def on_event(event):
        steps.append(getattr(event, "step", None))

    with pytest.raises(CommandNotFound):
        await run(["none"], network="bridge")
    with pytest.raises(StepTimeout):
        await run(["sleep", "600"], network="bridge", timeout=0.2, grace=0, on_event=on_event)
    assert steps
    assert runner.addresses(steps) == []
    assert await no_interfaces_without_address(runner)


async def no_interfaces_without_address(runner) -> bool:
    deadline = time.monotonic() + 10
    while interfaces_without_address(runner.machine.process) > 0:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


KILLED = """
import asyncio, sys
import serpentine
from serpentine.model.state import ContainerState

async def main(state):
    async with serpentine.connect() as engine:
        await engine.run(
            ContainerState.from_json(state), "echo started; sleep 600", on_event=print
        )

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def killed(machine, ground, engine):
    """Return a function that starts another client, whose step runs; what it left is swept."""
    started = []

    async def start():
        started.append(await start_client(machine, ground))
        return started[-1]

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()
    async with machine.connect() as another:
        await another.run(ground.state, ["true"], network="none", commit=False)


async def start_client(machine, ground):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", "-c", KILLED, ground.state.to_json()),
        stdout=subprocess.PIPE,
        env={**os.environ, **machine.server.environ, "CONTAINERD_NAMESPACE": machine.namespace},
    )
    async with asyncio.timeout(30):
        while b"StepOutput(" not in (line := await process.stdout.readline()):
            assert line, "it did not start"
    return process


async def test_after_a_client_that_was_killed(runner, engine, killed):
    """kill -9: whoever ends and deletes the task, its address is given back with it."""
    process = await killed()
    process.kill()
    await process.wait()
    (task,) = await engine.containerd.tasks.all()
    assert runner.addresses([task.id])
    assert runner.cgroups([task.id])
    await engine.containerd.tasks.kill(task.id, 9, all_processes=True)
    async with asyncio.timeout(20):
        await engine.containerd.tasks.wait(task.id)
    await engine.containerd.tasks.delete(task.id)
    assert runner.addresses([task.id]) == []
    assert runner.cgroups([task.id]) == []
    assert await no_interfaces_without_address(runner)


async def test_the_next_one_sweeps(runner, ground, engine, killed):
    """It goes on running when its client is killed; the first step of another ends it."""
    process = await killed()
    process.kill()
    await process.wait()
    (task,) = await engine.containerd.tasks.all()
    await engine.run(ground.state, ["true"], network="none", commit=False)
    assert runner.addresses([task.id]) == []
    assert runner.cgroups([task.id]) == []


async def test_those_of_a_client_that_runs_are_not_swept(runner, ground, engine, killed):
    process = await killed()
    await engine.run(ground.state, ["true"], network="none", commit=False)
    (task,) = await engine.containerd.tasks.all()
    assert runner.addresses([task.id])
    process.kill()
    await process.wait()


FULL = """
import asyncio, sys, serpentine
from serpentine.events import StepOutput
from serpentine.model.state import ContainerState

began = asyncio.Event()

def tell(event):
    if isinstance(event, StepOutput):
        began.set()

async def use(step):
    await began.wait()
    while True:
        writing = asyncio.create_task(step.write(bytes(1 << 20)))
        if (await asyncio.wait([writing], timeout=1))[1]:
            break  # nobody reads, and all pipes on the way are full
    print("full", flush=True)
    await writing

async def main():
    async with serpentine.connect(on_event=tell) as engine:
        state = ContainerState.from_json(sys.argv[1])
        await engine.run(state, "echo; sleep 600", network="bridge", stdin=True, use=use,
                         commit=False)

asyncio.run(main())
"""


async def test_a_client_that_was_killed_while_it_writes(runner):
    """Its pipes on the daemon's side go at once, the step goes with the next client."""
    machine = runner.machine
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FULL, runner.state.to_json()),
        stdout=subprocess.PIPE,
        env={**os.environ, **machine.server.environ, "CONTAINERD_NAMESPACE": machine.namespace},
    )
    try:
        assert process.stdout
        assert await process.stdout.readline() == b"full\n"
    finally:
        process.kill()
        await process.wait()
    if machine.kind == "docker-envoy":
        found = await runner.settled(
            lambda now: not any("serpentine-steps" in f for f in now.folders)
        )
        assert found.containers
        assert not any("serpentine-steps" in f for f in found.folders)
    async with machine.connect() as other:
        await other.run(runner.state, ["true"], network="none", commit=False)
    assert (await runner.left()).containers == []


# --- nothing is left (Done when 2) ------------------------------------------------------------


@pytest.fixture
def tasks_made(monkeypatch):
    """The ids of all tasks that were asked for, also of those that were never started."""
    made = []
    unary = Channel.unary

    async def told(channel, method, request, *more, **options):
        if method.endswith("Tasks/Create"):
            made.append(request.container_id)
        return await unary(channel, method, request, *more, **options)

    monkeypatch.setattr(Channel, "unary", told)
    return made


@pytest.mark.timeout(300)
async def test_nothing_is_left_of_many(runner, engine, run, tasks_made):
    """They succeed, fail, time out, are cancelled and killed, at random, several at once."""
    dice = random.Random(4)
    seen = Counter()
    before = await runner.left()

    async def one(kind: str, network: str, delay: float):
        more = {"network": network, "grace": 0.1}
        if kind == "succeeds":
            result = await run("echo x >/data/x", commit=True, **more)
            await engine.remove_state(result.state)
            seen[result.exit_code] += 1
        elif kind == "fails":
            seen[(await run("exit 7", **more)).exit_code] += 1
        elif kind == "is not there":
            with pytest.raises(CommandNotFound):
                await run(["none"], **more)
            seen["none"] += 1
        elif kind == "times out":
            with pytest.raises(StepTimeout):
                await run("sleep 600 & trap '' TERM; sleep 600", timeout=delay, **more)
            seen["late"] += 1
        elif kind == "is killed":
            killed = await run("echo ready; sleep 600", **{**more, **when(b"ready", kill)})
            seen[killed.exit_code] += 1
        else:
            task = asyncio.create_task(run("sleep 600 & sleep 600", **more))
            await asyncio.wait([task], timeout=delay)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            seen["cancelled"] += 1

    async def kill(step):
        await step.kill("SIGKILL")

    kinds = ["succeeds", "fails", "is not there", "times out", "is killed", "is cancelled"]
    chosen = [
        (kinds[n % len(kinds)], dice.choice(["none", "none", "bridge"]), dice.uniform(0.001, 0.5))
        for n in range(STEPS)
    ]
    dice.shuffle(chosen)
    some = asyncio.Semaphore(6)

    async def in_turn(*arguments):
        async with some:
            await one(*arguments)

    await asyncio.gather(*(in_turn(*arguments) for arguments in chosen))
    assert sum(seen.values()) == STEPS
    assert set(seen) == {0, 7, 137, "none", "late", "cancelled"}
    assert await runner.settled(lambda now: now == before) == before
    assert len(tasks_made) > STEPS * 4 / 5
    assert runner.addresses(tasks_made) == []
    assert runner.cgroups(tasks_made) == []
    assert await no_interfaces_without_address(runner)


class CancelAtCall:
    """Cancels a task when the n-th call to containerd is about to be made, or has been."""

    def __init__(self, monkeypatch, number: int, *, after: bool) -> None:
        self.calls: list[str] = []
        self.task: asyncio.Task | None = None
        unary = Channel.unary

        async def counted(channel, method, *more, **options):
            mine = self.task is not None
            if mine:
                self.calls.append(method.rpartition(".")[2])
            due = mine and len(self.calls) == number
            if due and not after:
                self.task.cancel()
            try:
                return await unary(channel, method, *more, **options)
            finally:
                if due and after:
                    self.task.cancel()

        monkeypatch.setattr(Channel, "unary", counted)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_cancelled_at_every_call(runner, ground, engine, monkeypatch, after):
    """From the lease to its end, at each call in turn: nothing is left, the next one works."""
    before = await runner.left()
    # What is asked for once only.
    await engine.run(ground.state, ["true"], network="none", commit=False)
    number, calls = 0, []
    while True:
        number += 1
        with monkeypatch.context() as patch:
            cancel = CancelAtCall(patch, number, after=after)
            network = "bridge" if number % 2 else "none"
            cancel.task = task = asyncio.create_task(
                engine.run(ground.state, "echo x >/data/x", network=network)
            )
            await asyncio.wait([task])
            cancel.task = None
        if len(cancel.calls) < number:
            break
        calls = cancel.calls
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"{others} after {cancel.calls}"
        if not task.cancelled():
            # It was done when the cancellation arrived.
            await engine.remove_state(task.result().state)
        found = await runner.settled(lambda now: now == before)
        assert found == before, f"after {cancel.calls[:number]}"
    assert number > 10, calls
    assert {"Tasks/Create", "Tasks/Start", "Snapshots/Commit"} <= {
        c.rpartition(".")[2] for c in calls
    }
    await engine.remove_state(task.result().state)


@pytest.mark.timeout(120)
async def test_cancelled_while_it_is_made(runner, engine, ground, tasks_made):
    """Containerd goes on with what it began, whether or not somebody waits for the answer."""
    before = await runner.left()
    outcomes = set()
    for number in range(12):
        network = "bridge" if number % 2 else "none"
        task = asyncio.create_task(engine.run(ground.state, ["sleep", "600"], network=network))
        while len(tasks_made) <= number:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0)
        await asyncio.wait([task], timeout=number / 100)
        task.cancel()
        await asyncio.wait([task])
        outcomes.add(task.cancelled())
        found = await runner.settled(lambda now: now == before)
        assert found == before, f"{number / 100} seconds later"
        assert runner.addresses(tasks_made) == [], f"{number / 100} seconds later"
        assert runner.cgroups(tasks_made) == [], f"{number / 100} seconds later"
    assert outcomes == {True}
    assert await no_interfaces_without_address(runner)
