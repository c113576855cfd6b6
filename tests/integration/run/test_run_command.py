"""``serpentine run`` and ``shell`` as their user sees them: streams, status, signals, terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support.images import BUSYBOX, busybox_layer, image, push

COMMAND = [sys.executable, "-m", "serpentine.cli"]


@pytest.fixture
def reference(registry):
    made = image([busybox_layer()], config={"Cmd": ["/bin/sh", "-c", "echo its own"]})
    return push(registry, "run/command", "1", made)


@pytest.fixture
def environ(containerd, namespace):
    return {**os.environ, **containerd.environ, "CONTAINERD_NAMESPACE": namespace}


@pytest.fixture
def nothing_left(contents):
    """After the test: no lease, and no snapshot but images'."""

    async def look():
        left = await contents()
        assert left.leases == []
        assert [s for s in left.snapshots if not s.startswith("sha256:")] == []

    return look


def test_output_status_and_streams(command, reference):
    done = command("run", reference)
    assert (done.status, done.out) == (0, "its own\n")
    done = command("run", "-q", reference, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.status, done.out, done.err) == (7, "out\n", "err\n")
    done = command("run", "--", reference, "sh", "-c", "kill -9 $$ & wait; exit 3")
    assert done.status == 3


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nosuch"], 127, "no program 'nosuch'"),
        (["/bin"], 126, "cannot run '/bin'"),
    ],
)
def test_what_cannot_be_run(command, reference, words, status, said):
    done = command("run", "-q", reference, *words)
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["-w", "relative"], 2, "absolute path"),
        (["-m", "lots"], 2, "512m"),
        (["-m", "1m"], 2, "6m"),
        (["--cpus", "0"], 2, "more than 0"),
        (["-v", "nowhere"], 2, "HOST:PATH"),
        (["--env-file", "/no/such/file"], 2, "/no/such/file"),
        (["--add-host", "x"], 2, "NAME:ADDRESS"),
        (["--ulimit", "nofile=many"], 2, "nofile=1024:2048"),
        (["--cap-add", "FLY"], 2, "FLY"),
        (["--stop-signal", "SIGNOTHING"], 2, "SIGTERM"),
        (["-u", "nobody:nogroup"], 125, "no user 'nobody'"),
        (["-it"], 2, "not a terminal"),
        (["--rm", "--keep"], 2, "contradict"),
        (["--commit", "UPPER/Case"], 125, "UPPER"),
        (["-v", "/no/such/folder:/x"], 125, "there is no such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(command, reference, words, status, said):
    command("pull", "-q", reference)
    done = command("run", *words, reference, "true")
    assert done.status == status, done.err
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_an_image_that_is_not_there(command, reference):
    done = command("run", "--pull", "never", reference, "true")
    assert done.status == 125
    assert "there is no image" in done.err
    done = command("run", "-q", f"{reference}-no", "true")
    assert done.status == 125
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("image", ["UPPER/Case", "@/no/such/file", "state-0123456789abcdef"])
def test_what_is_no_image(command, image):
    done = command("run", "-q", image, "true")
    assert done.status == (2 if image.startswith("@") else 125)
    assert len(done.err.splitlines()) == 1


def test_nobody_reads_the_output(environ, command, reference, nothing_left):
    """``| head -1``: the step ends, quietly."""
    command("pull", "-q", reference)
    for script in ("while :; do echo y; done", "for n in 1 2 3; do echo $n; sleep 0.3; done"):
        words = [*COMMAND, "run", "-q", reference, "--", "sh", "-c", script]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
        ) as step:
            assert step.stdout.readline() in (b"y\n", b"1\n")
            step.stdout.close()
            assert step.stderr.read() == b""
            assert step.wait(20) == 141
    asyncio.run(nothing_left())


def test_a_full_disk_on_stdout(environ, command, reference):
    command("pull", "-q", reference)
    for status, words in (
        (125, ["run", "-q", reference, "--", "sh", "-c", "while :; do echo y; done"]),
        (1, ["images"]),
        (1, ["pull", "-q", reference]),
    ):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, env=environ, timeout=30
            )
        assert done.returncode == status
        assert b"cannot write the output: No space left on device" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_states_on_the_command_line(command, reference, tmp_path, nothing_left):
    """From one step to the next, by key and by file; removed by both."""
    kept = command("run", "--keep", reference, "--", "sh", "-c", "echo 1 >/numbers")
    key = kept.err.splitlines()[-1].removeprefix("serpentine: kept as ")
    assert command("run", "-q", key, "cat", "/numbers").out == "1\n"
    more = command("run", "--keep", "--json", key, "--", "sh", "-c", "echo 2 >>/numbers")
    written = tmp_path / "state.json"
    written.write_text(more.out)
    assert command("run", "-q", f"@{written}", "--", "cat", "/numbers").out == "1\n2\n"
    assert command("cp", f"@{written}:/numbers", str(tmp_path / "out")).status == 0
    assert (tmp_path / "out").read_text() == "1\n2\n"
    # What was not kept is told as that.
    written.write_text(command("run", "--keep", "--json", key, "--", "sh", "-c", "exit 1").out)
    assert "has no state" in command("run", f"@{written}", "true").err
    written.write_text(more.out)
    removed = command("rmi", f"@{written}", key)
    assert removed.out == f"{more.json['state']['snapshot_key']}\n{key}\n"
    asyncio.run(nothing_left())


