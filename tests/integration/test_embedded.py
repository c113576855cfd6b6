"""Our own containerd: started on demand, found again, stopped; once, however many want it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import serpentine
from serpentine.daemon.embedded import Embedded, Process, render_config
from serpentine.errors import DaemonFailed
from serpentine.events import ignore
from tests.conftest import CONTAINERDS
from tests.support.images import busybox_layer, file, image, layer, push

pytestmark = pytest.mark.skipif(
    not CONTAINERDS, reason="no containerd: the other tests fail and say so"
)


@pytest.fixture
def embedded(monkeypatch):
    """A containerd of our own in directories of the test's own; always stopped in the end."""
    base = Path(tempfile.mkdtemp(prefix="spt-"))
    base.chmod(0o711)
    monkeypatch.setenv("SERPENTINE_DATA_DIR", str(base / "data"))
    monkeypatch.setenv("SERPENTINE_RUN_DIR", str(base / "run"))
    daemon = Embedded(base / "data", base / "run")
    yield daemon
    asyncio.run(daemon.stop())
    shutil.rmtree(base)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "serpentine", *arguments], capture_output=True, text=True, timeout=50
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Everything is imported first: nobody may not be allowed to read where Python lies.
    code = (
        "import os, sys, serpentine.daemon.discovery, serpentine.cli.pull\n"
        "import serpentine.cli.main as m\n"
        "import platformdirs.unix\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.exit(m._run({list(arguments)!r}))"
    )
    environ = {**os.environ, "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environ
    )


def containerds(embedded: Embedded) -> list[int]:
    """Return the processes that run with this one's configuration."""
    needle = str(embedded.run_dir / "containerd.toml").encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if needle in arguments and b"containerd" in arguments[0]:
            found.append(int(path.parent.name))
    return found


def test_a_command_starts_it_and_the_next_one_finds_it(embedded, registry):
    reference = push(registry, "embedded/one", "1", image([layer([file("a", "1")])]))
    first = run("pull", reference, "--progress", "plain")
    assert first.returncode == 0, first.stderr
    assert "starting containerd" in first.stderr
    (pid,) = containerds(embedded)
    second = run("pull", reference, "--progress", "plain")
    assert second.returncode == 0
    assert "starting containerd" not in second.stderr
    assert second.stdout == first.stdout
    assert containerds(embedded) == [pid]

    status = run("daemon", "status", "--json")
    found = json.loads(status.stdout)
    assert (found["kind"], found["transport"], found["running"]) == ("embedded", "socket", True)
    assert found["endpoint"] == f"unix://{embedded.socket}"
    assert found["pid"] == pid
    assert found["snapshotter"] == "overlayfs"
    assert found["containerd_version"]
    assert found["reason"]

    assert run("daemon", "stop").returncode == 0
    assert containerds(embedded) == []
    assert not embedded.socket.exists()
    stopped = run("daemon", "status", "--json")
    assert stopped.returncode == 1
    assert json.loads(stopped.stdout)["running"] is False
    again = run("daemon", "stop")
    assert (again.returncode, again.stdout) == (0, "")

    # Its data is still there.
    assert run("daemon", "start").returncode == 0
    assert run("images", "-q").stdout.strip() == reference


def test_it_is_not_in_our_session_and_not_our_child(embedded):
    """Neither Ctrl-C nor the end of the command reaches it."""
    assert run("daemon", "start").returncode == 0
    (pid,) = containerds(embedded)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(fields[1]) != os.getpid()
    assert int(fields[3]) != os.getsid(0)


def test_only_its_owner_may_open_the_socket(embedded):
    assert run("daemon", "start").returncode == 0
    assert embedded.socket.stat().st_mode & 0o007 == 0
    assert embedded.socket.stat().st_uid == os.geteuid()


async def test_many_at_once_end_with_one(embedded):
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serpentine", "daemon", "start", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    results = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, results
    assert len({json.loads(out)["pid"] for out, _ in results}) == 1
    assert len(containerds(embedded)) == 1


async def test_many_engines_of_one_process_end_with_one(embedded):
    async def use():
        async with serpentine.connect() as engine:
            return (await engine.version()).version

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(use()) for _ in range(6)]
    assert len({task.result() for task in tasks}) == 1
    assert len(containerds(embedded)) == 1


