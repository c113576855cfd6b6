"""The network of steps as plain values: hooks, files, resolvers."""

from __future__ import annotations

import json
import subprocess

import pytest

from serpentine.run.network import (
    BRIDGE_PREFIX,
    SERVICES_SUBNET,
    STATE,
    SUBNET,
    Network,
    choose_resolv_conf,
)
from serpentine.run.options import Bind, RunOptions

NETWORK = Network(plugins=("/a", "/b c"), own_resolv_conf=b"nameserver 10.0.0.53\n")
THEIRS = Network(plugins=("/a",), resolv_conf="/run/theirs")


def hosts(**options):
    files = NETWORK.files(RunOptions(**options), "me")
    lines = files["hosts"].decode().splitlines()
    return [tuple(line.split("\t")) for line in lines]


def test_files():
    files = NETWORK.files(RunOptions(), "me")
    assert files["hostname"] == b"me\n"
    assert files["resolv.conf"] == b"nameserver 10.0.0.53\n"
    assert set(files) == {"hostname", "hosts", "resolv.conf"}
    assert set(THEIRS.files(RunOptions(), "me")) == {"hostname", "hosts"}


def test_hosts():
    loopback = [("127.0.0.1", "localhost"), ("::1", "localhost ip6-localhost ip6-loopback")]
    assert hosts()[:2] == loopback
    # With the bridge, the hook appends the address that the step gets.
    assert not any("me" in names for _, names in hosts())
    for network in ("none", "host"):
        assert hosts(network=network)[-1] == ("127.0.0.1", "me")
    extra = hosts(extra_hosts={"db": "10.0.0.1", "db6": "fe80::1"})
    assert extra[-2:] == [("10.0.0.1", "db"), ("fe80::1", "db6")]
    assert extra[:2] == loopback


def test_what_a_user_mounts_wins():
    options = RunOptions(binds=[Bind("/x", "/etc/hosts")])
    given = {"hosts": "/r/hosts", "hostname": "/r/hostname", "resolv.conf": "/r/resolv.conf"}
    assert NETWORK.targets(options) == ["/etc/hostname", "/etc/resolv.conf"]
    assert NETWORK.mounted(options, given) == {
        "/etc/hostname": "/r/hostname",
        "/etc/resolv.conf": "/r/resolv.conf",
    }
    assert NETWORK.mounted(RunOptions(), given)["/etc/hosts"] == "/r/hosts"
    del given["resolv.conf"]
    assert THEIRS.mounted(RunOptions(), given)["/etc/resolv.conf"] == "/run/theirs"


