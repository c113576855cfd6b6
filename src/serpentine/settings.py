"""Every setting, every environment variable, and the configuration file, in one place.

A flag (an argument of ``connect``) wins over the environment, the environment over the
configuration file, the file over the default.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serpentine.errors import InvalidSetting

__all__ = [
    "DEFAULT_NAMESPACE",
    "DEFAULT_RELEASES_URL",
    "VARIABLES",
    "Settings",
    "Variable",
    "hosts_folders",
    "load",
]

DEFAULT_NAMESPACE = "serpentine"
DEFAULT_RELEASES_URL = "https://github.com"
DAEMONS = ("docker", "podman", "embedded")
TRANSPORTS = ("socket", "envoy")
_YES_NO = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

# containerd's own rule for identifiers (namespaces, snapshotters).
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_MAX_IDENTIFIER = 76

_PATHS = ("data_dir", "run_dir", "releases_sums", "lock_file", "hosts_dir")
_RATE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([kKmMgG]?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SWITCHES = ("offline", "frozen", "privileged", "traces", "check_space", "sync")


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that we read: its name, what it means, the setting it sets."""

    name: str
    meaning: str
    setting: str = ""


VARIABLES: tuple[Variable, ...] = (
    Variable("CONTAINERD_ADDRESS", "address of the containerd to use", "address"),
    Variable("CONTAINERD_NAMESPACE", "namespace in containerd", "namespace"),
    Variable("CONTAINERD_SNAPSHOTTER", "snapshotter to unpack with", "snapshotter"),
    Variable("SERPENTINE_CONFIG", "the configuration file"),
    Variable("SERPENTINE_DATA_DIR", "where our own containerd keeps its data", "data_dir"),
    Variable("SERPENTINE_RUN_DIR", "where our own containerd keeps socket and state", "run_dir"),
    Variable(
        "SERPENTINE_INSECURE_REGISTRIES",
        "registries, separated by commas, that may be reached without verified TLS",
        "insecure_registries",
    ),
    Variable(
        "SERPENTINE_HOSTS_DIR", "folder of containerd's form, with registries' mirrors", "hosts_dir"
    ),
    Variable("SERPENTINE_MAX_CONNECTIONS", "connections to one registry", "max_connections"),
    Variable("SERPENTINE_LIMIT_RATE", "bytes per second to download, as 500k or 10M", "limit_rate"),
    Variable(
        "SERPENTINE_MAX_UNPACKS",
        "layers to unpack at once, per pull; 1: one after the other; by default as many as pay",
        "max_concurrent_unpacks",
    ),
    Variable(
        "SERPENTINE_STALL_TIMEOUT",
        "seconds without a byte after which a download is continued anew",
        "stall_timeout",
    ),
    Variable("SERPENTINE_CHECK_SPACE", "0: do not look whether a pull fits", "check_space"),
    Variable("SERPENTINE_SYNC", "0: do not wait for the disk when a layer is unpacked", "sync"),
    Variable("SERPENTINE_OFFLINE", "1: no request to any registry", "offline"),
    Variable("SERPENTINE_FROZEN", "1: only images that are pinned", "frozen"),
    Variable("SERPENTINE_LOCK_FILE", "the file of pinned images", "lock_file"),
    Variable("SERPENTINE_LOG", "what to log on stderr: info or debug"),
    Variable("SERPENTINE_TRACES", "1: pulls are spans of OpenTelemetry", "traces"),
    Variable("SERPENTINE_DAEMON", "kind of our own containerd", "daemon"),
    Variable("SERPENTINE_TRANSPORT", "how our own containerd is reached", "transport"),
    Variable("SERPENTINE_PRIVILEGED", "1: run our container with --privileged", "privileged"),
    Variable("SERPENTINE_RELEASES_URL", "where releases are downloaded from", "releases_url"),
    Variable("SERPENTINE_RELEASES_SUMS", "sums of the releases, for ours", "releases_sums"),
    Variable("SERPENTINE_BASE_IMAGE", "base of our containerd image", "base_image"),
    Variable("SERPENTINE_ENVOY_IMAGE", "image of Envoy", "envoy_image"),
    Variable("DOCKER_HOST", "address of Docker's API", "docker_host"),
    Variable("DOCKER_CONTEXT", "Docker context to use", "docker_context"),
    Variable("CONTAINER_HOST", "address of Podman's API", "podman_host"),
    Variable("DOCKER_CONFIG", "directory of Docker's config.json, for credentials"),
    Variable("REGISTRY_AUTH_FILE", "file of credentials, as Podman and Buildah use it"),
    Variable("HTTP_PROXY", "proxy for plain HTTP"),
    Variable("HTTPS_PROXY", "proxy for HTTPS"),
    Variable("NO_PROXY", "hosts to reach without a proxy"),
    Variable("SSL_CERT_FILE", "file of certificate authorities to trust"),
    Variable("SSL_CERT_DIR", "directory of certificate authorities to trust"),
    Variable("NO_COLOR", "if set, no colours"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user decided, complete and checked.

    address: of a containerd to use; None means one of our own.
    namespace: in containerd; everything of ours lives there.
    snapshotter: None means the namespace's default, else overlayfs, else native.
    insecure_registries: HOST or HOST:PORT that may be reached over plain HTTP or with a
        certificate that nobody vouches for.
    mirrors: URLs of mirrors, in the order in which to ask them, by registry (``*`` for all); in the
        configuration file only.
    hosts_dir: a folder with ``HOST/hosts.toml`` files, as containerd has them; None means the usual
        ones.
    max_concurrent_downloads: blobs that are downloaded at once, per pull; also parts of large ones,
        where one connection does not bring all that it could.  None means three, up to five
        where that is measured to bring more, and fewer for a while where that brings as much.
    max_concurrent_unpacks: layers that containerd unpacks at once, per pull, where it can put one
        onto the one below afterwards (2.2 and later).  1 means one after the other, None twice as
        many as there are processors, 8 at most, half as many as there are while blobs still come,
        and one after the other where layers are small.
    max_connections: to one host, for all pulls of an engine.
    limit_rate: bytes per second that all downloads of an engine take together (``500k``, ``10M``);
        None for no limit.
    stall_timeout: seconds without a byte after which a download is continued on a new connection.
    check_space: refuse a pull that cannot fit onto containerd's disk, before it begins.
    sync: what was unpacked is on the disk before it counts (containerd 2.0 and later), so that a
        power failure leaves no damaged snapshots.
    offline: ask no registry, and download nothing.
    frozen: pull only what is pinned, by its digest or in the lock file.
    lock_file: of pinned images, see ``Lock``; relative to the working directory.
    traces: make spans of pulls, with the provider of OpenTelemetry that is set up.
    data_dir, run_dir: of our own containerd.  run_dir does not survive a reboot.
    daemon: the kind of our own containerd, ``docker``, ``podman`` or ``embedded``; None means
        the first that can be had.
    transport: ``socket`` or ``envoy``; None means what runs, else what the system needs.
    docker_host, docker_context, podman_host: where the container engines' APIs are; None means
        the usual places.
    privileged: run our container with all that the engine can give, where the named
        capabilities do not suffice.
    releases_url: where containerd's, runc's and the CNI plugins' releases are downloaded from.
    releases_sums: a file of their sums in place of the pinned ones.
    base_image, envoy_image: of our containers; None means the ones that we name.
    sources: which setting came from where, for ``daemon status``.
    """

    address: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    snapshotter: str | None = None
    insecure_registries: tuple[str, ...] = ()
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    hosts_dir: Path | None = None
    max_concurrent_downloads: int | None = None
    max_concurrent_unpacks: int | None = None
    max_connections: int = 8
    limit_rate: int | None = None
    stall_timeout: float = 8.0
    check_space: bool = True
    sync: bool = True
    offline: bool = False
    frozen: bool = False
    lock_file: Path = Path("serpentine.lock")
    traces: bool = False
    data_dir: Path = field(default_factory=lambda: _default_dirs()[0])
    run_dir: Path = field(default_factory=lambda: _default_dirs()[1])
    daemon: str | None = None
    transport: str | None = None
    docker_host: str | None = None
    docker_context: str | None = None
    podman_host: str | None = None
    privileged: bool = False
    releases_url: str = DEFAULT_RELEASES_URL
    releases_sums: Path | None = None
    base_image: str | None = None
    envoy_image: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)


def load(
    overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Put the settings together.

    ``overrides`` are flags or arguments: None and empty values mean "not given".
    ``environ`` is ``os.environ`` by default.  Raises InvalidSetting, naming the source.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    path = _config_path(environ)
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (str(path), _read_config(path, required="SERPENTINE_CONFIG" in environ)),
        *(
            (v.name, {v.setting: environ[v.name]})
            for v in VARIABLES
            if v.setting and environ.get(v.name)
        ),
        ("argument", {k: v for k, v in (overrides or {}).items() if v not in (None, (), "")}),
    ]
    for source, layer in layers:
        for name, value in layer.items():
            values[name] = _checked(name, value, source)
            sources[name] = source
    return replace(Settings(), **values, sources=sources)


def _default_dirs() -> tuple[Path, Path]:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/serpentine"), Path("/run/serpentine")
    import platformdirs

    data = platformdirs.user_data_path("serpentine", appauthor=False)
    # Not platformdirs' runtime path: without XDG_RUNTIME_DIR it warns, and makes one up in /tmp.
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return data, Path(runtime) / "serpentine" if runtime else data / "run"


def hosts_folders(settings: Settings) -> tuple[Path, ...]:
    """Return the folders with registries' ``hosts.toml``, the first one to count first."""
    if settings.hosts_dir is not None:
        return (settings.hosts_dir,)
    import platformdirs

    user = platformdirs.user_config_path("containerd", appauthor=False) / "certs.d"
    return (user, Path("/etc/containerd/certs.d"))


def _config_path(environ: Mapping[str, str]) -> Path:
    if given := environ.get("SERPENTINE_CONFIG"):
        return Path(given)
    import platformdirs

    return platformdirs.user_config_path("serpentine", appauthor=False) / "config.toml"


def _read_config(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise InvalidSetting(
                f"the configuration file {path} does not exist",
                hint="mend or unset SERPENTINE_CONFIG",
            ) from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(
            f"cannot read the configuration file {path}: {error}", hint="mend its permissions"
        ) from None
    # Most users have no such file, and need no reader of it.
    import tomllib

    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(
            f"the configuration file {path} is not valid TOML: {error}", hint="mend that line"
        ) from None
    return config


def _checked(name: str, value: Any, source: str) -> Any:
    known = [f.name for f in fields(Settings) if f.name != "sources"]
    if name not in known:
        raise InvalidSetting(
            f"{source} has an unknown setting {name!r}", hint=f"known: {', '.join(sorted(known))}"
        )
    if name == "insecure_registries":
        hosts = value.split(",") if isinstance(value, str) else value
        if not isinstance(hosts, list | tuple) or not all(isinstance(h, str) for h in hosts):
            raise _bad(name, value, source, "give a list of HOST or HOST:PORT")
        return tuple(_checked_host(h.strip(), source) for h in hosts if h.strip())
    if name in ("max_concurrent_downloads", "max_concurrent_unpacks", "max_connections"):
        return _checked_count(name, value, source)
    if name == "limit_rate":
        return _checked_rate(name, value, source)
    if name == "mirrors":
        return _checked_mirrors(value, source)
    if name == "stall_timeout":
        return _checked_seconds(name, value, source)
    if name in _SWITCHES:
        answer = value if isinstance(value, bool) else _YES_NO.get(str(value).lower())
        if answer is None:
            raise _bad(name, value, source, "give 1 or 0")
        return answer
    if name in _PATHS and isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or "\x00" in value:
        raise _bad(name, value, source, "give a text that is not empty")
    if name in ("namespace", "snapshotter"):
        if not _IDENTIFIER.fullmatch(value) or len(value) > _MAX_IDENTIFIER:
            raise _bad(
                name, value, source, "it has up to 76 letters, digits, and single '.', '_', '-'"
            )
        return value
    if name in ("daemon", "transport"):
        known_values = DAEMONS if name == "daemon" else TRANSPORTS
        if value not in known_values:
            raise _bad(name, value, source, f"choose one of: {', '.join(known_values)}")
        return value
    if name == "releases_url":
        return _checked_url(name, value, source)
    if name in _PATHS:
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise _bad(name, value, source, "there is no such user: write the path") from None
        # The one that belongs to a project, and not to the machine.
        if name != "lock_file" and not path.is_absolute():
            raise _bad(name, value, source, "give an absolute path")
        return path
    return value


def _checked_mirrors(value: Any, source: str) -> dict[str, tuple[str, ...]]:
    remedy = 'write [mirrors], and below it: "docker.io" = ["https://mirror.example"]'
    if not isinstance(value, Mapping):
        raise _bad("mirrors", value, source, remedy)
    found = {}
    for registry, given in value.items():
        urls = [given] if isinstance(given, str) else given
        if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
            raise _bad("mirrors", given, source, remedy)
        found[registry] = tuple(urls)
    return found


def _checked_count(name: str, value: Any, source: str) -> int:
    text = str(value)
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0
    if isinstance(value, bool) or not 1 <= count <= 64:
        raise _bad(name, value, source, "give a number from 1 to 64")
    return count


def _checked_rate(name: str, value: Any, source: str) -> int:
    found = _RATE.fullmatch(str(value).strip())
    rate = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if isinstance(value, bool) or rate < 1024:
        raise _bad(name, value, source, "give bytes per second, at least 1024, as 500k or 10M")
    return rate


def _checked_seconds(name: str, value: Any, source: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:  # nan is neither
        raise _bad(name, value, source, "give a number of seconds from 0.1 to 3600")
    return seconds


def _checked_host(host: str, source: str) -> str:
    if "/" in host or "@" in host or any(c.isspace() for c in host):
        raise _bad("insecure_registries", host, source, "write HOST or HOST:PORT, without a path")
    return host


def _checked_url(name: str, url: str, source: str) -> str:
    url = url.strip()
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise _bad(name, url, source, "give an http or https URL") from None
    if "@" in parts.netloc:
        # Not its text: it holds a password.
        where = "" if source == "argument" else f" (from {source})"
        raise InvalidSetting(
            f"{name} holds a login{where}", hint="leave it out; write it into ~/.netrc"
        )
    if parts.scheme not in ("http", "https") or not valid or any(c.isspace() for c in url):
        raise _bad(name, url, source, "give an http or https URL")
    if "?" in url or "#" in url:
        raise _bad(name, url, source, "leave out what begins with '?' or '#'")
    return url.rstrip("/")


def _bad(name: str, value: object, source: str, remedy: str) -> InvalidSetting:
    where = "" if source == "argument" else f" (from {source})"
    return InvalidSetting(f"{value!r} is not a valid {name}{where}", hint=remedy)
