"""The runtime specification: what each option changes in it, and what no option changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serpentine.errors import InvalidSetting, StepError
from serpentine.model.state import ContainerState
from serpentine.run.options import Bind, RunOptions, Tmpfs
from serpentine.run.spec import arguments, capabilities, environment, runtime_spec
from serpentine.run.users import User

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def state(**more):
    values = {"cmd": ("/bin/sh",), **more}
    return ContainerState(snapshot_key="k", snapshotter="s", platform="linux/amd64", **values)


def spec(made=None, *, who=None, files=None, hooks=None, machine=None, **options):
    found = runtime_spec(
        made or state(),
        RunOptions(**options),
        step="step-1",
        architecture="amd64",
        user=who or User(groups=(0,)),
        hostname="host",
        files=files or {},
        hooks=hooks,
        **(machine or {}),
    )
    json.dumps(found)
    return found


def changed(before, after, path=""):
    """Return the paths of two JSON values where they differ; lists count as one."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {
            found
            for key in before.keys() | after.keys()
            for found in changed(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        }
    return set() if before == after else {path}


def mounts(found):
    return {m["destination"]: m for m in found["mounts"]}


# --- what no option changes ------------------------------------------------------------------


def test_docker_s_capabilities_by_default():
    """The list of Docker's documentation; none inheritable (CVE-2022-24769)."""
    held = spec()["process"]["capabilities"]
    documented = (
        "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW "
        "SETFCAP SETGID SETPCAP SETUID SYS_CHROOT"
    )
    expected = [f"CAP_{name}" for name in documented.split()]
    assert held == {"bounding": expected, "effective": expected, "permitted": expected}


def test_isolation_by_default():
    linux = spec()["linux"]
    kinds = {n["type"] for n in linux["namespaces"]}
    assert kinds == {"pid", "ipc", "uts", "mount", "cgroup", "network"}
    assert not any("path" in n for n in linux["namespaces"])
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger", "/proc/irq"} <= set(linux["readonlyPaths"])
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert linux["cgroupsPath"] == "/serpentine/step-1"


def test_kernel_s_file_systems_cannot_be_written():
    found = mounts(spec())
    for path in ("/sys", "/sys/fs/cgroup"):
        assert "ro" in found[path]["options"]
    for path in ("/proc", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm"):
        assert {"nosuid", "noexec", "nodev"} <= set(found[path]["options"]), path
    assert {"nosuid"} <= set(found["/dev"]["options"])


# --- each option, and only its own effect -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "value"),
    [
        ({"args": ["a", "b"]}, "process.args", ["a", "b"]),
        ({"working_dir": "/w"}, "process.cwd", "/w"),
        ({"terminal": True}, "process.terminal", True),
        ({"no_new_privileges": True}, "process.noNewPrivileges", True),
        ({"read_only": True}, "root.readonly", True),
        (
            {"memory": 7 << 20},
            "linux.resources.memory",
            {"limit": 7 << 20, "swap": 7 << 20},
        ),
        ({"cpus": 1.5}, "linux.resources.cpu", {"period": 100_000, "quota": 150_000}),
        ({"cpus": 0.000001}, "linux.resources.cpu", {"period": 100_000, "quota": 1000}),
        ({"pids": 7}, "linux.resources.pids", {"limit": 7}),
        (
            {"ulimits": {"nofile": (1, 2), "core": (0, -1)}},
            "process.rlimits",
            [
                {"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1},
            ],
        ),
    ],
)
def test_changes_one_thing(options, where, value):
    before, after = spec(), spec(**options)
    for part in where.split("."):
        after = after[part]
    assert after == value
    found = changed(before, spec(**options))
    # TERM comes with a terminal.
    assert {p for p in found if not p.startswith(where)} <= (
        {"process.env"} if "terminal" in options else set()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 1},
        {"grace": 1},
        {"stop_signal": "SIGINT"},
        {"commit": False},
        {"check": True},
        {"stdin": True},
        {"max_output": 1},
        {"network": "none"},
        {"user": "somebody"},
        {"hostname": "other"},
        {"extra_hosts": {"a": "10.0.0.1"}},
    ],
)
def test_options_that_others_read(options):
    assert spec(**options) == spec()


def test_the_user_is_who_was_resolved():
    process = spec(who=User(5, 6, (6, 7), "/h"))["process"]
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [6, 7]}
    assert "HOME=/h" in process["env"]


