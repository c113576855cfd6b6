"""The network of steps: CNI plugins, driven by hooks of the runtime, on the daemon's machine.

No server of ours runs there, and nothing has to be installed but the plugins: the hook is a
shell command in the runtime specification.  It runs in the daemon's network, with the step's
process number on its stdin, when the step's network namespace is there and before its program is.
At the end, however that comes (also when the client or the shim was killed), the runtime deletes
the container and runs the second hook, which gives the address back.

Each step has a link of its own to the daemon's machine, so that it reaches the world and no other
step.  A step and its services have a second one, to a bridge that is theirs alone: nothing but
they is on it, not even the machine, so that every such bridge can use the same addresses.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serpentine.run.options import RunOptions

__all__ = ["Network", "choose_resolv_conf"]

# What steps have towards the world, and what they have among each other beside services.
SUBNET = "10.205.0.0/17"
SERVICES_SUBNET = "10.205.128.0/17"
# An interface's name has at most 15 bytes (trap 49).
BRIDGE_PREFIX = "sptn-"
# In memory: after a restart of the machine nobody has an address any more.
STATE = "/run/serpentine-cni"
HOOK_TIMEOUT = 30
# Where systemd-resolved keeps the servers that it asks itself.
UPSTREAM_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")
FALLBACK_SERVERS = ("1.1.1.1", "8.8.8.8")

_LOCAL_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""

# $1: the step; $2: its file of hosts; $3: its hostname; $4, $5: the plugins' configurations;
# $6: the subnet; $7: the bridge, empty without services; the rest: where plugins may be.
_FIND = """\
step=$1 hosts=$2 name=$3 conf=$4 inner=$5 subnet=$6 bridge=$7; shift 7
dir=; for d in "$@"; do
  [ -x "$d/ptp" ] && [ -x "$d/bridge" ] && [ -x "$d/host-local" ] && dir=$d && break
done
if [ -z "$dir" ]; then echo "no CNI plugins in $*" >&2; exit 1; fi
export CNI_CONTAINERID="$step" CNI_IFNAME=eth0 CNI_PATH="$dir"
"""
# The rules are the same for every step, so they are looked for once and stay.  No two of them match
# the same packet: first steps at the same time may add them in any order, and twice.
_ADD = (
    "set -eu; PATH=$PATH:/usr/sbin:/sbin\n"
    "pid=$(sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p')\n"
    + _FIND
    + """\
[ "$(cat /proc/sys/net/ipv4/ip_forward)" = 1 ] || echo 1 >/proc/sys/net/ipv4/ip_forward
masquerade="POSTROUTING -s $subnet ! -d $subnet -j MASQUERADE"
if ! iptables -w -t nat -C $masquerade 2>/dev/null; then
  for rule in "-s $subnet -d $subnet -j DROP" "-i veth+ -s $subnet ! -d $subnet -j ACCEPT" \
    "-o veth+ -d $subnet -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT" \
    "-i PREFIX+ -o PREFIX+ -j ACCEPT"; do
    iptables -w -C FORWARD $rule 2>/dev/null || iptables -w -I FORWARD $rule
  done
  iptables -w -t nat -A $masquerade
fi
export CNI_COMMAND=ADD CNI_NETNS="/proc/$pid/ns/net"
add() {
  if ! out=$(printf %s "$2" | "$dir/$1"); then printf '%s\\n' "$out" >&2; exit 1; fi
  address=$(printf %s "$out" | tr -d '\\n' | sed -n 's/.*"address": *"\\([0-9.]*\\)\\/.*/\\1/p')
}
add ptp "$conf"
if [ -n "$bridge" ]; then CNI_IFNAME=eth1; add bridge "$inner"; fi
[ -z "$hosts" ] || printf '%s\\t%s\\n' "$address" "$name" >>"$hosts"
""".replace("PREFIX", BRIDGE_PREFIX)
)
# The last one on a bridge takes it away.  Nobody joins by then: all of a run are started before the
# first is ended.
_DELETE = (
    "PATH=$PATH:/usr/sbin:/sbin; cat >/dev/null\n"
    + _FIND
    + """\
