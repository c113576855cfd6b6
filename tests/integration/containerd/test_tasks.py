"""Containers and tasks against each real containerd, with its shim and the machine's runc."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from serpentine.containerd import RUNTIME, Containerd, Mount, TaskExit, TaskStatus
from serpentine.errors import (
    AlreadyExists,
    ContainerdError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from tests.support.images import busybox_layer, file, folder, layer_of_tar, make_tar
from tests.support.tasks import (
    end_task,
    ended,
    mounted,
    process,
    runtime_states,
    shims,
    spec,
)

SIGKILL, SIGTERM = 9, 15
BASE = "base"
LEASE = "test"


@pytest.fixture(autouse=True)
def nothing_left(containerd, namespace):
    """Shims end by themselves, a moment after their task was deleted; all else is gone with it."""
    yield
    assert all(ended(pid) for pid in shims(namespace))
    assert mounted(namespace) == []
    assert runtime_states(namespace) == []


@pytest.fixture
async def client(containerd, namespace):
    async with Containerd(containerd.endpoint, namespace=namespace) as made:
        yield made
        assert await made.tasks.all() == []
        assert await made.containers.all() == []


@functools.cache
def layers():
    more = [
        file("bin/plain", "#!/bin/sh\n", mode=0o644),
        file("bin/garbage", "no program", mode=0o755),
        file("bin/lost", "#!/none\n", mode=0o755),
        folder("closed", 0o700),
        file("closed/program", "#!/bin/sh\n", mode=0o755),
    ]
    return [busybox_layer(compression="none"), layer_of_tar(make_tar(more), compression="none")]


@pytest.fixture
async def snapshots(client):
    """The snapshots, with one that a shell runs from."""
    await client.leases.create(LEASE, expires=timedelta(hours=1))
    snapshots = client.snapshots("overlayfs")
    mounts = await snapshots.prepare("making", lease=LEASE)
    for each in layers():
        digest, size = Digest.parse(each.digest), len(each.blob)
        async with client.content.writer("r", total=size, expected=digest, lease=LEASE) as writer:
            await writer.write(each.blob)
            await writer.commit()
        blob = Descriptor(media_type=each.media_type, digest=digest, size=size)
        await client.diff.apply(blob, mounts, lease=LEASE)
    await snapshots.commit(BASE, "making", lease=LEASE)
    return snapshots


@pytest.fixture
def container(client, snapshots):
    """Return a context: a container ``c`` with a root file system, whose mounts it gives."""

    @asynccontextmanager
    async def make(*args, **more):
        mounts = await snapshots.prepare("c", BASE, lease=LEASE)
        description = spec(*args, **more)
        await client.containers.create(
            "c", description, snapshotter=snapshots.name, snapshot_key="c", lease=LEASE
        )
        try:
            yield mounts
        finally:
            await end_task(client, "c")

    return make


@pytest.fixture
def running(client, container):
    """Return a context: a task ``c`` that runs; it gives the one who waits for its end."""

    @asynccontextmanager
    async def make(*args, stdin="", stdout="", stderr="", **more):
        async with container(*args, **more) as mounts, asyncio.TaskGroup() as group:
            terminal = more.get("terminal", False)
            if not terminal:
                stderr = stderr or stdout
            pipes = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "terminal": terminal}
            await client.tasks.create("c", mounts, lease=LEASE, **pipes)
            waiter = group.create_task(client.tasks.wait("c"))
            await client.tasks.start("c")
            yield waiter
            await client.tasks.kill("c", SIGKILL) if not waiter.done() else None

    return make


@pytest.fixture
async def pipes(tmp_path):
    """Return a function that makes a pipe and opens its reading end (trap 46)."""
    transports = []

    async def make(name):
        path = tmp_path / name
        os.mkfifo(path)
        reader = asyncio.StreamReader()
        end = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), end
        )
        transports.append(transport)
        return str(path), reader

    yield make
    for transport in transports:
        transport.close()
    await asyncio.sleep(0)


@pytest.fixture
def stdin(tmp_path):
    """The path of a pipe, and its writing end, which the test closes."""
    path = tmp_path / "stdin"
    os.mkfifo(path)
    # For reading, too: alone for writing it would not open before the shim reads.
    return str(path), os.fdopen(os.open(path, os.O_RDWR), "wb", buffering=0)


def described(*args, **more) -> bytes:
    return json.dumps(process(*args, **more)).encode()


class TestContainers:
    async def test_a_record(self, client):
        before = datetime.now(UTC)
        made = await client.containers.create(
            "c", spec("true"), snapshotter="s", snapshot_key="k", image="i", labels={"a": "b"}
        )
        assert made == await client.containers.get("c")
        assert (made.id, made.snapshotter, made.snapshot_key) == ("c", "s", "k")
        assert (made.image, made.labels, made.runtime) == ("i", {"a": "b"}, RUNTIME)
        assert json.loads(made.spec)["process"]["args"] == ["true"]
        assert made.created_at == made.updated_at
        assert abs(made.created_at - before) < timedelta(minutes=1)
        other = await client.containers.create("d", b"{}", runtime="io.other.v1")
        assert other.runtime == "io.other.v1"
        assert await client.containers.all() == [made, other]
        assert await client.containers.all(["labels.a==b"]) == [made]
        assert await client.containers.all(["id==d", "id==e"]) == [other]
        await client.containers.delete("c")
        await client.containers.delete("d")

    async def test_errors(self, client):
        await client.containers.create("c", b"{}")
        with pytest.raises(AlreadyExists):
            await client.containers.create("c", b"{}")
        with pytest.raises(InvalidArgument, match="a/b"):
            await client.containers.create("a/b", b"{}")
        await client.containers.delete("c")
        with pytest.raises(NotFound):
            await client.containers.delete("c")
        with pytest.raises(NotFound):
            await client.containers.get("c")

    async def test_holds_its_snapshot(self, client, snapshots):
        """Trap 45: for ever, if nobody deletes it."""
        await snapshots.prepare("k", BASE, lease=LEASE)
        await client.containers.create("c", b"{}", snapshotter=snapshots.name, snapshot_key="k")
        await client.leases.delete(LEASE, sync=True)
        assert {s.name for s in await snapshots.all()} == {"k", BASE}
        await client.containers.delete("c")
        await client.leases.create("last", expires=timedelta(hours=1))
        await client.leases.delete("last", sync=True)
        assert await snapshots.all() == []


class TestLife:
    @pytest.mark.parametrize(
        ("args", "status"),
        [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 0)],
    )
    async def test_status(self, client, running, args, status):
        """The last: no signal of its own namespace ends a first process that handles none."""
        before = datetime.now(UTC)
        async with running(*args) as waiter:
            done = await waiter
            assert done.status == status
            assert abs(done.exited_at - before) < timedelta(minutes=1)
            # Whoever comes later learns the same.
            assert await client.tasks.wait("c") == done
            assert await client.tasks.delete("c") == done
            with pytest.raises(NotFound):
                await client.tasks.delete("c")

    async def test_what_is_known_of_it(self, client, container, pipes, containerd):
        path, _ = await pipes("out")
        async with container("sleep", "1000") as mounts:
            pid = await client.tasks.create("c", mounts, stdout=path, stderr=path)
            info = await client.tasks.get("c")
            assert (info.id, info.pid, info.status) == ("c", pid, TaskStatus.CREATED)
            assert (info.stdin, info.stdout, info.stderr) == ("", path, path)
            assert not info.terminal
            assert (info.exit_status, info.exited_at) == (0, None)
            assert await client.tasks.start("c") == pid
            info = await client.tasks.get("c")
            assert info.status is TaskStatus.RUNNING
            assert await client.tasks.all() == [info]
            assert await client.tasks.pids("c") == [pid]
            metrics = await client.tasks.metrics("c")
            assert re.fullmatch(r"io\.containerd\.cgroups\.v[12]\.Metrics", metrics.type_url)
            assert metrics.value
            assert metrics.taken_at
            await client.tasks.kill("c", SIGKILL)
            done = await client.tasks.wait("c")
            assert done.status == 128 + SIGKILL
            info = await client.tasks.get("c")
            assert (info.status, info.exit_status) == (TaskStatus.STOPPED, done.status)
            assert info.exited_at == done.exited_at
            assert await client.tasks.pids("c") == []

    async def test_never_started(self, client, container):
        async with container("true") as mounts:
            await client.tasks.create("c", mounts)
            assert await client.tasks.delete("c") == TaskExit(0, None)
            assert await client.tasks.all() == []
            # And once more: nothing of the first is left.
            await client.tasks.create("c", mounts)
            await client.tasks.kill("c", SIGKILL)
            assert (await client.tasks.wait("c")).status == 128 + SIGKILL

    async def test_kill_is_the_signal_that_is_given(self, client, running, pipes):
        path, out = await pipes("out")
        script = "trap 'exit 5' TERM; echo ready; while :; do sleep 1000 & wait; done"
        async with running("sh", "-c", script, stdout=path) as waiter:
            assert await out.readline() == b"ready\n"
            await client.tasks.kill("c", SIGTERM)
            assert (await waiter).status == 5
            with pytest.raises(NotFound):
                await client.tasks.kill("c", SIGTERM)

    async def test_kill_all(self, client, running):
        async with running("sleep", "1000") as waiter:
            await client.tasks.exec("c", "e", described("sleep", "1000"))
            await client.tasks.start("c", "e")
            assert len(await client.tasks.pids("c")) == 2
            await client.tasks.kill("c", SIGKILL, all_processes=True)
            assert (await waiter).status == 128 + SIGKILL
            assert (await client.tasks.wait("c", "e")).status == 128 + SIGKILL
            assert (await client.tasks.delete_process("c", "e")).status == 128 + SIGKILL

    async def test_a_waiter_that_gives_up_changes_nothing(self, client, running):
        async with running("sleep", "1000") as waiter:
            other = asyncio.create_task(client.tasks.wait("c"))
            await client.tasks.get("c")
            other.cancel()
            await asyncio.wait([other])
            assert other.cancelled()
            assert (await client.tasks.get("c")).status is TaskStatus.RUNNING
            assert not waiter.done()

    async def test_a_task_without_its_record(self, client, running):
        """Why the task is deleted first."""
        async with running("sleep", "1000"):
            record = await client.containers.get("c")
            await client.containers.delete("c")
            assert [task.id for task in await client.tasks.all()] == ["c"]
            for call in (client.tasks.get, client.tasks.delete, client.tasks.wait):
                with pytest.raises(NotFound):
                    await call("c")
            await client.containers.create("c", record.spec)
            assert (await client.tasks.get("c")).status is TaskStatus.RUNNING


class TestStreams:
    async def test_output(self, client, running, pipes):
        """Trap 47: bytes."""
        (out_path, out), (err_path, err) = await pipes("out"), await pipes("err")
        script = r"printf 'a\377\000b'; echo wrong >&2"
        async with running("sh", "-c", script, stdout=out_path, stderr=err_path) as waiter:
            assert (await waiter).status == 0
            await client.tasks.delete("c")
            assert await out.read() == b"a\xff\0b"
            assert await err.read() == b"wrong\n"

    async def test_more_than_a_pipe_holds(self, client, running, pipes):
        path, out = await pipes("out")
        async with running("busybox", "head", "-c", "3000000", "/dev/zero", stdout=path) as waiter:
            assert await out.read() == bytes(3_000_000)
            assert (await waiter).status == 0

    async def test_the_end_of_stdin(self, client, running, pipes, stdin):
        """The shim holds the pipe open until it is told."""
        path, out = await pipes("out")
        with stdin[1] as end:
            async with running("cat", stdin=stdin[0], stdout=path) as waiter:
                end.write(b"some\n")
                assert await out.readline() == b"some\n"
                end.write(b"more\n")
                end.close()
                assert not waiter.done()
                await client.tasks.close_io("c")
                assert (await waiter).status == 0
                await client.tasks.delete("c")
                assert await out.read() == b"more\n"

    async def test_terminal(self, client, running, pipes, stdin):
        path, out = await pipes("out")
        script = "read line; busybox stty size; echo wrong >&2; echo $line"
        with stdin[1] as end:
            async with running("sh", "-c", script, terminal=True, stdin=stdin[0], stdout=path) as w:
                assert (await client.tasks.get("c")).terminal
                await client.tasks.resize_pty("c", 101, 42)
                end.write(b"typed\n")
                assert (await w).status == 0
                await client.tasks.delete("c")
                # What was typed is echoed.
                assert (await out.read()).split() == [b"typed", b"42", b"101", b"wrong", b"typed"]

    async def test_no_terminal_and_no_stdin(self, client, running):
        async with running("sleep", "1000"):
            await client.tasks.resize_pty("c", 80, 25)
            await client.tasks.close_io("c")


class TestExec:
    async def test_status_and_output(self, client, running, pipes):
        path, out = await pipes("out")
        script = described("sh", "-c", "echo $NAME; exit 3", env=["PATH=/bin", "NAME=x"])
        async with running("sleep", "1000"), asyncio.TaskGroup() as group:
            await client.tasks.exec("c", "e", script, stdout=path, stderr=path)
            info = await client.tasks.get("c", "e")
            assert (info.id, info.status, info.stdout) == ("e", TaskStatus.CREATED, path)
            waiter = group.create_task(client.tasks.wait("c", "e"))
            pid = await client.tasks.start("c", "e")
            done = await waiter
            assert done.status == 3
            info = await client.tasks.get("c", "e")
            assert (info.pid, info.status, info.exit_status) == (pid, TaskStatus.STOPPED, 3)
            assert [task.id for task in await client.tasks.all()] == ["c"]
            assert await client.tasks.delete_process("c", "e") == done
            assert await out.read() == b"x\n"
            for call in (client.tasks.get, client.tasks.wait, client.tasks.delete_process):
                with pytest.raises(NotFound):
                    await call("c", "e")

    async def test_kill_and_stdin(self, client, running, pipes, stdin):
        path, out = await pipes("out")
        with stdin[1] as end:
            async with running("sleep", "1000") as first:
                await client.tasks.exec(
                    "c", "e", described("cat"), stdin=stdin[0], stdout=path, stderr=path
                )
                with pytest.raises(FailedPrecondition):
                    await client.tasks.kill("c", SIGKILL, exec_id="e")
                await client.tasks.start("c", "e")
                end.write(b"some\n")
                assert await out.readline() == b"some\n"
                end.close()
                await client.tasks.close_io("c", "e")
                assert (await client.tasks.wait("c", "e")).status == 0
                await client.tasks.delete_process("c", "e")

                await client.tasks.exec("c", "e", described("sleep", "1000"))
                await client.tasks.start("c", "e")
                await client.tasks.kill("c", SIGTERM, exec_id="e")
                assert (await client.tasks.wait("c", "e")).status == 128 + SIGTERM
                await client.tasks.delete_process("c", "e")
                assert not first.done()

    async def test_terminal(self, client, running, pipes, stdin):
        path, out = await pipes("out")
        script = described("sh", "-c", "read line; busybox stty size", terminal=True)
        with stdin[1] as end:
            async with running("sleep", "1000"):
                await client.tasks.exec(
                    "c", "e", script, stdin=stdin[0], stdout=path, terminal=True
                )
                await client.tasks.start("c", "e")
                await client.tasks.resize_pty("c", 101, 42, "e")
                end.write(b"\n")
                assert (await client.tasks.wait("c", "e")).status == 0
                await client.tasks.delete_process("c", "e")
                assert (await out.read()).split() == [b"42", b"101"]

    async def test_errors(self, client, running):
        async with running("sleep", "1000") as waiter:
            await client.tasks.exec("c", "e", described("sleep", "1000"))
            with pytest.raises(AlreadyExists):
                await client.tasks.exec("c", "e", described("true"))
            await client.tasks.start("c", "e")
            with pytest.raises(FailedPrecondition, match="running"):
                await client.tasks.delete_process("c", "e")
            await client.tasks.kill("c", SIGKILL)
            await waiter
            await client.tasks.wait("c", "e")
            await client.tasks.delete_process("c", "e")
            with pytest.raises(FailedPrecondition, match="stopped"):
                await client.tasks.exec("c", "e", described("true"))

    @pytest.mark.parametrize(
        ("args", "more", "words"),
        [
            (["none"], {}, r'exec: "none": executable file not found in \$PATH'),
            (["/bin/plain"], {}, 'exec: "/bin/plain": permission denied'),
            (["true"], {"cwd": "/none"}, r'chdir to cwd \("/none"\) .*: no such file or directory'),
        ],
    )
    async def test_what_cannot_be_run(self, client, running, args, more, words):
        async with running("sleep", "1000"), asyncio.TaskGroup() as group:
            await client.tasks.exec("c", "e", described(*args, **more))
            waiter = group.create_task(client.tasks.wait("c", "e"))
            with pytest.raises(ContainerdError, match=f"OCI runtime exec failed: .*{words}") as e:
                await client.tasks.start("c", "e")
            assert type(e.value) is ContainerdError
            # No status is an answer to that.
            assert await waiter == TaskExit(0, None)
            assert await client.tasks.delete_process("c", "e") == TaskExit(0, None)


class TestErrors:
    async def test_what_is_not_there(self, client):
        await client.containers.create("c", spec("true"))
        tasks = client.tasks
        for name in ("none", "c"):
            for call in (tasks.start, tasks.wait, tasks.delete, tasks.get, tasks.pids):
                with pytest.raises(NotFound, match=name):
                    await call(name)
            with pytest.raises(NotFound, match=name):
                await tasks.kill(name, SIGKILL)
            with pytest.raises(NotFound, match=name):
                await tasks.exec(name, "e", described("true"))
            with pytest.raises(NotFound, match=name):
                await tasks.delete_process(name, "e")
            with pytest.raises(NotFound, match=name):
                await tasks.close_io(name)
            with pytest.raises(NotFound, match=name):
                await tasks.resize_pty(name, 80, 25)
            with pytest.raises(NotFound, match=name):
                await tasks.metrics(name)
        with pytest.raises(NotFound, match="none"):
            await tasks.create("none", [])
        await client.containers.delete("c")

    async def test_not_in_this_state(self, client, running):
        async with running("sleep", "1000") as waiter:
            with pytest.raises(AlreadyExists):
                await client.tasks.create("c", [])
            with pytest.raises(FailedPrecondition, match="cannot start a running process"):
                await client.tasks.start("c")
            with pytest.raises(FailedPrecondition, match="cannot delete a running process"):
                await client.tasks.delete("c")
            with pytest.raises(NotFound, match="process does not exist"):
                await client.tasks.start("c", "none")
            assert not waiter.done()

    @pytest.mark.parametrize(
        ("args", "more", "words"),
        [
            (["none"], {}, r'exec: "none": executable file not found in \$PATH'),
            (["/none"], {}, 'exec: "/none": stat /none: no such file or directory'),
            (["plain"], {}, r'exec: "plain": executable file not found in \$PATH'),
            (["/bin/plain"], {}, 'exec: "/bin/plain": permission denied'),
            (["/closed"], {}, 'exec: "/closed": permission denied'),
            (
                ["/closed/program"],
                {"user": {"uid": 1000, "gid": 1000}},
                'exec: "/closed/program": stat /closed/program: permission denied',
            ),
            (["true"], {"cwd": "/bin/busybox"}, "mkdir /bin/busybox: not a directory"),
            (
                ["true"],
                {"mounts": [{"destination": "/m", "type": "bind", "source": "/no/such"}]},
                'error mounting "/no/such" to rootfs at "/m": .*no such (file or directory|device)',
            ),
            ([], {}, "args must not be empty"),
        ],
    )
    async def test_what_cannot_be_run(self, client, container, args, more, words):
        """It comes from create, in the runtime's words, and leaves no task."""
        async with container(*args, **more) as mounts:
            match = f"OCI runtime create failed: runc create failed: .*{words}(: unknown)?$"
            with pytest.raises(ContainerdError, match=match) as caught:
                await client.tasks.create("c", mounts)
            assert type(caught.value) is ContainerdError
            assert caught.value.code == "UNKNOWN"
            assert await client.tasks.all() == []

    @pytest.mark.parametrize(
        ("program", "words"),
        [
            ("/bin/garbage", b"exec /bin/garbage: exec format error\n"),
            ("/bin/lost", b"exec /bin/lost: no such file or directory\n"),
        ],
    )
    async def test_what_the_kernel_does_not_run(self, client, running, pipes, program, words):
        """The runtime finds out too late to say it in any other way than this."""
        path, out = await pipes("out")
        async with running(program, stdout=path) as waiter:
            assert (await waiter).status == 1
            await client.tasks.delete("c")
            assert await out.read() == words

    async def test_a_directory_that_only_root_may_enter(self, running):
        """The runtime enters it while it is still root."""
        user = {"uid": 1000, "gid": 1000}
        async with running("true", cwd="/closed", user=user) as waiter:
            assert (await waiter).status == 0

    async def test_a_root_that_cannot_be_mounted(self, client, container):
        async with container("true"):
            with pytest.raises(ContainerdError, match=r"mount.* no such file or directory"):
                await client.tasks.create("c", [Mount("bind", "/no/such", options=("rbind",))])

    async def test_a_pipe_that_is_not_there(self, client, container):
        async with container("true") as mounts:
            with pytest.raises(ContainerdError, match="/no/such"):
                await client.tasks.create("c", mounts, stdout="/no/such", stderr="/no/such")

    async def test_one_pipe_alone(self, client, container, pipes):
        path, _ = await pipes("out")
        async with container("true") as mounts:
            with pytest.raises(ContainerdError, match='opening file ""'):
                await client.tasks.create("c", mounts, stdout=path)
            with pytest.raises(ContainerdError, match='opening file ""'):
                await client.tasks.create("c", mounts, stderr=path)

    async def test_a_description_that_is_none(self, client, snapshots):
        mounts = await snapshots.prepare("c", BASE, lease=LEASE)
        await client.containers.create("c", b"no JSON")
        with pytest.raises(ContainerdError, match="invalid character"):
            await client.tasks.create("c", mounts)
        await client.containers.delete("c")

    async def test_a_runtime_that_is_not_there(self, client):
        await client.containers.create("c", spec("true"), runtime="io.nobody.v1")
        with pytest.raises(ContainerdError, match="containerd-shim-nobody-v1"):
            await client.tasks.create("c", [])
        await client.containers.delete("c")
