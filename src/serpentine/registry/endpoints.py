"""Where a registry's content may be had: its own host, and mirrors, as the user configured them.

The file format is containerd's ``hosts.toml`` (``certs.d/HOST/hosts.toml``), so that what is
written for containerd and nerdctl counts here, too.  What it says is decided in plain functions.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serpentine.errors import InvalidSetting
from serpentine.registry.hosts import api_host, host_of

__all__ = ["Endpoint", "Endpoints", "in_order", "parse_hosts"]

DEFAULT_ROOT = "/v2"
_CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
_KEYS = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
)
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One host that may serve a registry's content.

    scheme: None where both have to be tried.  root: the path of its API.
    pull, resolve: whether it may be asked for content by digest, and for what a tag means.
    headers: sent to it with every request, and to nobody that it redirects to.
    ca, client: files of authorities, and of certificates and keys, besides the usual ones.
    skip_verify: take any certificate.
    mirror: whether there is another host to ask when it fails.
    """

    host: str
    scheme: str | None = None
    root: str = DEFAULT_ROOT
    pull: bool = True
    resolve: bool = True
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False
    mirror: bool = False

    @property
    def has_tls(self) -> bool:
        """Whether its certificates are not checked as all others are."""
        return bool(self.ca or self.client or self.skip_verify)

    def context(self) -> ssl.SSLContext:
        """Return how its certificate is checked, and how we prove ourselves; reads files.

        Raises InvalidSetting, naming the file.
        """
        context = ssl.create_default_context()
        for path in self.ca:
            with _reading(path):
                context.load_verify_locations(path)
        for certificate, key in self.client:
            with _reading(certificate):
                context.load_cert_chain(certificate, key or None)
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class _reading:  # noqa: N801 - reads as a word
    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):  # an ssl.SSLError is one
            why = (error.strerror or "it fails").lower()
            if isinstance(error, ssl.SSLError):
                why = "it holds not what it should, in PEM"
            raise InvalidSetting(
                f"cannot use the certificate file {self.path}: {why}",
                hint="mend hosts.toml, or the file",
            ) from None


