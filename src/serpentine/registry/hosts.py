"""Where a registry's API is, and how it may be reached: plain functions."""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from collections.abc import Collection
from urllib.parse import urlsplit

from serpentine.errors import InvalidSetting
from serpentine.model.reference import DOCKER_HUB

__all__ = [
    "api_host",
    "host_of",
    "is_loopback",
    "matches",
    "proxy_for",
    "schemes_for",
    "split_host",
]

_HUB_API = "registry-1.docker.io"


def api_host(registry: str) -> str:
    """Return the host that answers for a registry (trap 30)."""
    return _HUB_API if registry == DOCKER_HUB else registry


def split_host(host: str) -> str:
    """Return the name or address of ``host[:port]``, without brackets."""
    return urlsplit(f"//{host}").hostname or host


def host_of(url: str) -> str:
    """Return ``host[:port]`` of a URL, without a user and a password; "" if it has none.

    URLs come from strangers, in redirects and challenges: any text is taken.
    """
    try:
        parts = urlsplit(url)
        name, _ = parts.hostname, parts.port
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return host if name and re.fullmatch(r"[!-~]+", host) else ""


def is_loopback(host: str) -> bool:
    """Tell whether ``host[:port]`` is this machine by its very name."""
    name = split_host(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def matches(host: str, hosts: Collection[str]) -> bool:
    """Tell whether ``host[:port]`` is in a list of HOST (any port) and HOST:PORT."""
    return host in hosts or split_host(host) in hosts


def schemes_for(host: str, insecure: Collection[str]) -> tuple[str, ...]:
    """Return the schemes to try, in order.

    Plain HTTP only on loopback, where nobody is in between, and where the user said so.
    """
    if is_loopback(host) or matches(host, insecure):
        return ("https", "http")
    return ("https",)


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a URL (``NO_PROXY`` counts).

    Raises InvalidSetting for what is no HTTP proxy.
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    host = parts.netloc.rpartition("@")[2]
    if urllib.request.proxy_bypass_environment(host, proxies):  # type: ignore[attr-defined]
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.lower().startswith(("http://", "https://")) or not host_of(proxy):
        # Not its text: it may hold a password.
        name = parts.scheme if proxies.get(parts.scheme) else "all"
        raise InvalidSetting(
            f"{name.upper()}_PROXY is not the address of an HTTP proxy",
            hint="write it as http://HOST:PORT",
        )
    return proxy
