"""``serpentine daemon install``: real downloads, real programs, and all that goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest

from serpentine.daemon import releases
from serpentine.daemon.embedded import Embedded
from serpentine.daemon.releases import install, installed
from serpentine.errors import DaemonFailed, DaemonPermission, InvalidSetting
from serpentine.events import (
    ReleaseInstalled,
    ReleaseProgress,
    ReleaseWaiting,
    Retrying,
    ignore,
)
from serpentine.settings import load
from tests.conftest import CONTAINERDS
from tests.support.release_server import (
    CNI,
    CONTAINERD,
    RUNC,
    ReleaseServer,
    archive,
    small_releases,
)


@pytest.fixture
def base():
    """A short directory: a socket's path may have 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def server(base, monkeypatch):
    """A server of small releases, and the settings that lead to it."""
    monkeypatch.setattr(releases, "RETRY_DELAYS", (0.0, 0.0))
    with ReleaseServer(small_releases()) as serving:
        monkeypatch.setenv("SERPENTINE_RELEASES_URL", serving.url)
        monkeypatch.setenv("SERPENTINE_RELEASES_SUMS", str(serving.sums(base / "sums")))
        monkeypatch.setenv("SERPENTINE_DATA_DIR", str(base / "data"))
        monkeypatch.setenv("SERPENTINE_RUN_DIR", str(base / "run"))
        yield serving


def left(data_dir: Path) -> list[str]:
    """Return what an install left, besides the file of its lock."""
    return sorted(p.name for p in data_dir.iterdir() if p.name != "install.lock")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "serpentine", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **environ},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


# --- the real programs -----------------------------------------------------------------------


@pytest.mark.skipif(not CONTAINERDS, reason="no containerd: the other tests fail and say so")
def test_our_own_containerd_runs_from_what_was_installed(base, server, monkeypatch):
    found = {n: shutil.which(n) for n in ("containerd", "ctr", "containerd-shim-runc-v2", "runc")}
    programs = {name: Path(str(path)).read_bytes() for name, path in found.items()}
    server.files = {
        CONTAINERD: archive({f"bin/{n}": programs[n] for n in programs if n != "runc"}),
        RUNC: programs["runc"],
    }
    plugins = Path("/usr/lib/cni")
    if plugins.is_dir():
        server.files[CNI] = archive({f"./{p.name}": p.read_bytes() for p in plugins.iterdir()})
    else:
        server.files[CNI] = small_releases()[CNI]
    server.sums(base / "sums")
    # A PATH with what the start needs, and without any containerd.
    (base / "path").mkdir()
    (base / "path/setsid").symlink_to(str(shutil.which("setsid")))
    monkeypatch.setenv("PATH", str(base / "path"))

    without = run("daemon", "start")
    assert without.returncode == 1
    assert "serpentine daemon install" in without.stderr

    done = run("daemon", "install", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    directory = Path(told["directory"])
    versions = {"containerd": "1.0.0", "runc": "1.0.1", "cni": "1.0.2"}
    assert told == {"directory": str(directory), **versions}
    assert directory.parent == base / "data"
    assert (base / "data/bin").resolve() == directory
    assert left(base / "data") == ["bin", directory.name]
    for name, content in programs.items():
        assert (directory / name).read_bytes() == content
        assert (directory / name).stat().st_mode & 0o7777 == 0o755
    if plugins.is_dir():
        assert {p.name for p in (directory / "cni").iterdir()} == {
            p.name for p in plugins.iterdir()
        }

    embedded = Embedded(base / "data", base / "run")
    try:
        status = run("daemon", "start", "--json")
        assert status.returncode == 0, status.stderr
        started = json.loads(status.stdout)
        assert started["running"] is True
        assert Path(f"/proc/{started['pid']}/exe").readlink() == directory / "containerd"
        environ = Path(f"/proc/{started['pid']}/environ").read_bytes().split(b"\0")
        assert f"PATH={directory}:{base / 'path'}".encode() in environ
    finally:
        asyncio.run(embedded.stop())
    # Images are data, the programs are not.
    assert run("daemon", "remove", "--volumes").returncode == 0
    assert installed(base / "data") is not None


@pytest.mark.skipif(not CONTAINERDS, reason="no containerd: the other tests fail and say so")
def test_one_that_runs_goes_on_and_the_user_is_told(base, server):
    try:
        assert run("daemon", "start").returncode == 0
        first = run("daemon", "install")
        assert first.returncode == 0
        assert "serpentine daemon restart" in first.stderr
        assert shutil.which("containerd") in first.stderr
        assert json.loads(run("daemon", "status", "--json").stdout)["running"] is True
    finally:
        asyncio.run(Embedded(base / "data", base / "run").stop())
    assert "restart" not in run("daemon", "install").stderr


# --- once ------------------------------------------------------------------------------------


def test_the_second_run_asks_nobody(base, server):
    first = run("daemon", "install")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].split() == ["directory:", str((base / "data/bin").resolve())]
    assert [line.split() for line in lines[1:]] == [
        ["containerd:", "1.0.0"],
        ["runc:", "1.0.1"],
        ["cni:", "1.0.2"],
    ]
    assert f"downloading {server.url}/{RUNC}" in first.stderr
    assert sorted(server.requests) == sorted([CONTAINERD, RUNC, CNI])
    second = run("daemon", "install")
    assert second.stdout == first.stdout
    assert "already there" in second.stderr
    assert len(server.requests) == 3


