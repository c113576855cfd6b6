"""Endpoints, the translation of errors, and the generated code."""

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from serpentine import errors
from serpentine.containerd import Endpoint
from serpentine.containerd._errors import translate
from serpentine.errors import ContainerdError, InvalidSetting

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "address", "socket"),
    [
        ("/run/c.sock", "unix:///run/c.sock", "/run/c.sock"),
        ("unix:///run/c.sock", "unix:///run/c.sock", "/run/c.sock"),
        ("unix:/run/c.sock", "unix:///run/c.sock", "/run/c.sock"),
        ("localhost:1", "localhost:1", None),
        ("tcp://10.0.0.1:65535", "10.0.0.1:65535", None),
        ("[::1]:9000", "[::1]:9000", None),
    ],
)
def test_addresses(text, address, socket):
    endpoint = Endpoint.parse(text)
    assert (endpoint.address, endpoint.socket_path) == (address, socket)
    assert Endpoint.parse(endpoint.address) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "c.sock", "unix://c.sock", "host", "host:", "host:0", "host:65536", "host:x", "::1:9",
     "http://host:80/x", "host:²", "/" + "x" * 107, "unix:///" + "ü" * 60],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(InvalidSetting) as caught:
        Endpoint.parse(text)
    assert caught.value.hint


def test_no_token_in_repr():
    endpoint = Endpoint("h:1", metadata=(("authorization", "s3cr3t"),), root_certificates=b"s3cr3t")
    assert "s3cr3t" not in f"{endpoint!r} {endpoint}"


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda c: c.name)
def test_every_code_has_a_translation(code):
    error = translate(code, "what happened")
    assert isinstance(error, ContainerdError)
    assert error.code == code.name
    assert "what happened" in str(error)
    assert translate(code, None)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("UNAVAILABLE", "ref layer-x locked for 3s (since …): unavailable", errors.Locked),
        ("UNKNOWN", "truncate failed: ref n/1/r locked for 3s (since …)", errors.Locked),
        ("INTERNAL", "ref n/1/r locked for 3s (since …)", ContainerdError),
        ("UNAVAILABLE", "connection refused", errors.Unavailable),
        ("UNAVAILABLE", "the door is locked", errors.Unavailable),
        ("UNKNOWN", "write /x: no space left on device", errors.NoSpace),
        ("UNKNOWN", "cannot delete a running process: unknown", errors.FailedPrecondition),
        ("UNKNOWN", "failed: cannot exec in a stopped state", errors.FailedPrecondition),
        ("UNKNOWN", 'exec: "cannot start a running process": not found', ContainerdError),
        ("UNKNOWN", "something", ContainerdError),
        ("UNAUTHENTICATED", "", errors.PermissionDenied),
        ("CANCELLED", "", errors.Unavailable),
        ("UNKNOWN", "Stream removed (RST_STREAM (Received RST_STREAM …))", errors.Unavailable),
        ("INTERNAL", "Received RST_STREAM with error code 2", errors.Unavailable),
        ("INTERNAL", "Internal error from Core", errors.Unavailable),
    ],
)
def test_texts_that_matter(code, details, kind):
    """Traps 7 and 25: one code, several meanings."""
    assert type(translate(grpc.StatusCode[code], details)) is kind


def test_the_generated_code_is_what_proto_says():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/gen-proto", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_drift_check_sees_drift(tmp_path):
    """The same script on a copy in which one message has a member more."""
    for name in ("proto", "scripts"):
        subprocess.run(["cp", "-r", ROOT / name, tmp_path], check=True)
    package = "src/serpentine/containerd/_proto"
    (tmp_path / package).parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", ROOT / package, tmp_path / package], check=True)
    changed = tmp_path / "proto/serpentine/containerd/_proto/version.proto"
    changed.write_text(changed.read_text().replace("revision = 2;", "revision = 2; string x = 3;"))
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts/gen-proto", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "version_pb2.py" in done.stdout
