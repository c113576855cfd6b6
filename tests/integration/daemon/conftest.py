"""What the tests of our own daemon share: the command line as a user of one engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.integration.conftest import Done
from tests.support.engines import OurDaemon


class Shell:
    """The command line with the settings of one user."""

    def __init__(self, ours: OurDaemon) -> None:
        self.ours = ours
        self.environ: dict[str, str] = {}
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, code: str = "", **environ: str) -> subprocess.Popen[str]:
        """Start a command; ``code`` is run in its Python before."""
        program = f"{code}\nfrom serpentine.cli.main import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.ours.environ, **self.environ, **environ},
        )
        self._started.append(process)
        return process

    def wait(self, process: subprocess.Popen[str], timeout: float = 60) -> Done:
        """Wait for a command that was started; it never ends in a traceback."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"still not done after {timeout} s: {out}{err}")
        assert "Traceback" not in err, err
        return Done(process.returncode, out, err)

    def __call__(self, *arguments: str, timeout: float = 60, code: str = "", **more: str) -> Done:
        return self.wait(self.start(*arguments, code=code, **more), timeout)

    def done(self, *arguments: str, **more: str) -> Done:
        """Run a command that must succeed."""
        found = self(*arguments, **more)
        assert found.status == 0, found.err
        return found

    def refused(self, *arguments: str, **more: str) -> str:
        """Run a command that must fail; return the one line that says why."""
        found = self(*arguments, **more)
        assert found.status == 1, (found.out, found.err)
        return error_of(found)

    def close(self) -> None:
        """End what a test that failed did not wait for."""
        for process in self._started:
            if process.returncode is None:
                process.kill()
                process.communicate()

    def state(self) -> dict:
        """Return what the engine knows of our containerd's container."""
        return self.ours.engine.inspect(self.ours.names.containerd)

    @property
    def id(self) -> str:
        return self.state()["Id"]

    def assert_single(self, *, envoy: bool = False) -> None:
        """Nothing is doubled: our containers and volumes are there once, and nothing else."""
        names = self.ours.names
        door = [names.envoy] if envoy else []
        assert self.ours.engine.containers() == sorted([names.containerd, *door])
        shared = [names.run_volume] if envoy else []
        assert self.ours.engine.volumes() == sorted([names.data_volume, *shared])

    def assert_nothing(self) -> None:
        assert self.ours.engine.containers() == []
        assert self.ours.engine.volumes() == []


def error_of(found: Done) -> str:
    """Return the error, which is one line, the last one."""
    lines = [line for line in found.err.splitlines() if line.startswith("serpentine: ")]
    assert lines == found.err.splitlines()[-1:], found.err
    return lines[0]


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


@pytest.fixture
def serpentine(ours):
    """The command line; the engine has none of our containers, whatever ran before."""
    ours.engine.clean()
    shell = Shell(ours)
    yield shell
    shell.close()