def test_options_reach_the_step(command, reference, tmp_path):
    variables = tmp_path / "env"
    variables.write_text("# a comment\nFROM_FILE=1\nPASSED\n")
    script = "echo $FROM_FILE $PASSED $GIVEN $PWD; id -u; id -g; hostname; cat /etc/hosts; ls /t"
    done = command(
        "run",
        *("-q", "--env-file", str(variables), "-e", "GIVEN=3", "-w", "/made/here", "-u", "7:8"),
        *("-h", "named", "--add-host", "other:10.9.8.7", "--tmpfs", "/t:size=1m,mode=700"),
        *("--network", "none", reference, "--", "sh", "-c", script),
        PASSED="2",
    )
    lines = done.out.splitlines()
    assert lines[:4] == ["1 2 3 /made/here", "7", "8", "named"]
    assert "10.9.8.7\tother" in lines
    # Mode 700, and not ours.
    assert done.status == 1
    assert "Permission denied" in done.err


def test_entrypoint_in_place_of_the_images(command, reference):
    done = command("run", "-q", "--entrypoint", "/bin/echo", reference, "a", "b")
    assert done.out == "a b\n"


def test_input(command, reference, environ):
    command("pull", "-q", reference)
    for given in (b"from a pipe\n" * 10_000, b""):
        done = subprocess.run(
            [*COMMAND, "run", "-i", reference, "cat"],
            input=given,
            capture_output=True,
            timeout=30,
            env=environ,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, given, b"")
    with BUSYBOX.open("rb") as file:
        done = subprocess.run(
            [*COMMAND, "run", "-i", reference, "busybox", "sha256sum"],
            stdin=file,
            capture_output=True,
            timeout=30,
            env=environ,
        )
    expected = subprocess.run(["sha256sum", BUSYBOX], capture_output=True).stdout
    assert done.stdout.split()[0] == expected.split()[0]


def test_json_and_a_state_that_is_kept(command, reference):
    done = command("run", "-q", "--json", "--keep", reference, "--", "sh", "-c", "echo x; >/file")
    assert done.status == 0
    assert done.json["exit_code"] == 0
    assert done.json["state"]["snapshot_key"].startswith("state-")
    assert done.err == "x\n"
    failed = command("run", "-q", "--json", "--keep", reference, "--", "sh", "-c", "exit 4")
    assert (failed.status, failed.json["exit_code"], failed.json["state"]) == (4, 4, None)


def test_committed_under_a_name(command, reference):
    done = command("run", "--commit", "made/here:1", reference, "--", "sh", "-c", "echo hi >/said")
    assert done.status == 0
    assert "recorded as docker.io/made/here:1" in done.err
    assert command("run", "-q", "made/here:1", "cat", "/said").out == "hi\n"
    assert "docker.io/made/here:1" in command("images", "-q").out


async def test_time_and_memory_are_limited(command, reference, nothing_left):
    command("pull", "-q", reference)
    begin = time.monotonic()
    done = command("run", "--timeout", "1", reference, "--", "sh", "-c", "trap 'exit 9' TERM; cat")
    assert done.status == 0  # no input: it ended at once
    script = "trap 'exit 9' TERM; while :; do sleep 0.05; done"
    done = command("run", "--timeout", "1", reference, "--", "sh", "-c", script)
    assert done.status == 9
    assert "did not end within 1 seconds" in done.err
    assert time.monotonic() - begin < 15
    done = command("run", "-m", "16m", reference, "--", "sh", "-c", "x=a; while :; do x=$x$x; done")
    assert done.status == 137
    assert "ran out of memory (its limit is 16 MiB)" in done.err
    await nothing_left()


