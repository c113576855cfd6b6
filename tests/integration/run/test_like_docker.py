"""Beside Docker: the same image and the same question, to ``docker run`` and to us.

Each probe is a few lines of shell; those with the same options share a container.  Where we
answer otherwise, and mean to, the table says why; a difference that is gone must leave it.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from serpentine.errors import StepError
from serpentine.run.options import Bind, Tmpfs
from tests.conftest import CONTAINERDS
from tests.support.images import Image, image, push
from tests.support.servers import ContainerdServer
from tests.support.steps import step_layers

CONFIG = {
    "Env": ["A=image", "B=image", "HOME=/image"],
    "WorkingDir": "/data",
    "User": "app",
    "Entrypoint": ["/bin/echo", "entry"],
    "Cmd": ["cmd", "a  b"],
    "StopSignal": "SIGINT",
}


@dataclass(frozen=True)
class Group:
    """Options for both, and what is asked with them: name to shell."""

    docker: tuple[str, ...] = ()
    ours: dict[str, Any] = field(default_factory=dict)
    network: str = "none"
    image: str = "plain"
    probes: dict[str, str] = field(default_factory=dict)


STATUS = "grep -E '^({}):' /proc/self/status"
MOUNTS = (
    "while read -r source target kind options rest; do case $target in {}) echo"
    # Without the names of the machine's own layers and disks.
    " $target $kind $(echo $options | tr , '\\n' | sort | grep -Ev"
    " '^(lowerdir|upperdir|workdir|seclabel|inode64|uuid|nouserxattr|xino)' | tr '\\n' ,);;"
    " esac; done </proc/mounts | sort"
)  # fmt: skip
TRY = "for p in {}; do if {} >/dev/null 2>&1; then echo $p yes; else echo $p no; fi; done"

GROUPS = {
    "plain": Group(
        probes={
            "environment": "env | grep -v ^HOSTNAME= | grep -v ^SHLVL= | sort",
            "user": "id",
            "groups": STATUS.format("Uid|Gid|Groups"),
            "working directory": "pwd; readlink /proc/self/cwd",
            "umask": "umask; touch /tmp/u; mkdir /tmp/v; stat -c %a /tmp/u /tmp/v",
            "capabilities": STATUS.format("Cap.*"),
            "seccomp": STATUS.format("Seccomp|NoNewPrivs"),
            "signals": "grep -E '^Sig(Ign|Blk)' /proc/1/status",
            "limits": "ulimit -a | grep -v 'time\\|pending\\|file size'",
            "oom": "cat /proc/self/oom_score_adj",
            "first process": "cut -d: -f2- /proc/1/status | head -n 1; echo $$",
            "file descriptors": "ls /proc/self/fd | head -n 3; readlink /proc/1/fd/0",
            "no terminal": "tty; test -t 1 || echo none; test -e /dev/console && echo console",
            "hostname": "test $(hostname) = $HOSTNAME && test $(cat /etc/hostname) = $HOSTNAME"
            " && expr length $HOSTNAME",
            "hosts": "grep -v $HOSTNAME /etc/hosts | tr -s '\\t ' ' '",
            "files of /etc": "for f in hosts hostname resolv.conf; do"
            " stat -c '%n %a %u %g %F' /etc/$f; done",
            "devices": "ls /dev | sort",
            "modes of devices": "cd /dev; stat -c '%n %a %u:%g %t:%T %F' *",
            "links of devices": "cd /dev; for f in *; do readlink $f; done; echo",
            "device limits": TRY.format(
                "1:3 1:1 1:7 5:0 8:0 10:229 10:200",
                "mknod /tmp/d$p c ${{p%:*}} ${{p#*:}} && (exec <>/tmp/d$p)".replace("{{", "{")
                .replace("}}", "}"),
            ),
            "mounts": MOUNTS.format("/|/etc/*|/run/*"),
            "mounts of the kernel": MOUNTS.format("/proc|/dev|/dev/*|/sys"),
            "cgroups": "mount | grep -c ' type cgroup'; ls /sys/fs/cgroup",
            "cgroups are read-only": "mkdir /sys/fs/cgroup/memory/x 2>/dev/null || echo no",
            "own cgroup": "cut -d: -f3 /proc/self/cgroup | sort -u | sed 's/[0-9a-f]\\{64\\}/ID/'",
            "masked files": "for p in kcore keys latency_stats timer_list timer_stats sched_debug"
            " interrupts; do echo $p $(head -c 100 /proc/$p 2>&1 | wc -c); done",
            "masked directories": "ls -A /proc/acpi /proc/scsi /proc/asound /sys/firmware 2>&1",
            "read-only paths": TRY.format(
                "/proc/sys/kernel/panic /proc/irq/default_smp_affinity /sys/kernel/mm/ksm/run"
                " /proc/sys/net/ipv4/ip_forward /proc/self/comm",
                "[ -e $p ] && (exec >>$p)",
            ),
            "sysctls": "for p in net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range"
            " net/ipv4/ip_forward kernel/shmmax fs/mqueue/msg_max kernel/msgmax;"
            " do echo $p $(cat /proc/sys/$p); done",
            "shared memory": "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
            "permitted": "chroot / true && echo chroot; chown app /tmp/u && echo chown;"
            " mknod /tmp/null c 1 3 && echo mknod; ping -c 1 127.0.0.1 >/dev/null && echo ping",
            "forbidden": "mount -t tmpfs x /mnt; hostname x; date -s 2020-01-01 >/dev/null;"
            " ip link add x type dummy; unshare -U true; sysctl -w kernel.panic=1; true",
            "interfaces": "ls /sys/class/net; ip -4 addr show lo | grep -o 'inet [^ ]*'",
            "links to the outside": "readlink /etc/mtab; ls -ld /var/run 2>&1; true",
            "root directory": "stat -c '%a %u:%g' /; ls / | sort",
            "set-user-ID": "stat -c %a /data/suid; grep -q nosuid /proc/mounts && echo; true",
            "personality": "uname -m; cat /proc/self/personality",
            "cpus": "nproc; cat /proc/self/status | grep Cpus_allowed_list",
            "keys": "cat /proc/key-users 2>&1 | wc -l | grep -c .",
        }
    ),
    "user": Group(
        docker=("-u", "app"),
        ours={"user": "app"},
        probes={
            "of a user: groups": "id; " + STATUS.format("Uid|Gid|Groups"),
            "of a user: home": "echo $HOME; cd; pwd; touch x && stat -c %u:%g x",
            "of a user: capabilities": STATUS.format("Cap.*"),
            "of a user: files": TRY.format("/x /tmp/x /etc/x /dev/x /dev/shm/x", "touch $p"),
            "of a user: ports and ping": "ping -c 1 127.0.0.1 >/dev/null && echo ping;"
            " nc -w 1 -l -p 80 </dev/null",
            "of a user: stdout": "echo x >/dev/stdout; echo x >/dev/stderr",
        },
    ),
    "user and group": Group(
        docker=("-u", "app:audio"),
        ours={"user": "app:audio"},
        probes={"of user and group": STATUS.format("Uid|Gid|Groups") + "; echo $HOME"},
    ),
    "unknown number": Group(
        docker=("-u", "4242"),
        ours={"user": "4242"},
        probes={"of an unknown number": STATUS.format("Uid|Gid|Groups") + "; echo $HOME; pwd"},
    ),
    "number as a name": Group(
        docker=("-u", "12:100"),
        ours={"user": "12:100"},
        probes={"of a number that is a name": STATUS.format("Uid|Gid|Groups") + "; echo $HOME"},
    ),
    "without a home": Group(
        docker=("-u", "homeless"),
        ours={"user": "homeless"},
        probes={"of a user without a home": "echo \"[$HOME]\"; id"},
    ),
    "image": Group(
        docker=("--entrypoint=/bin/sh", "-e", "B=mine", "-e", "C=", "-e", "HOSTNAME=mine"),
        ours={"env": {"B": "mine", "C": "", "HOSTNAME": "mine"}},
        image="configured",
        probes={
            "environment of an image": "env | grep -v SHLVL= | grep -v PWD= | sort",
            "user and directory of an image": "id -u; pwd",
        },
    ),
    "directory": Group(
        docker=("-w", "/new/deep/er", "-u", "app"),
        ours={"working_dir": "/new/deep/er", "user": "app"},
        probes={"a directory that is made": "pwd; stat -c '%a %u:%g' /new /new/deep . "},
    ),
    "read-only": Group(
        docker=("--read-only",),
        ours={"read_only": True},
        probes={
            "read-only root": TRY.format(
                "/x /etc/hosts /etc/hostname /etc/resolv.conf /tmp/x /dev/x /dev/shm/x /run/x",
                "(exec >>$p)",
            ),
        },
    ),
    "tmpfs": Group(
        docker=("--tmpfs", "/tmp", "--tmpfs", "/new:size=64k,mode=0700", "--tmpfs", "/data"),
        ours={"tmpfs": [Tmpfs("/tmp"), Tmpfs("/new", 64 << 10, 0o700), Tmpfs("/data")]},
        probes={
            "tmpfs": "for d in /tmp /new /data; do stat -c '%n %a %u:%g' $d; ls -A $d; done;"
            " df -k /new | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
            "programs in a tmpfs": "cp /bin/busybox /tmp/busybox; /tmp/busybox true && echo ran",
        },
    ),
    "no capabilities": Group(
        docker=("--cap-drop=ALL",),
        ours={"cap_drop": ["ALL"]},
        probes={
            "no capabilities": STATUS.format("Cap.*"),
            "no capabilities: forbidden": "chown app /tmp; chroot / true; touch /data/x;"
            " mknod /tmp/null c 1 3; touch /home/app/x; true",
        },
    ),
    "more capabilities": Group(
        docker=("--cap-add=NET_ADMIN", "--cap-drop=CHOWN", "--cap-drop=kill"),
        ours={"cap_add": ["NET_ADMIN"], "cap_drop": ["CHOWN", "kill"]},
        probes={
            "more and fewer capabilities": STATUS.format("Cap.*"),
            "more capabilities: permitted": "ip addr add 10.1.1.1/32 dev lo && echo added",
        },
    ),
    "no new privileges": Group(
        docker=("--security-opt=no-new-privileges", "-u", "app"),
        ours={"no_new_privileges": True, "user": "app"},
        probes={"no new privileges": STATUS.format("NoNewPrivs") + "; /data/suid; echo $?"},
    ),
    "limits": Group(
        docker=("--memory=64m", "--cpus=0.5", "--pids-limit=50", "--shm-size=1m",
                "--ulimit=nofile=64:128", "--ulimit=core=0"),
        ours={"memory": 64 << 20, "cpus": 0.5, "pids": 50, "shm_size": 1 << 20,
              "ulimits": {"nofile": (64, 128), "core": (0, 0)}},
        probes={
            "ulimits": "ulimit -Sn; ulimit -Hn; ulimit -c",
            "size of shared memory": "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
            "limit of memory": "cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
            " /sys/fs/cgroup/memory.max 2>/dev/null; true",
            "limit of swap": "cat /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"
            " /sys/fs/cgroup/memory.swap.max 2>/dev/null; true",
            "limit of processes": "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max"
            " 2>/dev/null; true",
            "limit of cpus": "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max"
            " 2>/dev/null; true",
        },
    ),
    "names": Group(
        docker=("--hostname=me.example", "--add-host=db:10.9.9.9", "--add-host=db6:fe80::1"),
        ours={"hostname": "me.example", "extra_hosts": {"db": "10.9.9.9", "db6": "fe80::1"}},
        probes={
            "a hostname": "hostname; cat /etc/hostname; echo $HOSTNAME; uname -n",
            "hosts that were added": "grep db /etc/hosts | tr -s '\\t ' ' '",
        },
    ),
    "binds": Group(
        docker=("-v", "FOLDER:/rw", "-v", "FOLDER/sub:/ro:ro", "-v", "FOLDER/file:/etc/hosts"),
        ours={"binds": [Bind("FOLDER", "/rw"), Bind("FOLDER/sub", "/ro", True),
                        Bind("FOLDER/file", "/etc/hosts")]},
        probes={
            "bind mounts": "cat /rw/file /etc/hosts; touch /rw/made && ls /rw; touch /ro/x;"
            " ls /ro; stat -c '%a %u:%g' /rw /ro; rm /rw/made",
            "options of bind mounts": "grep -E ' /(rw|ro) ' /proc/self/mountinfo | "
            "sed 's/.* - //; s/ .*//' ; grep -c 'shared:' /proc/self/mountinfo; true",
        },
    ),
    "terminal": Group(
        docker=("-t",),
        ours={"terminal": True},
        probes={
            "a terminal": "tty; test -t 0 && test -t 1 && test -t 2 && echo all; stty size;"
            " stty -a | grep -o ' [-]*\\(echo\\|isig\\|onlcr\\)'",
            "environment of a terminal": "env | grep TERM",
            "devices of a terminal": "ls /dev | sort; stat -c '%a %t:%T' /dev/console",
        },
    ),
    "bridge": Group(
        network="bridge",
        probes={
            "interfaces of a bridge": "ls /sys/class/net; cat /sys/class/net/eth0/mtu;"
            " ip link show eth0 | grep -o 'UP,LOWER_UP'; ip route | cut -d' ' -f1 | "
            "sed 's/^[0-9].*/own/' | sort -u",
            "number of routes": "ip route | wc -l",
            "own address in hosts": "ip -4 addr show eth0 | grep -o 'inet [0-9.]*' | cut -d' ' -f2"
            " >/tmp/a; grep -c \"^$(cat /tmp/a)[[:space:]]*$HOSTNAME$\" /etc/hosts",
            "resolvers": "grep -v '^#' /etc/resolv.conf | grep .",
            "a bridge: sysctls": "cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
            " /proc/sys/net/ipv4/ip_forward",
        },
    ),
    "host": Group(
        network="host",
        probes={
            "interfaces of the host": "ls -d /sys/class/net/lo; ip link | grep -c . | grep -c .;"
            " touch /sys/x; true",
            "name of the host": "hostname",
        },
    ),
}  # fmt: skip

# What we do otherwise, and why.
DIFFERENT = {
    "oom": "one more than the daemon's, as its shim has it; to set it takes a capability that a"
    " daemon in a container may lack",
    "own cgroup": "a namespace of its own also with cgroup v1, where Docker shows the host's path",
    "masked files": "/proc/interrupts is masked, as newer versions of Docker do",
    "links to the outside": "no /etc/mtab is made: it would be in every state that is committed",
    "of a user without a home": "HOME=/ in place of an empty one, which means any directory",
    "programs in a tmpfs": "they can be run: builds do so in /tmp",
    "limit of swap": "the limit is the limit: no swap on top of it, which would only be slow",
    "number of routes": "one more, to the gateway: a step has a link of its own and no neighbours",
    "name of the host": "a step has a name of its own on every network",
}


@dataclass(frozen=True)
class Run:
    """A run of its own: what it ends with counts, too."""

    args: tuple[str, ...] | None = None
    docker: tuple[str, ...] = ()
    ours: dict[str, Any] = field(default_factory=dict)
    image: str = "plain"
    stdin: bytes | None = None


SH = ("/bin/sh", "-c")
RUNS = {
    "exit 0": Run((*SH, "echo out; echo err >&2")),
    "exit 7": Run((*SH, "echo out; exit 7")),
    "exit 255": Run((*SH, "exit 255")),
    "no such program": Run(("none",)),
    "no such path": Run(("/bin/none",)),
    "no program on the path": Run(("unexecutable",)),
    "a directory": Run(("/data",)),
    "no permission": Run(("/bin/unexecutable",)),
    "below a file": Run(("/etc/passwd/none",)),
    "wrong format": Run(("/bin/garbage",)),
    "no interpreter": Run(("/bin/no-interpreter",)),
    "empty command": Run(("",)),
    "no command": Run(None, ("--entrypoint=",), {"entrypoint": []}, "configured"),
    "no such user": Run(("true",), ("-u", "nobody"), {"user": "nobody"}),
    "no such group": Run(("true",), ("-u", "app:none"), {"user": "app:none"}),
    "user out of range": Run(("true",), ("-u", "4294967295"), {"user": "4294967295"}),
    "a file as directory": Run(("true",), ("-w", "/etc/passwd"), {"working_dir": "/etc/passwd"}),
    "killed by SIGKILL": Run((*SH, "kill -9 $$; sh -c 'kill -9 $$'; exit $?")),
    "SIGTERM to oneself": Run((*SH, "kill $$; echo deaf; sh -c 'kill $$'; exit $?")),
    "SIGSEGV to oneself": Run((*SH, "sh -c 'kill -SEGV $$'; exit $?")),
    "out of memory": Run(
        ("dd", "if=/dev/zero", "of=/dev/null", "bs=200000000", "count=1"),
        ("--memory=16m",), {"memory": 16 << 20},
    ),
    "a script": Run(("script", "a b", "c")),
    "entry point and command": Run(None, image="configured"),
    "entry point and arguments": Run(("x  y", "z"), image="configured"),
    "another entry point": Run(("x",), ("--entrypoint=/bin/echo",), {"entrypoint": ["/bin/echo"]},
                               "configured"),
    "another entry point alone": Run(None, ("--entrypoint=pwd",), {"entrypoint": ["pwd"]},
                                     "configured"),
    "command of the image": Run(None),
    "input": Run(("cat",), ("-i",), {"stdin": True}, stdin=b"some\xff\n"),
    "no input": Run((*SH, "cat; wc -c"), stdin=b"some\n"),
    "bytes": Run((*SH, r"printf '\377\000\r\n\n'; printf '\200' >&2")),
    "environment without names": Run(("env",), ("-e", "A=1", "-e", "A=2", "--hostname=h"),
                                     {"env": {"A": "2"}, "hostname": "h"}),
}  # fmt: skip

DIFFERENT_RUNS = {
    "below a file": "126, as for all that cannot be run, not 125, which says that we failed",
    "wrong format": "126 and an error, not the runtime's own words as if they were the program's",
    "no interpreter": "127 and an error, for the same reason",
}


# --- the two -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docker_images(docker):
    """Load the images into Docker, with their configuration; return their names."""
    return {name: load(docker, name, made) for name, made in images(docker=True).items()}


def images(*, docker: bool = False) -> dict[str, Image]:
    layers = step_layers(docker=docker)
    return {
        "plain": image(layers, docker=docker, config={"Cmd": ["/bin/echo", "command"]}),
        "configured": image(layers, docker=docker, config=CONFIG),
    }


def load(docker, name: str, made: Image) -> str:
    tag = f"like-docker-{name}:1"
    manifest = json.loads(made.data)
    config = manifest["config"]["digest"]
    blobs = [one["digest"] for one in manifest["layers"]]
    entry = {"Config": f"{config}.json", "RepoTags": [tag], "Layers": [f"{b}.tar" for b in blobs]}
    path = docker.folder / "load.tar"
    with tarfile.open(path, "w") as tar:
        for member, data in [
            (entry["Config"], made.blobs[config]),
            *((f"{blob}.tar", made.blobs[blob]) for blob in blobs),
            ("manifest.json", json.dumps([entry]).encode()),
        ]:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    docker.run("load", "--input", str(path))
    path.unlink()
    return tag


@pytest.fixture(scope="module")
def newest():
    with ContainerdServer(CONTAINERDS[max(CONTAINERDS)]) as server:
        yield server


@pytest.fixture(scope="module")
def states(newest, registry):
    async def fill():
        async with newest.connect(namespace="like-docker") as engine:
            return {
                name: await engine.pull_image(push(registry, f"like/{name}", "1", made))
                for name, made in images().items()
            }

    return asyncio.run(fill())


@dataclass(frozen=True)
class Ended:
    """How a run ended; errors of the engine itself are told as such, not in their words."""

    code: int
    out: bytes
    err: bytes


@pytest.fixture(scope="module")
def by_docker(docker, docker_images):
    def run(image, args, options, stdin=None) -> Ended:
        done = subprocess.run(
            [*docker.client, "run", "--rm", *options, docker_images[image], *(args or ())],
            input=stdin or b"",
            capture_output=True,
            timeout=50,
        )
        own = done.stderr.startswith(b"docker: Error") or b"\ndocker: Error" in done.stderr
        return Ended(done.returncode, done.stdout, b"(refused)" if own else done.stderr)

    return run


@pytest.fixture(scope="module")
def by_us(newest, states):
    def run(image, args, options, stdin=None) -> Ended:
        async def work() -> Ended:
            async def use(step):
                if options.get("stdin"):
                    await step.write(stdin)

            async with newest.connect(namespace="like-docker") as engine:
                try:
                    result = await engine.run(states[image], args, use=use, commit=False, **options)
                except StepError as error:
                    return Ended(error.exit_code, error.output, b"(refused)")
                return Ended(result.exit_code, result.stdout, result.stderr)

        return asyncio.run(work())

    return run


def script_of(group: Group) -> str:
    """Return a shell script that answers all probes: name, what it printed, its status."""
    parts = [
        f"echo; echo '@@@ {name}'; ( {probe}\n) 2>&1; echo \"=== $?\""
        for name, probe in group.probes.items()
    ]
    return "; ".join(parts)


def answers(output: bytes) -> dict[str, str]:
    text = output.decode(errors="replace").replace("\r\n", "\n")
    return {
        name: body.rstrip()
        for name, body in re.findall(r"^@@@ (.*?)\n(.*?^=== \d+)$", text, re.DOTALL | re.MULTILINE)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bound")
    path.chmod(0o755)
    (path / "sub").mkdir()
    (path / "file").write_text("from outside\n")
    return path


@pytest.fixture(scope="module")
def answered(by_docker, by_us, folder):
    """Return a function that asks both all of a group, once."""
    known: dict[str, tuple[dict[str, str], dict[str, str]]] = {}

    def ask(name: str):
        if name not in known:
            group = GROUPS[name]
            given = [f"--network={group.network}"]
            given += [word.replace("FOLDER", str(folder)) for word in group.docker]
            ours = {"network": group.network, **group.ours}
            if "binds" in ours:
                ours["binds"] = [
                    Bind(b.source.replace("FOLDER", str(folder)), b.target, b.read_only)
                    for b in ours["binds"]
                ]
            script = script_of(group)
            args = ["-c", script] if group.image == "configured" else [*SH, script]
            if group.image == "configured":
                ours["entrypoint"] = ["/bin/sh"]
            docker, mine = by_docker(group.image, args, given), by_us(group.image, args, ours)
            assert docker.code == mine.code == 0, (docker, mine)
            known[name] = answers(docker.out), answers(mine.out)
            assert known[name][0].keys() == group.probes.keys(), docker
            assert known[name][1].keys() == group.probes.keys(), mine
        return known[name]

    return ask


CASES = [(group, name) for group, made in GROUPS.items() for name in made.probes]


@pytest.mark.parametrize(("group", "name"), CASES, ids=[name for _, name in CASES])
def test_answers(answered, group, name):
    theirs, ours = (found[name] for found in answered(group))
    if name in DIFFERENT:
        assert ours != theirs, f"no difference any more: {DIFFERENT[name]}"
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", RUNS)
def test_runs(by_docker, by_us, name):
    run = RUNS[name]
    theirs = by_docker(run.image, run.args, ("--network=none", *run.docker), run.stdin)
    ours = by_us(run.image, run.args, {"network": "none", **run.ours}, run.stdin)
    if name in DIFFERENT_RUNS:
        assert ours != theirs, f"no difference any more: {DIFFERENT_RUNS[name]}"
    else:
        assert ours == theirs


@pytest.mark.parametrize("image", ["plain", "configured"])
def test_stop_signals(docker, docker_images, by_us, image):
    """The image's own, and SIGTERM by default."""
    script = "trap 'exit 4' TERM; trap 'exit 5' INT; echo x; while :; do sleep 0.02; done"
    name = f"stopped-{image}"
    docker.run(
        *("run", "--detach", "--name", name, "--network=none", "--entrypoint=/bin/sh"),
        *(docker_images[image], "-c", script),
    )
    deadline = time.monotonic() + 20
    while "x" not in docker.run("logs", name):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    docker.run("stop", name)
    theirs = int(docker.run("wait", name))
    docker.run("rm", name)
    # Long enough for the shell to set its traps.
    ours = by_us(image, script, {"network": "none", "timeout": 2.0})
    assert ours.code == theirs == {"plain": 4, "configured": 5}[image]


def test_the_table_is_long_enough():
    """Done when 4."""
    assert len(CASES) + len(RUNS) >= 40
    assert DIFFERENT.keys() <= {name for _, name in CASES}
    assert DIFFERENT_RUNS.keys() <= RUNS.keys()