async def test_killed_it_comes_back(embedded):
    await embedded.start(on_event=ignore)
    (pid,) = containerds(embedded)
    os.kill(pid, 9)
    while Process.of(pid) is not None:  # noqa: ASYNC110 - not our child: nothing to await
        await asyncio.sleep(0.01)
    assert embedded.socket.exists(), "a socket that nobody serves is left"
    async with serpentine.connect() as engine:
        await engine.version()
    (other,) = containerds(embedded)
    assert other != pid


async def test_a_pid_file_of_another_process_is_not_believed(embedded):
    await embedded.start(on_event=ignore)
    await embedded.stop()
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        embedded._pid_file.write_text(json.dumps({"pid": bystander.pid, "started": 1}))
        assert await embedded.stop() is False
        assert bystander.returncode is None
        assert Process.of(bystander.pid) is not None
    finally:
        bystander.kill()
        await bystander.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
async def test_a_broken_pid_file_does_no_harm(embedded, text):
    embedded.run_dir.mkdir(parents=True)
    embedded._pid_file.write_text(text)
    await embedded.start(on_event=ignore)
    assert len(containerds(embedded)) == 1


async def test_one_that_cannot_start_says_why(embedded, monkeypatch, tmp_path):
    fake = tmp_path / "containerd"
    fake.write_text("#!/bin/sh\necho 'containerd: the disk is on fire' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DaemonFailed, match="the disk is on fire"):
        await embedded.start(on_event=ignore)
    assert embedded.process() is None
    assert not embedded._pid_file.exists()


async def test_cancelled_while_starting_it_leaves_no_process(embedded, monkeypatch, tmp_path):
    fake = tmp_path / "containerd"
    fake.write_text("#!/bin/sh\nexec sleep 1000\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    task = asyncio.create_task(embedded.start(on_event=ignore))
    while (process := embedded.process()) is None:  # noqa: ASYNC110 - a file tells it
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not process.is_alive()


def test_without_root_the_error_says_what_to_do(embedded):
    done = run_as_nobody("pull", "alpine")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "root" in done.stderr
    assert "--address" in done.stderr


def test_a_socket_that_we_may_not_open(embedded):
    assert run("daemon", "start").returncode == 0
    done = run_as_nobody("--address", str(embedded.socket), "pull", "alpine")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"permission denied: {embedded.socket}" in done.stderr


def test_restart_logs_and_remove(embedded, registry):
    reference = push(registry, "embedded/remove", "1", image([layer([file("a", "2")])]))
    assert run("pull", "-q", reference).returncode == 0
    (before,) = containerds(embedded)
    restarted = run("daemon", "restart", "--json")
    assert json.loads(restarted.stdout)["running"] is True
    (after,) = containerds(embedded)
    assert after != before
    lines = run("daemon", "logs", "-n", "2").stdout.splitlines()
    assert lines == asyncio.run(embedded.log_tail(2))

    assert json.loads(run("daemon", "remove", "--json").stdout) == {"removed": True}
    assert containerds(embedded) == []
    assert not (embedded.run_dir / "state").exists()
    assert run("images", "-q").stdout.strip() == reference, "images stay"
    assert run("daemon", "remove", "--volumes").returncode == 0
    assert not embedded.root.exists()
    assert not embedded.log.exists()
    again = run("daemon", "remove", "--volumes")
    assert (again.returncode, again.stderr.count("\n")) == (0, 1)


def test_nothing_is_removed_while_a_container_runs(embedded, registry):
    made = image([busybox_layer()], config={"Cmd": ["/bin/sleep", "1000"]})
    reference = push(registry, "embedded/runs", "1", made)
    assert run("pull", "-q", reference).returncode == 0
    ctr = ["ctr", "-a", str(embedded.socket), "-n", "serpentine"]
    subprocess.run([*ctr, "run", "-d", reference, "sleeper"], check=True, capture_output=True)
    try:
        refused = run("daemon", "remove", "--volumes")
        assert refused.returncode == 1
        assert "containers still run" in refused.stderr
        assert run("inspect", reference).returncode == 0
    finally:
        for arguments in (["task", "rm", "-f", "sleeper"], ["container", "rm", "sleeper"]):
            subprocess.run([*ctr, *arguments], check=True, capture_output=True)


def test_the_configuration_survives_odd_paths():
    import tomllib

    path = Path('/a "b"/c\\d')
    config = tomllib.loads(render_config(path, path, path))
    assert config["root"] == config["state"] == config["grpc"]["address"] == str(path)
    assert "io.containerd.grpc.v1.cri" in config["disabled_plugins"]
