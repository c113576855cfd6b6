"""Steps of a containerd on this machine: a child process of ours, or somebody else's socket."""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # elsewhere no containerd runs on our file system

from pathlib import Path

from serpentine.run.network import UPSTREAM_RESOLV_CONF, Network, choose_resolv_conf
from serpentine.run.shared import LocalSite

__all__ = ["CNI_FOLDERS", "local_site"]

# Where CNI's own guide and the distributions put the plugins.
CNI_FOLDERS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")


def local_site(run_dir: Path, data_dir: Path) -> tuple[LocalSite, Network]:
    """Return this machine, and the network of its steps."""
    folder = run_dir / "steps"
    own = _read(Path("/etc/resolv.conf")) or b""
    network = Network(
        plugins=(str(data_dir / "bin" / "cni"), *CNI_FOLDERS),
        own_resolv_conf=choose_resolv_conf(own, _read(UPSTREAM_RESOLV_CONF)),
    )
    return LocalSite(folder, str(folder)), network


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
