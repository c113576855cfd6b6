"""Where a registry's API is, and how it may be reached: plain functions."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from serpentine.errors import InvalidSetting
from serpentine.model.reference import DOCKER_HUB

__all__ = [
    "address_kind",
    "api_host",
    "host_of",
    "inner_kind",
    "is_loopback",
    "matches",
    "may_lead",
    "proxy_for",
    "schemes_for",
    "split_host",
]

_HUB_API = "registry-1.docker.io"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


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


def address_kind(text: str) -> str:
    """Return what kind of inner address an IP address is; "" for a public one, or for none.

    The kinds: ``loopback``, ``private``, ``link-local``, ``unspecified``, ``multicast``.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        # What translators to IPv4 (RFC 6052) and the oldest form hold.
        if inside is None and (address in _NAT64 or 1 < int(address) < 2**32):
            inside = ipaddress.IPv4Address(int(address) % 2**32)
        if inside is not None:
            address = inside
        elif address.is_site_local:
            return "private"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    # Linux takes all of 0.0.0.0/8 for this machine or refuses it.
    if address.is_unspecified or (address.version == 4 and int(address) < 2**24):
        return "unspecified"
    return "" if address.is_global else "private"


def inner_kind(host: str) -> str:
    """Return the kind of ``host[:port]`` as address_kind() has it, by what it says alone.

    Names are looked up where the connection is made; here they are public, but for localhost.
    """
    name = split_host(host).rstrip(".").lower()
    if is_loopback(name):
        return "loopback"
    if kind := address_kind(name):
        return kind
    # 127.1, 2130706433, 0x7f000001: what the C library takes for an address.
    if re.fullmatch(r"[0-9a-fx.]+", name):
        try:
            return address_kind(str(ipaddress.IPv4Address(socket.inet_aton(name))))
        except OSError:
            return ""
    return ""


def may_lead(source: str, target: str) -> bool:
    """Tell whether a host may send us on to another, by the kinds of their addresses.

    A registry on the internet has no business within our network; one that is there itself may
    name its neighbours.  Link-local is where clouds keep the machine's own credentials.
    """
    if target in ("loopback", "private"):
        return source in ("loopback", "private", "link-local")
    return target in ("", source)


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
    # Here and not above: it brings a whole HTTP client of its own.
    import urllib.request

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