export CNI_COMMAND=DEL CNI_NETNS=
printf %s "$conf" | "$dir/ptp" >&2
[ -n "$bridge" ] || exit 0
printf %s "$inner" | CNI_IFNAME=eth1 "$dir/bridge" >&2
set -- "STATE/$bridge"/[0-9]*
[ ! -e "$1" ] || exit 0
rm -rf "STATE/$bridge"
ip link del "$bridge" 2>/dev/null || busybox ip link del "$bridge" 2>/dev/null
[ ! -e "/sys/class/net/$bridge" ] || echo "cannot remove $bridge: is there an 'ip'?" >&2
""".replace("STATE", STATE)
)


@dataclass(frozen=True, slots=True)
class Network:
    """How steps of a daemon get their network.

    plugins: directories of the daemon's machine where the CNI plugins may be.
    resolv_conf: its file that steps get as theirs; None where we give them one.
    own_resolv_conf: what is in ours then.
    group: names what those on this network have among each other; "" for steps that are alone.
    """

    plugins: tuple[str, ...]
    resolv_conf: str | None = None
    own_resolv_conf: bytes = b""
    group: str = ""

    def of_their_own(self) -> Network:
        """Return a network whose steps reach each other, and nobody else does."""
        return replace(self, group=BRIDGE_PREFIX + secrets.token_hex(4))

    @staticmethod
    def targets(options: RunOptions) -> list[str]:
        """Return the files of a step that are ours: what a user mounts there wins."""
        binds = {b.target for b in options.binds}
        return [
            path
            for path in ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
            if path not in binds
        ]

    def files(self, options: RunOptions, hostname: str) -> dict[str, bytes]:
        """Return what the files of a step hold, by their short names."""
        extra = "".join(f"{address}\t{name}\n" for name, address in options.extra_hosts.items())
        own = f"127.0.0.1\t{hostname}\n" if options.network != "bridge" else ""
        files = {
            "hostname": f"{hostname}\n".encode(),
            "hosts": (_LOCAL_HOSTS + extra + own).encode(),
        }
        if self.resolv_conf is None:
            files["resolv.conf"] = self.own_resolv_conf
        return files

    def mounted(self, options: RunOptions, files: Mapping[str, str]) -> dict[str, str]:
        """Return which file of the daemon's machine is mounted where."""
        sources = {f"/etc/{name}": path for name, path in files.items()}
        if self.resolv_conf is not None:
            sources["/etc/resolv.conf"] = self.resolv_conf
        return {path: sources[path] for path in self.targets(options)}

    def hooks(self, options: RunOptions, step: str, hostname: str, hosts: str) -> dict[str, Any]:
        """Return the runtime's hooks; ``hosts`` is the step's file on the daemon's machine."""
        if options.network != "bridge":
            return {}
        outer = _configuration("serpentine", SUBNET, type="ptp", ipMasq=False)
        inner = self.group and _configuration(
            self.group, SERVICES_SUBNET, type="bridge", bridge=self.group
        )
        common = [step, hosts, hostname, outer, inner, SUBNET, self.group, *self.plugins]

        def hook(script: str) -> list[dict[str, Any]]:
            return [
                {
                    "path": "/bin/sh",
                    "args": ["sh", "-c", script, "serpentine-network", *common],
                    "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                    "timeout": HOOK_TIMEOUT,
                }
            ]

        return {"createRuntime": hook(_ADD), "poststop": hook(_DELETE)}


def _configuration(name: str, subnet: str, **plugin: Any) -> str:
    # A default route is the outer plugin's only.
    routes = {"routes": [{"dst": "0.0.0.0/0"}]} if plugin["type"] == "ptp" else {}
    ipam = {"type": "host-local", "dataDir": STATE, "ranges": [[{"subnet": subnet}]], **routes}
    # The version is what the plugins of Debian 12 speak, too.
    return json.dumps({"cniVersion": "0.4.0", "name": name, "ipam": ipam, **plugin})


def choose_resolv_conf(own: bytes, upstream: bytes | None) -> bytes:
    """Return what a step on this machine gets: a loopback resolver is another one's there.

    own: this machine's file.  upstream: what systemd-resolved itself asks, if it is there
    (trap 50).  Without any server that can be reached, public ones, as Docker does.
    """
    for data in (own, upstream):
        if data is not None and _servers(data):
            return data
    kept = [line for line in own.decode(errors="replace").splitlines() if _is_kept(line)]
    return "\n".join([*(f"nameserver {s}" for s in FALLBACK_SERVERS), *kept, ""]).encode()


def _servers(data: bytes) -> list[str]:
    words = [line.split() for line in data.decode(errors="replace").splitlines()]
    servers = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
    return [s for s in servers if not s.startswith("127.") and s != "::1"]


def _is_kept(line: str) -> bool:
    return line.split()[:1] in (["search"], ["options"], ["domain"])
