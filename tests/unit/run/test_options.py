"""What a step can be asked to be, and what is refused before anything is started."""

from __future__ import annotations

import signal

import pytest

from serpentine.errors import InvalidSetting
from serpentine.run.options import (
    Bind,
    RunOptions,
    Tmpfs,
    parse_size,
    signal_name,
    signal_number,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("17b", 17),
        ("64k", 64 << 10),
        ("64K", 64 << 10),
        ("64kb", 64 << 10),
        ("64KiB", 64 << 10),
        ("512m", 512 << 20),
        (" 512M ", 512 << 20),
        ("1.5g", 3 << 29),
        ("2t", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "m", "-1m", "1e3", "1 m", "1,5g", "1p", "0x10", "1.m", "1\n2"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(InvalidSetting, match="size") as caught:
        parse_size(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("term", 15),
        ("sigterm", 15),
        (" SIGINT ", 2),
        ("15", 15),
        (9, 9),
        ("SIGRTMIN", 34),
        ("RTMIN+3", 37),
        ("SIGRTMAX-14", 50),
        ("SIGRTMAX", 64),
        (64, 64),
    ],
)
def test_signals(value, number):
    assert signal_number(value) == number


def test_signals_have_linux_numbers():
    """This runs on Linux, where the standard library knows them, too."""
    for known in signal.Signals:
        if known.name not in ("SIGRTMIN", "SIGRTMAX"):
            assert signal_number(known.name.replace("SIGCLD", "SIGCHLD")) == known.value
            assert signal_name(known.value) in ("SIGIO", known.name)
    assert signal_name(40) == "signal 40"


@pytest.mark.parametrize(
    "value", ["", "SIG", "SIGNONE", "0", 0, 65, -1, "-9", "9.0", "²", "RTMIN+31", "RTMAX-64"]
)
def test_signals_that_are_none(value):
    with pytest.raises(InvalidSetting, match="signal"):
        signal_number(value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"network": "weave"}, "'weave'"),
        ({"network": ""}, "network"),
        ({"working_dir": "relative"}, "'relative'"),
        ({"working_dir": ""}, "working directory"),
        ({"working_dir": "/a\x00b"}, "working directory"),
        ({"hostname": ""}, "hostname"),
        ({"hostname": "a b"}, "'a b'"),
        ({"hostname": "-a"}, "'-a'"),
        ({"hostname": "a" * 64}, "hostname"),
        ({"hostname": "a\n127.0.0.1 b"}, "hostname"),
        ({"extra_hosts": {"a b": "10.0.0.1"}}, "'a b'"),
        ({"extra_hosts": {"": "10.0.0.1"}}, "host"),
        ({"extra_hosts": {"db": "10.0.0"}}, "'10.0.0'"),
        ({"extra_hosts": {"db": "10.0.0.1\n10.0.0.2 evil"}}, "address"),
        ({"memory": 1 << 20}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"cpus": -1.0}, "cpus"),
        ({"cpus": float("nan")}, "cpus"),
        ({"cpus": float("inf")}, "cpus"),
        ({"pids": 0}, "processes"),
        ({"timeout": 0}, "time limit"),
        ({"timeout": float("nan")}, "time limit"),
        ({"grace": -1}, "grace"),
        ({"max_output": -1}, "output"),
        ({"shm_size": -1}, "shm"),
        ({"stop_signal": "SIGNONE"}, "'SIGNONE'"),
        ({"stop_signal": 0}, "signal"),
        ({"ulimits": {"nofiles": (1, 1)}}, "'nofiles'"),
        ({"ulimits": {"nofile": (2, 1)}}, "nofile"),
        ({"ulimits": {"nofile": (-1, 1)}}, "nofile"),
        ({"ulimits": {"nofile": (-2, -1)}}, "nofile"),
        ({"binds": [Bind("/etc", "etc")]}, "'etc'"),
        ({"binds": [Bind("/etc", "/")]}, "'/'"),
        ({"binds": [Bind("etc", "/etc")]}, "'etc'"),
        ({"binds": [Bind("/etc", "/a/../etc")]}, "'/a/../etc'"),
        ({"binds": [Bind("/etc", "/a"), Bind("/usr", "/a")]}, "'/a'"),
        ({"binds": [Bind("/etc", "/a")], "tmpfs": [Tmpfs("/a/")]}, "'/a/'"),
        ({"tmpfs": [Tmpfs("tmp")]}, "'tmp'"),
        ({"tmpfs": [Tmpfs("//")]}, "'//'"),
        ({"env": {"": "x"}}, "environment"),
        ({"env": {"A=B": "x"}}, "'A=B'"),
        ({"env": {"A": "x\x00"}}, "environment"),
        ({"env": {"A\x00": None}}, "environment"),
        ({"args": ["a\x00b"]}, "command"),
        ({"args": "a\x00b"}, "command"),
        ({"entrypoint": ["a\x00b"]}, "command"),
    ],
)
def test_refused(options, named):
    with pytest.raises(InvalidSetting) as caught:
        RunOptions(**options)
    assert named in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"network": "none"},
        {"working_dir": "/not there"},
        {"hostname": "a"},
        {"hostname": "db-1.example.org"},
        {"hostname": "a" * 63},
        {"extra_hosts": {"db": "10.0.0.1", "db6": "fe80::1", "my_db": "::1"}},
        {"memory": 6 << 20},
        {"cpus": 0.01},
        {"pids": 1},
        {"timeout": 0.001, "grace": 0},
        {"max_output": 0},
        {"stop_signal": "SIGRTMIN+1"},
        {"ulimits": {"nofile": (10, 10), "CORE": (0, -1), "fsize": (-1, -1)}},
        {"binds": [Bind("/etc", "/etc/a..b")]},
        {"tmpfs": [Tmpfs("/a"), Tmpfs("/a/b")]},
        {"env": {"A": "", "B": None, "C": "a=b\n", "ä": "ö"}},
        {"args": []},
        {"args": ""},
    ],
)
def test_accepted(options):
    RunOptions(**options)