async def test_the_events_add_up(base, server):
    events: list[object] = []
    await install(load(), on_event=events.append)
    total = sum(len(body) for body in server.files.values())
    ends = {e.url: e for e in events if isinstance(e, ReleaseProgress)}
    assert sum(e.offset for e in ends.values()) == total
    assert all(e.offset == e.size for e in ends.values())
    finish = events[-1]
    assert isinstance(finish, ReleaseInstalled)
    assert finish.bytes_downloaded == total


async def test_many_at_once_download_once(base, server):
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serpentine", "daemon", "install", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    results = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    assert len(server.requests) == 3
    assert len(left(base / "data")) == 2


async def test_who_waits_is_told_why(base, server):
    go = threading.Event()

    def slow(handler, body):
        assert go.wait(30)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    server.faults[RUNC] = slow
    waiting = asyncio.Event()

    def show(event):
        if isinstance(event, ReleaseWaiting):
            waiting.set()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(install(load(), on_event=show)) for _ in range(2)]
        await waiting.wait()
        go.set()
    assert tasks[0].result() == tasks[1].result()
    assert len(server.requests) == 3


async def test_another_release_takes_its_place_and_the_one_before_stays(base, server):
    seen = []
    for mark in ("one", "two", "three", "four"):
        server.files = small_releases(mark)
        server.sums(base / "sums")
        done = await install(load(), on_event=ignore)
        assert mark in (base / "data/bin/runc").read_text()
        assert (base / "data/bin").resolve() == done.directory
        seen.append(done.directory.name)
    assert left(base / "data") == sorted(["bin", *seen[-2:]])
    # Back to the one before: it is still there.
    asked = len(server.requests)
    server.files = small_releases("three")
    server.sums(base / "sums")
    assert (await install(load(), on_event=ignore)).directory.name == seen[2]
    assert len(server.requests) == asked


async def test_one_that_a_process_runs_from_stays(base, server):
    shell = Path("/bin/sh").resolve().read_bytes()
    server.files[RUNC] = shell
    server.sums(base / "sums")
    first = await install(load(), on_event=ignore)
    process = await asyncio.create_subprocess_exec(
        *(first.directory / "runc", "-c", "read x"), stdin=subprocess.PIPE
    )
    try:
        for mark in ("two", "three"):
            server.files = small_releases(mark)
            server.sums(base / "sums")
            last = await install(load(), on_event=ignore)
        assert first.directory.name in left(base / "data")
    finally:
        process.kill()
        await process.wait()
    server.files = small_releases("four")
    server.sums(base / "sums")
    await install(load(), on_event=ignore)
    assert first.directory.name not in left(base / "data")
    assert last.directory.name in left(base / "data")


async def test_what_was_harmed_is_mended(base, server):
    first = await install(load(), on_event=ignore)
    (first.directory / "cni/bridge").unlink()
    assert installed(base / "data") is None
    assert await install(load(), on_event=ignore) == first
    assert (first.directory / "cni/bridge").exists()
    assert left(base / "data") == ["bin", first.directory.name]


# --- what goes wrong -------------------------------------------------------------------------


async def refused(kind: type[Exception] = DaemonFailed) -> str:
    """Install, and return the one line of the failure with its remedy; nothing may be left."""
    events: list[object] = []
    with pytest.raises(kind) as caught:
        await install(load(), on_event=events.append)
    assert caught.value.hint
    assert not any(isinstance(event, ReleaseInstalled) for event in events)
    data = load().data_dir
    if data.is_dir():
        assert left(data) == []
    return f"{caught.value}; {caught.value.hint}"