def started(environ, reference, script, *options):
    """Start a step that says when it is ready; signals are its own from then on."""
    return subprocess.Popen(
        [*COMMAND, "run", "-q", *options, reference, "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
    )


# The shell is the first process: a signal that it does not handle would do nothing to it.
_READY = "while :; do echo ready; sleep 0.05; done"


def until_ready(process):
    """Wait for the second line: the first may come before our handlers stand."""
    for _ in range(6):
        assert process.stdout.readline() == b"ready\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
async def test_signals_are_passed_on(command, reference, environ, nothing_left, number):
    command("pull", "-q", reference)
    name = number.name.removeprefix("SIG")
    process = started(environ, reference, f"trap 'echo got {name}; exit 5' {name}; {_READY}")
    until_ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out.endswith(f"got {name}\n".encode())
    assert process.returncode == 5
    assert b"Traceback" not in err
    await nothing_left()


async def test_a_second_interrupt_ends_it_at_once(command, reference, environ, nothing_left):
    command("pull", "-q", reference)
    process = started(environ, reference, f"trap '' INT; {_READY}")
    until_ready(process)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert b"once more" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert time.monotonic() - begin < 8  # not the ten seconds that it would have had
    await nothing_left()


async def test_what_a_killed_client_left_goes_with_the_next_step(
    command, reference, environ, contents, containerd, namespace
):
    command("pull", "-q", reference)
    process = started(environ, reference, _READY)
    until_ready(process)
    process.kill()
    process.communicate()
    assert len((await contents()).leases) == 1
    # One that runs meanwhile is not touched.
    other = started(environ, reference, _READY)
    until_ready(other)
    left = await contents()
    assert len(left.leases) == 1
    listed = containerd.ctr("tasks", "ls", "-q", namespace=namespace).split()
    assert len(listed) == 1
    other.kill()
    other.communicate()
    assert command("run", "-q", reference).out == "its own\n"
    left = await contents()
    assert left.leases == []
    assert containerd.ctr("tasks", "ls", "-q", namespace=namespace).split() == []
    assert containerd.ctr("containers", "ls", "-q", namespace=namespace).split() == []


class Terminal:
    """The command on a terminal of ours; size in lines and columns."""

    def __init__(self, *arguments: str, environ: dict[str, str], size: tuple[int, int]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*COMMAND, *arguments], environ)
        self.resize(*size)

    def resize(self, lines: int, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (lines, columns))

    def read(self, seconds: float) -> str:
        ready, _, _ = select.select([self.fd], [], [], max(0, seconds))
        try:
            return os.read(self.fd, 65536).decode(errors="replace") if ready else ""
        except OSError:
            return ""  # the other end has gone

    def until(self, text: str, seconds: float = 20) -> str:
        """Read until a text appears."""
        found, deadline = "", time.monotonic() + seconds
        while text not in found:
            assert time.monotonic() < deadline, f"no {text!r} in {found!r}"
            found += self.read(0.5)
        return found

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def runs(self) -> bool:
        self._ended = getattr(self, "_ended", None) or os.waitpid(self.pid, os.WNOHANG)
        if self._ended == (0, 0):
            self._ended = None
        return self._ended is None

    def status(self) -> int:
        while self.runs():
            self.read(0.1)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(self._ended[1])


# Forking with gRPC's threads about is not safe; the child here calls nothing but exec.
_FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@_FORKS
def test_a_terminal(command, reference, environ):
    command("pull", "-q", reference)
    script = """
        trap 'echo was interrupted; exit 4' INT
        tty; stty size; echo ready
        read word; echo "got $word"
        trap 'stty size; echo resized' WINCH
        echo again; while :; do sleep 0.05; done
    """
    terminal = Terminal(
        "run", "-q", "-it", reference, "--", "sh", "-c", script, environ=environ, size=(33, 77)
    )
    assert "/dev/pts/0" in terminal.until("ready")
    terminal.type("word\n")
    assert "got word" in terminal.until("again")
    terminal.resize(44, 88)
    assert "44 88" in terminal.until("resized")
    terminal.type("\x03")
    terminal.until("was interrupted")
    assert terminal.status() == 4


@_FORKS
def test_what_is_typed_before_it_starts_is_its_input(command, reference, environ):
    command("pull", "-q", reference)
    script = 'read line; echo "got $line"'
    terminal = Terminal(
        "run", "-q", "-it", reference, "--", "sh", "-c", script, environ=environ, size=(24, 80)
    )
    terminal.type("typed ahead\n")
    assert terminal.until("got typed ahead")
    assert terminal.status() == 0


@_FORKS
def test_a_shell(command, reference, environ):
    command("pull", "-q", reference)
    terminal = Terminal("shell", reference, environ=environ, size=(24, 80))
    terminal.until("# ")
    # The shell throws away what was typed before it reads line by line: so, until it listens.
    while terminal.runs():
        terminal.type("exit 4\n")
        terminal.read(0.5)
    assert terminal.status() == 4


def test_help_names_the_options_of_a_docker_user(command):
    done = command("run", "--help")
    for option in ("--env", "--volume", "--memory", "--network", "--entrypoint", "--commit"):
        assert option in done.out
    assert json.dumps(done.err) == '""'
