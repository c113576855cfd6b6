"""The command line without a containerd: help, usage, exit codes, and what it imports."""

import gc
import json
import subprocess
import sys
import warnings

import pytest

import serpentine
from serpentine.cli import _common
from serpentine.cli.main import COMMANDS, _run


def test_version(capsys):
    assert _run(["version"]) == 0
    assert capsys.readouterr().out == f"serpentine {serpentine.__version__}\n"
    assert _run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serpentine"] == serpentine.__version__


def test_help_names_every_command(capsys):
    assert _run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert name in out
        assert text in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(capsys, name):
    assert _run([name, "--help"]) == 0
    assert f"serpentine {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["pull"],
        ["pull", "alpine", "--no-such-option"],
        ["pull", "alpine", "--progress", "loud"],
        ["pull", "alpine", "--platform", "linux"],
        ["--namespace", "a/b", "pull", "alpine"],
        ["--address", "tcp:what:7", "pull", "alpine"],
        ["rmi"],
        ["--address", "/x.sock", "daemon", "start"],
        ["--address", "/x.sock", "daemon", "stop"],
    ],
)
def test_usage_errors_end_with_2_and_no_traceback(capsys, arguments):
    assert _run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize("reference", ["UPPER", "a b", "", "x:", "x@sha256:1", "https://x/y"])
def test_a_bad_reference_is_one_line_and_ends_with_1(capsys, reference):
    assert _run(["pull", reference]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("serpentine: ")
    assert err.count("\n") == 1
    assert "; " in err, "the remedy follows"


def test_start_up_imports_only_what_the_command_needs():
    heavy = {"grpc", "aiohttp", "rich", "msgspec", "google", "asyncio", "platformdirs", "json"}
    for arguments in (["version"], ["--help"]):
        code = (
            "import sys\n"
            "from serpentine.cli.main import _run\n"
            f"_run({arguments!r})\n"
            f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
        )
        assert done.stderr.splitlines()[-1] == "[]"


# What a pull of an image that is all here has no need of, from a registry on loopback.
NOT_FOR_A_WARM_PULL = {
    "aiohttp",
    "aiodocker",
    "backports.zstd",
    "cryptography",
    "http.client",
    "isal",
    "pathspec",
    "rich",
    "serpentine.containerd.containers",
    "serpentine.containerd.diff",
    "serpentine.containerd.tasks",
    "serpentine.daemon.container",
    "serpentine.daemon.discovery",
    "serpentine.daemon.embedded",
    "serpentine.pull.fetch",
    "serpentine.pull.job",
    "serpentine.pull.local",
    "serpentine.pull.space",
    "serpentine.pull.unpack",
    "serpentine.registry.client",
    "serpentine.registry.transport",
    "serpentine.run",
    "serpentine.telemetry",
    "serpentine.upkeep",
    "statistics",
    "tarfile",
    "tomllib",
    "urllib.request",
    "yarl",
}


def test_a_warm_pull_imports_no_client_and_nothing_that_fetches():
    modules = "serpentine.cli.pull, serpentine.pull.source, serpentine.registry.look"
    code = f"import sys, {modules}\nprint(sorted({NOT_FOR_A_WARM_PULL!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"


def test_at_its_end_the_collector_has_nothing_to_look_through():
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > gc.get_count()[0]))\n"
        "from serpentine.cli.main import main\n"
        "main(['version'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "True"


def test_the_collector_is_off_for_imports_only():
    code = (
        "import atexit, gc\n"
        "from serpentine.cli import _common\n"
        "from serpentine.cli.main import main\n"
        "async def work(): return gc.isenabled()\n"
        "atexit.register(lambda: print(gc.isenabled(), _common.run(work)))\n"
        "main(['version'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "False True"


def test_every_public_name_is_there():
    for name in serpentine.__all__:
        assert getattr(serpentine, name) is not None
    assert dir(serpentine) == sorted(serpentine.__all__)
    with pytest.raises(AttributeError):
        serpentine.no_such_name  # noqa: B018


def test_ctrl_c_before_the_work_begins(monkeypatch, capsys):
    """Python complains of a coroutine that nobody began, behind the one line that counts."""

    def interrupted(_):
        raise KeyboardInterrupt

    async def work():
        pytest.fail("it was begun")

    monkeypatch.setattr("asyncio.run", interrupted)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            _common.run(work)
        gc.collect()
    assert seen == []
    assert capsys.readouterr().err == ""
