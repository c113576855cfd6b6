"""Which containerd is used, and what is said when there is none."""

import pytest

from serpentine.daemon.discovery import Host, choose
from serpentine.errors import DaemonNotFound
from serpentine.settings import Settings

ROOT = Host(system="linux", is_root=True, containerd="/usr/bin/containerd", runc="/usr/sbin/runc")


def test_an_address_wins_and_its_source_is_told():
    settings = Settings(address="/x.sock", sources={"address": "CONTAINERD_ADDRESS"})
    choice = choose(settings, Host("win32", False, None, None), embedded_runs=True)
    assert choice.kind == "address"
    assert "CONTAINERD_ADDRESS" in choice.reason
    assert choose(Settings(address="/x"), ROOT).reason == "an address was given"


def test_root_with_the_programs_gets_its_own():
    assert choose(Settings(), ROOT).kind == "embedded"


def test_one_that_runs_is_used_whoever_asks():
    host = Host(system="linux", is_root=False, containerd=None, runc=None)
    assert choose(Settings(), host, embedded_runs=True).kind == "embedded"


@pytest.mark.parametrize(
    ("host", "named"),
    [
        (Host("linux", True, None, "/r"), "containerd not found"),
        (Host("linux", True, "/c", None), "runc not found"),
        (Host("linux", True, None, None), "containerd and runc not found"),
        (Host("linux", False, "/c", "/r"), "only root"),
        (Host("darwin", True, "/c", "/r"), "darwin"),
        (Host("win32", False, None, None), "win32"),
    ],
)
def test_without_one_the_remedy_is_named(host, named):
    with pytest.raises(DaemonNotFound) as caught:
        choose(Settings(), host)
    assert named in str(caught.value)
    assert "--address" in caught.value.hint