@pytest.mark.parametrize("path", [CONTAINERD, RUNC, CNI])
async def test_a_wrong_sum_is_refused(base, server, path):
    server.files[path] += b"x"
    told = await refused()
    assert f"{server.url}/{path} is not the file that was released" in told
    assert server.requests.count(path) == 1, "asking again does not help"


async def test_nothing_is_unpacked_before_it_is_verified(base, server, monkeypatch):
    def unpack(*_: object) -> None:
        pytest.fail("unpacked")

    monkeypatch.setattr(releases, "_publish", unpack)
    server.files[CNI] = server.files[CNI][:-1] + b"x"
    await refused()


def broken_off(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def without_length(handler, body):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def reset(handler, body):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def unavailable(handler, body):
    handler.send_error(503)


@pytest.mark.parametrize("fault", [broken_off, reset, unavailable])
async def test_a_broken_transfer_is_tried_three_times(base, server, fault):
    server.faults[RUNC] = fault
    told = await refused()
    assert f"cannot download {server.url}/{RUNC}" in told
    assert "SERPENTINE_RELEASES_URL" in told
    # aiohttp repeats by itself what got no answer at all.
    assert server.requests.count(RUNC) == (6 if fault is reset else 3)


async def test_a_short_body_that_does_not_say_so_is_refused(base, server):
    server.faults[CONTAINERD] = without_length
    assert "is not the file that was released" in await refused()


async def test_a_transfer_that_works_the_second_time(base, server):
    def once(handler, body):
        del server.faults[CONTAINERD]
        broken_off(handler, body)

    server.faults[CONTAINERD] = once
    events: list[object] = []
    done = await install(load(), on_event=events.append)
    assert installed(base / "data") == done
    (retry,) = [event for event in events if isinstance(event, Retrying)]
    assert retry.what.endswith(CONTAINERD)


async def test_a_stalled_transfer_ends(base, server, monkeypatch):
    monkeypatch.setattr(releases, "READ_TIMEOUT", 0.1)
    stop = threading.Event()

    def stall(handler, body):
        broken_off(handler, body)
        handler.wfile.flush()
        stop.wait(30)

    server.faults[CONTAINERD] = stall
    try:
        assert "nothing came for a while" in await refused()
    finally:
        stop.set()


async def test_a_file_that_is_not_there(base, server):
    server.sums(base / "sums")
    del server.files[RUNC]
    told = await refused()
    assert f"{server.url}/{RUNC} does not exist" in told
    assert "SERPENTINE_RELEASES_URL" in told
    assert server.requests.count(RUNC) == 1


async def test_a_login_is_wanted(base, server):
    server.faults[RUNC] = lambda handler, _: handler.send_error(401)
    assert ".netrc" in await refused()


async def test_a_redirect_is_followed(base, server):
    def elsewhere(handler, _):
        handler.send_response(302)
        handler.send_header("Location", f"{server.url}/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.files["elsewhere"] = server.files[RUNC]
    server.faults[RUNC] = elsewhere
    await install(load(), on_event=ignore)
    assert "elsewhere" in server.requests


async def test_nobody_is_there(base, server, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setenv("SERPENTINE_RELEASES_URL", url)
        told = await refused()
    assert f"cannot download {url}/" in told
    assert "connection refused" in told
    assert "HTTPS_PROXY" in told


async def test_too_much_is_not_taken(base, server, monkeypatch):
    def endless(handler, _):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))

    monkeypatch.setattr(releases, "MAX_DOWNLOAD", 3 * 1024 * 1024)
    server.faults[CNI] = endless
    assert "larger than 3 MiB" in await refused()

    def says_so(handler, _):
        handler.send_response(200)
        handler.send_header("Content-Length", str(2**40))
        handler.end_headers()
        handler.wfile.write(b"x")

    server.faults[CNI] = says_so
    assert "larger than 3 MiB" in await refused()


async def test_an_archive_that_unpacks_to_too_much(base, server, monkeypatch):
    monkeypatch.setattr(releases, "MAX_UNPACKED", 1024)
    server.files[CNI] = archive({"./bridge": bytes(1025)})
    server.sums(base / "sums")
    assert "unpacks to more than" in await refused()


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = target
    return member


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CONTAINERD, b"no archive", "it is no archive"),
        (CONTAINERD, b"\x1f\x8b\x08broken", "it is no archive"),
        (CONTAINERD, small_releases()[CONTAINERD][:90], "it is no archive"),
        (CONTAINERD, archive({"bin/ctr": b"1"}), "no containerd and no containerd-shim-runc-v2"),
        (CONTAINERD, archive({}, link("bin/ctr", "/bin/sh")), "no regular file"),
        (CNI, archive({}), "no plugin"),
        (CNI, archive({"../../escaped": b"1", "/escaped": b"1"}), "no plugin"),
        (CNI, archive({"a": b"1", "./a": b"2"}), "exists"),
    ],
)
async def test_an_archive_that_is_of_no_use(base, server, path, body, named):
    server.files[path] = body
    server.sums(base / "sums")
    told = await refused()
    assert named in told
    assert f"{server.url}/{path}" in told
    assert not list(base.rglob("escaped"))


