"""Users without root: those who may use Docker or Podman, and those who may not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import ENGINE_GROUP
from tests.support.images import busybox_layer, image, push
from tests.support.steps import step_image
from tests.support.users import as_user

MEMBER, STRANGER = 54001, 54002


@pytest.fixture
def member(ours):
    """Return a function that runs the command line as a user in the engine's group."""
    folder = ours.folder
    folder.chmod(0o755)
    for name in ("data", "run"):
        (folder / name).mkdir()
    (folder / "home").mkdir()
    for name in ("data", "run", "home"):
        os.chown(folder / name, MEMBER, MEMBER)
    ours.uid = MEMBER
    environ = {
        # No containerd on it.
        "PATH": "/bin",
        "HOME": str(folder / "home"),
        **ours.environ,
    }
    environ.pop("SERPENTINE_DAEMON")

    def run(*arguments: str, user: int = MEMBER, groups=(ENGINE_GROUP,), **more: str):
        done = as_user(
            user,
            user,
            sys.executable,
            "-m",
            "serpentine.cli",
            *arguments,
            groups=groups,
            environ={**environ, **more},
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.mark.timeout(180)
def test_a_member_of_the_group_pulls_with_nothing_set_up(ours, member, registry):
    """Done when 1 and 2."""
    reference = push(registry, "users/member", "1", image([busybox_layer()]))
    done = member("pull", "--json", reference)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image"].startswith(f"{registry.address}/users/member@sha256:")
    status = json.loads(member("daemon", "status", "--json").stdout)
    assert (status["kind"], status["transport"]) == (ours.engine.kind, "socket")
    assert ours.engine.containers().count(ours.names.containerd) == 1

    socket = Path(status["endpoint"].removeprefix("unix://"))
    owner = socket.stat()
    assert (owner.st_uid, owner.st_gid) == (MEMBER, MEMBER)
    assert socket.parent.stat().st_mode & 0o777 == 0o700

    # Another user cannot even see the socket, whether or not they may use the engine.
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect(sys.argv[1])\n"
        "except PermissionError: print('refused')\n"
    )
    for groups in ((), (ENGINE_GROUP,)):
        tried = as_user(
            STRANGER,
            STRANGER,
            "/usr/bin/python3",
            "-c",
            code,
            str(socket),
            groups=groups,
            environ={"PATH": "/usr/bin:/bin"},
        )
        assert tried.stdout == "refused\n", tried.stderr
    told = member("--address", str(socket), "images", user=STRANGER, groups=())
    assert told.returncode == 1
    assert "permission denied" in told.stderr
    assert len(told.stderr.splitlines()) == 1


@pytest.mark.timeout(180)
def test_who_may_not_use_the_engine_is_told_what_to_do(ours, member):
    told = member("images", groups=())
    assert told.returncode == 1
    assert len(told.stderr.splitlines()) == 1
    assert str(ours.engine.socket) in told.stderr
    assert "permission denied" in told.stderr
    if ours.engine.kind == "docker":
        assert "docker" in told.stderr.partition(";")[2]
    assert ours.names.containerd not in ours.engine.containers()


@pytest.mark.timeout(180)
def test_a_member_of_the_group_runs_steps(ours, member, registry):
    """The pipes are theirs, and containerd's shims, which are root's, find them."""
    reference = push(registry, "users/step", "1", step_image())
    script = "id -u; id -g; cat /etc/hostname; echo problem >&2; exit 7"
    done = member("run", "--user", "app", "--hostname", "here", reference, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (7, "1000\n100\nhere\n"), done.stderr
    assert done.stderr.endswith("problem\n")
    assert list((ours.folder / "run" / "engine" / "steps").iterdir()) == []