def test_the_network_of_the_host():
    """It has no network namespace, so neither its sysctls nor a sysfs of its own."""
    found = spec(network="host")
    assert "network" not in {n["type"] for n in found["linux"]["namespaces"]}
    assert "sysctl" not in found["linux"]
    sys = mounts(found)["/sys"]
    assert (sys["type"], sys["source"]) == ("bind", "/sys")
    assert "ro" in sys["options"]
    assert spec()["linux"]["sysctl"] == {
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 2147483647",
    }


def test_hooks_are_passed_on():
    assert "hooks" not in spec()
    assert spec(hooks={"poststop": []})["hooks"] == {"poststop": []}
    assert "hooks" not in spec(hooks={})


def test_binds():
    found = mounts(spec(binds=[Bind("/here", "/there"), Bind("/a", "/b", read_only=True)]))
    assert found["/there"]["source"] == "/here"
    assert {"rbind", "rprivate", "rw"} == set(found["/there"]["options"])
    assert {"rbind", "rprivate", "ro"} == set(found["/b"]["options"])


def test_files_of_ours():
    files = {"/etc/hosts": "/x/hosts"}
    found = mounts(spec(files=files))["/etc/hosts"]
    assert (found["type"], found["source"]) == ("bind", "/x/hosts")
    assert "ro" not in found["options"]
    assert "ro" in mounts(spec(files=files, read_only=True))["/etc/hosts"]["options"]


def test_tmpfs():
    found = mounts(spec(tmpfs=[Tmpfs("/t"), Tmpfs("/u", size=4096, mode=0o700)]))
    assert found["/t"]["type"] == "tmpfs"
    assert {"nosuid", "nodev", "mode=1777"} == set(found["/t"]["options"])
    assert {"nosuid", "nodev", "mode=700", "size=4096"} == set(found["/u"]["options"])


def test_the_size_of_shared_memory():
    assert "size=67108864" in mounts(spec())["/dev/shm"]["options"]
    assert "size=1048576" in mounts(spec(shm_size=1 << 20))["/dev/shm"]["options"]


def test_mounts_below_others_come_later():
    """Whatever the order in which they were given; the kernel's file systems first of all."""
    found = spec(
        files={"/etc/hosts": "/x/hosts"},
        binds=[Bind("/a", "/data/deep/er"), Bind("/b", "/etc")],
        tmpfs=[Tmpfs("/data"), Tmpfs("/dev/shm/x"), Tmpfs("/data/deep")],
    )
    order = [m["destination"] for m in found["mounts"]]
    for place, path in enumerate(order):
        assert not any(later != path and path.startswith(f"{later}/") for later in order[place:])


# --- capabilities -----------------------------------------------------------------------------

DEFAULT = set(capabilities(RunOptions()))


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        (["NET_ADMIN"], [], DEFAULT | {"CAP_NET_ADMIN"}),
        (["cap_net_admin"], [], DEFAULT | {"CAP_NET_ADMIN"}),
        (["CHOWN"], [], DEFAULT),
        ([], ["chown", "CAP_KILL"], DEFAULT - {"CAP_CHOWN", "CAP_KILL"}),
        ([], ["SYS_ADMIN"], DEFAULT),
        ([], ["ALL"], set()),
        (["CHOWN", "SYS_TIME"], ["all"], {"CAP_CHOWN", "CAP_SYS_TIME"}),
        # Dropped wins, unless everything is dropped to begin from nothing.
        (["SYS_TIME"], ["SYS_TIME"], DEFAULT),
    ],
)
def test_capabilities(add, drop, expected):
    found = capabilities(RunOptions(cap_add=add, cap_drop=drop))
    assert set(found) == expected
    assert found == sorted(found)
    process = spec(cap_add=add, cap_drop=drop)["process"]
    assert process["capabilities"]["bounding"] == found


def test_all_capabilities():
    known = int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1
    found = capabilities(RunOptions(cap_add=["ALL"]))
    assert len(found) == len(set(found)) == 41
    # If a kernel has more, they have names that nobody gave them when this was written.
    assert known <= 41
    assert set(found) - {"CAP_SYS_ADMIN"} == set(
        capabilities(RunOptions(cap_add=["ALL"], cap_drop=["SYS_ADMIN"]))
    )


@pytest.mark.parametrize("field", ["cap_add", "cap_drop"])
@pytest.mark.parametrize("name", ["", "CAP_", "NET", "CAP_CAP_CHOWN", "CHOWN,KILL"])
def test_no_capability(field, name):
    with pytest.raises(InvalidSetting, match="capability"):
        capabilities(RunOptions(**{field: [name]}))


def test_capabilities_open_their_system_calls():
    def allowed(**options):
        calls = spec(**options)["linux"]["seccomp"]["syscalls"]
        return {n for c in calls if c["action"] == "SCMP_ACT_ALLOW" for n in c["names"]}

    assert "mount" not in allowed()
    assert "mount" in allowed(cap_add=["SYS_ADMIN"])
    assert "chroot" in allowed()
    assert "chroot" not in allowed(cap_drop=["SYS_CHROOT"])