async def test_the_disk_is_full(base, server):
    data = base / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(data)], check=True)
    try:
        # The download fits, what is in it does not; then not even the download.
        server.files[CNI] = archive({"./bridge": bytes(4 * 1024 * 1024)})
        server.sums(base / "sums")
        unpacking = await refused()
        server.files[CNI] = os.urandom(4 * 1024 * 1024)
        server.sums(base / "sums")
        downloading = await refused()
    finally:
        subprocess.run(["umount", str(data)], check=True)
    for told in (unpacking, downloading):
        assert "the disk is full" in told
        assert f"{server.url}/{CNI}" in told
        assert "SERPENTINE_DATA_DIR" in told


def test_a_directory_that_we_may_not_write(base, server):
    # Everything is imported first: nobody may not be allowed to read where Python lies.
    code = (
        "import os, sys, aiohttp, serpentine.cli.daemon, serpentine.cli.main as m\n"
        "import platformdirs.unix, concurrent.futures.thread\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(m._run(['daemon', 'install']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
        env={**os.environ, "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{base / 'data'}: permission denied" in done.stderr
    assert "SERPENTINE_DATA_DIR" in done.stderr


async def test_a_file_in_the_way_of_the_directory(base, server, monkeypatch):
    (base / "file").touch()
    monkeypatch.setenv("SERPENTINE_DATA_DIR", str(base / "file/data"))
    assert "not a directory" in await refused()
    assert server.requests == []


async def test_a_directory_of_somebody_elses_in_the_place_of_the_link(base, server):
    (base / "data/bin").mkdir(parents=True)
    with pytest.raises(DaemonFailed, match="in the way") as caught:
        await install(load(), on_event=ignore)
    assert caught.value.hint
    assert left(base / "data") == ["bin"]
    assert server.requests == []


async def test_a_denied_directory_is_a_permission_error(base, server, monkeypatch):
    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(base / "data/x"))

    monkeypatch.setattr(releases.tempfile, "mkdtemp", denied)
    assert "permission denied" in await refused(DaemonPermission)


def test_a_bad_sums_file_ends_with_2(base, server):
    (base / "sums").write_text("what\n")
    done = run("daemon", "install")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"line 1 of {base / 'sums'}" in done.stderr
    with pytest.raises(InvalidSetting):
        asyncio.run(install(load(), on_event=ignore))
    assert server.requests == []


# --- ended in the middle ---------------------------------------------------------------------


@pytest.fixture
def held(server):
    """A download that stands still in its middle; gives the event that it does."""
    reached, go = threading.Event(), threading.Event()

    def hold(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:20])
        handler.wfile.flush()
        reached.set()
        go.wait(30)

    server.faults[CONTAINERD] = hold
    yield reached
    go.set()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_killed_in_the_middle(base, server, held, number, status):
    process = subprocess.Popen(
        [sys.executable, "-m", "serpentine", "daemon", "install"], stderr=subprocess.PIPE
    )
    assert held.wait(30)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert b"Traceback" not in err
    assert installed(base / "data") is None
    if number != signal.SIGKILL:
        assert left(base / "data") == []

    # The next one does all of it, and takes away what the killed one left.
    server.faults.clear()
    done = run("daemon", "install", "--json")
    assert done.returncode == 0, done.stderr
    assert len(left(base / "data")) == 2


async def test_cancelled_anywhere_it_is_all_or_nothing(base, server):
    """At each of the moments at which something else runs."""
    step = 0
    while True:
        task = asyncio.get_running_loop().create_task(install(load(), on_event=ignore))
        for _ in range(step):
            await asyncio.sleep(0)
        early = not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or not early or task.exception() is None
        data = base / "data"
        found = left(data) if data.exists() else []
        assert found == [] or (len(found) == 2 and installed(data) is not None), (step, found)
        if not early:
            break
        shutil.rmtree(data, ignore_errors=True)
        step = step * 5 // 4 + 1
