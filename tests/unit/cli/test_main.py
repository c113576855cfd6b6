"""The command line without a containerd: help, usage, exit codes, and what it imports."""

import json
import subprocess
import sys

import pytest

import serpentine
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


def test_every_public_name_is_there():
    for name in serpentine.__all__:
        assert getattr(serpentine, name) is not None
    assert dir(serpentine) == sorted(serpentine.__all__)
    with pytest.raises(AttributeError):
        serpentine.no_such_name  # noqa: B018