# --- arguments --------------------------------------------------------------------------------

ENTRY = {"entrypoint": ("/entry", "-e"), "cmd": ("command",)}


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (ENTRY, {}, ["/entry", "-e", "command"]),
        (ENTRY, {"args": ["x", "y"]}, ["/entry", "-e", "x", "y"]),
        (ENTRY, {"args": []}, ["/entry", "-e"]),
        (ENTRY, {"args": "x y"}, ["/bin/sh", "-c", "x y"]),
        (ENTRY, {"args": ""}, ["/bin/sh", "-c", ""]),
        (ENTRY, {"entrypoint": ["other"]}, ["other"]),
        (ENTRY, {"entrypoint": ["other"], "args": ["x"]}, ["other", "x"]),
        (ENTRY, {"entrypoint": [], "args": ["x"]}, ["x"]),
        (ENTRY, {"entrypoint": ["other"], "args": "x y"}, ["/bin/sh", "-c", "x y"]),
        ({"cmd": ("command", "-c")}, {}, ["command", "-c"]),
        ({"cmd": ("command", "-c")}, {"args": ["x"]}, ["x"]),
    ],
)
def test_arguments(image, options, expected):
    assert arguments(state(**image), RunOptions(**options)) == expected


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ({"cmd": ()}, {}),
        ({"cmd": ("x",)}, {"args": []}),
        (ENTRY, {"entrypoint": []}),
    ],
)
def test_no_command(image, options):
    with pytest.raises(StepError, match="no command") as caught:
        arguments(state(**image), RunOptions(**options))
    assert caught.value.hint


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        ((), {}, [PATH, "HOSTNAME=h", "HOME=/home"]),
        ((), {"terminal": True}, [PATH, "HOSTNAME=h", "TERM=xterm", "HOME=/home"]),
        # The image's come in place of the defaults, what was asked for in place of both.
        (
            ("PATH=/bin", "A=1", "HOME=/image", "HOSTNAME=image"),
            {},
            ["PATH=/bin", "HOSTNAME=image", "A=1", "HOME=/image"],
        ),
        (
            ("PATH=/bin", "A=1"),
            {"env": {"B": "2", "PATH": "/sbin", "A": "3"}},
            ["PATH=/sbin", "HOSTNAME=h", "A=3", "B=2", "HOME=/home"],
        ),
        (("A=1", "B=2"), {"env": {"A": None}}, [PATH, "HOSTNAME=h", "B=2", "HOME=/home"]),
        ((), {"env": {"PATH": None, "HOME": None}}, ["HOSTNAME=h"]),
        ((), {"env": {"HOME": "/mine"}}, [PATH, "HOSTNAME=h", "HOME=/mine"]),
        ((), {"env": {"TERM": "dumb"}, "terminal": True},
         [PATH, "HOSTNAME=h", "TERM=dumb", "HOME=/home"]),
        # Values may hold everything; the last of several counts.
        (("A=b=c", "A=d=e", "E="), {}, [PATH, "HOSTNAME=h", "A=d=e", "E=", "HOME=/home"]),
    ],
)  # fmt: skip
def test_environment(image, options, expected):
    found = environment(state(env=image), RunOptions(**options), hostname="h", home="/home")
    assert found == expected


def test_the_working_directory():
    assert spec()["process"]["cwd"] == "/"
    assert spec(state(working_dir="/image"))["process"]["cwd"] == "/image"
    assert spec(state(working_dir=""))["process"]["cwd"] == "/"
    assert spec(state(working_dir="/image"), working_dir="/w")["process"]["cwd"] == "/w"


# --- what the daemon's machine cannot do -------------------------------------------------------


def test_without_cgroups_none_is_named_and_no_limit_is_promised():
    """The runtime of a rootless engine fails to make one that it was told to make."""
    assert changed(spec(), spec(machine={"cgroups": False})) == {"linux.cgroupsPath"}
    for limit in ({"memory": 64 << 20}, {"cpus": 1}, {"pids": 7}):
        with pytest.raises(StepError, match="cannot limit"):
            spec(machine={"cgroups": False}, **limit)


def test_in_a_user_namespace_no_group_outside_of_it_is_named():
    name = "linux.sysctl.net.ipv4.ping_group_range"
    assert changed(spec(), spec(machine={"rootless": True})) == {name}
    host = spec(network="host", machine={"rootless": True})
    assert changed(spec(network="host"), host) == set()