@pytest.mark.parametrize("network", [NETWORK, NETWORK.of_their_own()], ids=["alone", "services"])
def test_hooks(network):
    for other in ("none", "host"):
        assert network.hooks(RunOptions(network=other), "step-1", "me", "/r/hosts") == {}
    hooks = network.hooks(RunOptions(), "step-1", "me", "/r/hosts")
    # The network is there before the program, and goes however that ends.
    assert set(hooks) == {"createRuntime", "poststop"}
    for ((hook),) in hooks.values():
        assert hook["path"] == "/bin/sh"
        assert 0 < hook["timeout"] <= 60
        sh, minus_c, script, _, step, file, name, outer, inner, subnet, group, *plugins = hook[
            "args"
        ]
        assert (sh, minus_c) == ("sh", "-c")
        subprocess.run(["sh", "-n", "-c", script], check=True)
        assert (step, file, name) == ("step-1", "/r/hosts", "me")
        assert (subnet, group) == (SUBNET, network.group)
        # As arguments: nothing of it is read as part of the script.
        assert plugins == ["/a", "/b c"]
        assert "step-1" not in script
        assert json.loads(outer)["ipam"]["ranges"] == [[{"subnet": SUBNET}]]
        assert json.loads(outer)["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]
        if not network.group:
            assert inner == ""
            continue
        configuration = json.loads(inner)
        assert configuration["bridge"] == configuration["name"] == network.group
        assert configuration["ipam"]["ranges"] == [[{"subnet": SERVICES_SUBNET}]]
        # Nobody outside: neither an address of the machine on it, nor a way out.
        assert "routes" not in configuration["ipam"]
        assert "isGateway" not in configuration


def test_networks_of_their_own():
    one, other = NETWORK.of_their_own(), NETWORK.of_their_own()
    assert one.group != other.group
    assert one.group.startswith(BRIDGE_PREFIX)
    # An interface's name has at most 15 bytes (trap 49).
    assert len(one.group) <= 15
    assert one.plugins == NETWORK.plugins


FORWARD = "/proc/sys/net/ipv4/ip_forward"


@pytest.fixture
def run_hook(tmp_path):
    """Return a function that runs a hook with plugins, iptables and ip that only take notes."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for name, address in (("ptp", "10.205.0.7"), ("bridge", "10.205.128.9"), ("host-local", "")):
        (plugins / name).write_text(
            "#!/bin/sh\n"
            f"{{ echo {name}; env | grep ^CNI_ | sort; cat; echo; }} >>{tmp_path}/seen\n"
            f"if [ -e {tmp_path}/broken-{name} ]; then\n"
            '  echo \'{"msg": "no address"}\'; exit 1\nfi\n'
            f'printf \'{{\\n  "ips": [\\n{{"address": "{address}/17"}}]}}\'\n'
        )
        (plugins / name).chmod(0o755)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "iptables").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/rules\n'
        # -C asks whether a rule is there, and finds it after the first time.
        f"case $* in *-C*) [ -e {tmp_path}/there ];; *-A*) touch {tmp_path}/there;; esac\n"
    )
    (programs / "ip").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/links\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1\tlocalhost\n")
    (tmp_path / "ip_forward").write_text("0\n")

    def run(kind, *, folders=("/nowhere", str(plugins)), check=True, group=""):
        network = Network(plugins=folders, group=group)
        hooks = network.hooks(RunOptions(), "step-1", "me", str(tmp_path / "hosts"))
        (hook,) = hooks[kind]
        (variable,) = hook["env"]
        _, minus_c, script, *words = hook["args"]
        # This machine forwards or not, and has addresses, whoever runs the tests.
        script = script.replace(FORWARD, str(tmp_path / "ip_forward"))
        script = script.replace(STATE, str(tmp_path / "state"))
        return subprocess.run(
            [hook["path"], minus_c, script, *words],
            # As runc sends it.
            input='{"ociVersion":"1.0.2","id":"step-1","status":"creating","pid":77,"root":"/x"}',
            env={"PATH": f"{programs}:{variable.removeprefix('PATH=')}"},
            text=True,
            capture_output=True,
            check=check,
        )

    return run


def test_the_hook_adds(run_hook, tmp_path):
    run_hook("createRuntime")
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("ptp\nCNI_COMMAND=ADD\nCNI_CONTAINERID=step-1\nCNI_IFNAME=eth0\n")
    assert "CNI_NETNS=/proc/77/ns/net\n" in seen
    assert "bridge\n" not in seen
    assert (tmp_path / "hosts").read_text() == "127.0.0.1\tlocalhost\n10.205.0.7\tme\n"
    assert (tmp_path / "ip_forward").read_text() == "1\n"
    first = (tmp_path / "rules").read_text().splitlines()
    assert any("-A POSTROUTING" in rule and "MASQUERADE" in rule for rule in first)
    added = [rule.partition("-I FORWARD ")[2] for rule in first if "-I FORWARD" in rule]
    assert f"-s {SUBNET} -d {SUBNET} -j DROP" in added
    # No way from one step to another one, whatever the order of the rules.
    assert all("DROP" in r or f"! -d {SUBNET}" in r or "-s" not in r.split() for r in added)
    # A second step asks once, and adds nothing.
    run_hook("createRuntime")
    more = (tmp_path / "rules").read_text().splitlines()[len(first) :]
    assert len(more) == 1
    assert "-C POSTROUTING" in more[0]


def test_the_hook_adds_to_a_network_of_their_own(run_hook, tmp_path):
    run_hook("createRuntime", group="sptn-1")
    outer, inner = (tmp_path / "seen").read_text().split("bridge\nCNI_COMMAND")
    assert "CNI_IFNAME=eth0\n" in outer
    assert "CNI_IFNAME=eth1\n" in inner
    assert "CNI_NETNS=/proc/77/ns/net\n" in inner
    assert '"bridge": "sptn-1"' in inner
    # The others reach it there.
    assert (tmp_path / "hosts").read_text() == "127.0.0.1\tlocalhost\n10.205.128.9\tme\n"


def test_the_hook_takes_away(run_hook, tmp_path):
    run_hook("poststop")
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("ptp\nCNI_COMMAND=DEL\nCNI_CONTAINERID=step-1\nCNI_IFNAME=eth0\n")
    assert "bridge\n" not in seen
    assert not (tmp_path / "rules").exists()
    assert not (tmp_path / "links").exists()
    assert (tmp_path / "hosts").read_text() == "127.0.0.1\tlocalhost\n"


def test_the_last_one_takes_the_bridge_away(run_hook, tmp_path):
    state = tmp_path / "state" / "sptn-1"
    state.mkdir(parents=True)
    for name in ("lock", "last_reserved_ip.0", "10.205.128.2"):
        (state / name).touch()
    # Even where the first plugin fails.
    (tmp_path / "broken-ptp").touch()
    run_hook("poststop", group="sptn-1")
    assert "bridge\nCNI_COMMAND=DEL\n" in (tmp_path / "seen").read_text()
    assert not (tmp_path / "links").exists(), "somebody is on it"
    (state / "10.205.128.2").unlink()
    run_hook("poststop", group="sptn-1")
    assert (tmp_path / "links").read_text() == "link del sptn-1\n"
    assert not state.exists()


@pytest.mark.parametrize("plugin", ["ptp", "bridge"])
def test_the_hook_says_what_is_wrong(run_hook, tmp_path, plugin):
    done = run_hook("createRuntime", folders=("/nowhere", "/neither"), check=False)
    assert done.returncode
    assert "no CNI plugins in /nowhere /neither" in done.stderr
    (tmp_path / f"broken-{plugin}").touch()
    done = run_hook("createRuntime", check=False, group="sptn-1")
    assert done.returncode
    assert "no address" in done.stderr
    assert (tmp_path / "hosts").read_text() == "127.0.0.1\tlocalhost\n"


RESOLVED = b"nameserver 10.0.0.1\nsearch lan\n"


@pytest.mark.parametrize(
    ("own", "upstream", "expected"),
    [
        (RESOLVED, None, RESOLVED),
        (RESOLVED, b"nameserver 10.9.9.9\n", RESOLVED),
        # One that can be reached is enough; the others stay as they are.
        (b"nameserver 127.0.0.1\nnameserver 10.0.0.1\n", None,
         b"nameserver 127.0.0.1\nnameserver 10.0.0.1\n"),
        (b"nameserver 127.0.0.53\noptions edns0\n", RESOLVED, RESOLVED),
        (b"nameserver ::1\n", RESOLVED, RESOLVED),
        (b"nameserver fe80::1\n", RESOLVED, b"nameserver fe80::1\n"),
        # Docker's resolver of user networks, too, is only there where it is.
        (b"nameserver 127.0.0.11\n", None, b"nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
        (b"", None, b"nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
        (b"# nameserver 10.0.0.1\nnameserver\n", b"",
         b"nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
        (b"search lan\nnameserver 127.0.0.53\noptions ndots:2\n", b"nameserver 127.0.0.1\n",
         b"nameserver 1.1.1.1\nnameserver 8.8.8.8\nsearch lan\noptions ndots:2\n"),
        (b"\xff\nnameserver 10.0.0.1\n", None, b"\xff\nnameserver 10.0.0.1\n"),
    ],
)  # fmt: skip
def test_resolvers(own, upstream, expected):
    assert choose_resolv_conf(own, upstream) == expected
