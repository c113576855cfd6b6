"""How much is free on containerd's disk, and when that cannot be known."""

from __future__ import annotations

import socket
import sys

import pytest

from serpentine.containerd import Endpoint
from serpentine.daemon import disk


@pytest.mark.skipif(sys.platform != "linux", reason="looks below /proc")
def test_who_passes_on_what_it_hears_says_nothing_of_containerds_disk(tmp_path):
    """A socket that ssh forwards, say: the same path here is another disk."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listens:
        listens.bind(str(path))
        listens.listen()
        assert disk.free_there(Endpoint.parse(str(path)), [str(tmp_path)]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="looks below /proc")
def test_nobody_listens(tmp_path):
    assert disk.free_there(Endpoint.parse(str(tmp_path / "none")), [str(tmp_path)]) is None