class Endpoints:
    """Finds the endpoints of each registry; reads each file once."""

    def __init__(
        self,
        folders: Sequence[Path] = (),
        mirrors: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Take what was configured.

        folders: with a directory for each registry, or ``_default``; the first one counts.
        mirrors: in short: URLs for a registry's name, or for ``*``; asked before the folders'.
        """
        self._folders = folders
        self._mirrors = mirrors or {}
        self._known: dict[str, tuple[Endpoint, ...]] = {}

    def of(self, registry: str) -> tuple[Endpoint, ...]:
        """Return the endpoints in the order in which to ask; reads files.

        Raises InvalidSetting for a file that cannot be read or understood.
        """
        if registry not in self._known:
            self._known[registry] = self._find(registry)
        return self._known[registry]

    def _find(self, registry: str) -> tuple[Endpoint, ...]:
        short = self._mirrors.get(registry) or self._mirrors.get("*") or ()
        named = [_from_url(url, "mirrors", mirror=True) for url in short]
        for folder in self._folders:
            for name in _folder_names(registry):
                path = folder / name / "hosts.toml"
                if (data := _read(path)) is not None:
                    return (*named, *parse_hosts(data, registry, str(path)))
        return (*named, Endpoint(api_host(registry)))


def _folder_names(registry: str) -> list[str]:
    name, _, port = registry.rpartition(":")
    # First containerd's own way to write a port where a file's name may have no colon.
    return [*([f"{name}_{port}_"] if name and port.isdigit() else []), registry, "_default"]


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidSetting(
            f"cannot read {path}: {(error.strerror or 'it fails').lower()}",
            hint="mend its permissions, or name another folder with SERPENTINE_HOSTS_DIR",
        ) from None
    if len(data) > _MAX_FILE:
        raise InvalidSetting(f"{path} is larger than 1 MiB", hint="mend that file")
    return data


def parse_hosts(data: bytes, registry: str, source: str) -> tuple[Endpoint, ...]:
    """Return the endpoints that a ``hosts.toml`` names, the registry's own last.

    Raises InvalidSetting, naming ``source``, for what is none.
    """
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSetting(
            f"{source} is not valid TOML: {error}", hint="mend that file"
        ) from None
    base = str(Path(source).parent)
    hosts = document.get("host", {})
    if not isinstance(hosts, dict):
        raise _bad(source, "host", "it is a table for each host")
    mirrors = [
        _configured(url, table, source, base, mirror=True, upstream=api_host(registry))
        for url, table in hosts.items()
    ]
    server = document.get("server", api_host(registry))
    if not isinstance(server, str):
        raise _bad(source, "server", "it is a URL")
    # What stands outside of a host's table is for the server, named or not.
    table = {key: value for key, value in document.items() if key in _KEYS}
    own = _configured(server, table, source, base, mirror=False, upstream=api_host(registry))
    if "server" not in document:
        # But that one has the usual path and may be asked for everything: containerd's rule.
        own = replace(own, root=DEFAULT_ROOT, pull=True, resolve=True)
    return (*mirrors, own)


def _configured(
    url: str, table: Any, source: str, base: str, *, mirror: bool, upstream: str
) -> Endpoint:
    if not isinstance(table, dict):
        raise _bad(source, url, "it is a table")
    override = table.get("override_path", False)
    skip = table.get("skip_verify", False)
    for name, value in (("override_path", override), ("skip_verify", skip)):
        if not isinstance(value, bool):
            raise _bad(source, name, "it is true or false")
    named = table.get("capabilities", [])
    if not _is_texts(named) or not {one.lower() for one in named} <= _CAPABILITIES:
        raise _bad(source, "capabilities", f"it is a list of {', '.join(sorted(_CAPABILITIES))}")
    # An empty list means all of them, too: containerd's rule.
    capabilities = [one.lower() for one in named] or ["pull", "resolve"]
    endpoint = _from_url(url, source, mirror=mirror, override=override)
    # A name without a scheme is the upstream's own in another writing.
    return replace(
        endpoint,
        mirror=mirror and endpoint.host != upstream,
        pull="pull" in capabilities,
        resolve="resolve" in capabilities,
        headers=_headers(table.get("header", {}), source),
        ca=tuple(_path(base, one) for one in _texts(table.get("ca", []), source, "ca")),
        client=_pairs(table.get("client", []), source, base),
        skip_verify=skip,
    )


def _from_url(url: str, source: str, *, mirror: bool, override: bool = False) -> Endpoint:
    text = url.strip()
    bare = "://" not in text
    full = f"//{text}" if bare else text
    host = host_of(full)
    try:
        parts = urlsplit(full)
    except ValueError:
        host = ""
    if (
        not host
        or "@" in full
        or any(c.isspace() for c in text)
        or (not bare and parts.scheme not in ("http", "https"))
        or parts.query
        or parts.fragment
    ):
        raise InvalidSetting(
            f"{source}: {url.partition('@')[2] or url!r} is no address of a registry",
            hint="write it as https://HOST[:PORT][/PATH]",
        )
    path = parts.path.rstrip("/")
    # As containerd has it: the API's path is added unless that is overridden, or there.
    root = path if override else path if path.endswith(DEFAULT_ROOT) else path + DEFAULT_ROOT
    return Endpoint(host, scheme=parts.scheme or None, root=root, mirror=mirror)


def _headers(table: Any, source: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise _bad(source, "header", "it is a table of names and values")
    found = {}
    for name, value in table.items():
        values = _texts(value, source, f"header {name}")
        joined = ", ".join(values)
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not joined.isprintable():
            raise _bad(source, f"header {name[:40]!r}", "it is no name and value of a header")
        if not joined.isascii():
            raise _bad(source, f"header {name}", "its value has other than ASCII letters")
        found[name] = joined
    return found


def _pairs(value: Any, source: str, base: str) -> tuple[tuple[str, str], ...]:
    """Return certificates and keys: one file with both, several, or pairs."""
    if isinstance(value, str):
        return ((_path(base, value), ""),)
    if not isinstance(value, list):
        raise _bad(source, "client", "it is a file, a list of files, or of pairs of files")
    found = []
    for one in value:
        texts = _texts(one, source, "client")
        if not 1 <= len(texts) <= 2:
            raise _bad(source, "client", "it is a file, a list of files, or of pairs of files")
        key = _path(base, texts[1]) if len(texts) == 2 and texts[1] else ""
        found.append((_path(base, texts[0]), key))
    return tuple(found)


def _texts(value: Any, source: str, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not _is_texts(texts) or any("\0" in text for text in texts):
        raise _bad(source, name, "it is a text or a list of texts")
    return list(texts)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _path(base: str, path: str) -> str:
    return str(Path(base, path))


def _bad(source: str, name: str, why: str) -> InvalidSetting:
    return InvalidSetting(f"{source}: {name}: {why}", hint="mend that file")


def in_order(
    endpoints: Iterable[Endpoint], *, dead: Iterable[str], avoid: Iterable[str]
) -> list[Endpoint]:
    """Return the endpoints in the order to ask: the hopeful, those to avoid, the dead.

    A registry's own host is never dead: there would be nobody else to ask.
    """
    gone, bad = set(dead), set(avoid)

    def rank(endpoint: Endpoint) -> int:
        if endpoint.mirror and endpoint.host in gone:
            return 2
        return 1 if endpoint.host in bad else 0

    return sorted(endpoints, key=rank)
