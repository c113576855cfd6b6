"""Every setting, every environment variable, and the configuration file, in one place.

A flag (an argument of ``connect``) wins over the environment, the environment over the
configuration file, the file over the default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from serpentine.errors import InvalidSetting

__all__ = ["DEFAULT_NAMESPACE", "VARIABLES", "Settings", "Variable", "load"]

DEFAULT_NAMESPACE = "serpentine"

# containerd's own rule for identifiers (namespaces, snapshotters).
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_MAX_IDENTIFIER = 76


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
    max_concurrent_downloads: blobs that are downloaded at once, per pull.
    data_dir, run_dir: of our own containerd.  run_dir does not survive a reboot.
    sources: which setting came from where, for ``daemon status``.
    """

    address: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    snapshotter: str | None = None
    insecure_registries: tuple[str, ...] = ()
    max_concurrent_downloads: int = 3
    data_dir: Path = field(default_factory=lambda: _default_dirs()[0])
    run_dir: Path = field(default_factory=lambda: _default_dirs()[1])
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
    if name == "max_concurrent_downloads":
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
            raise _bad(name, value, source, "give a number from 1 to 64")
        return value
    if name in ("data_dir", "run_dir") and isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or "\x00" in value:
        raise _bad(name, value, source, "give a text that is not empty")
    if name in ("namespace", "snapshotter"):
        if not _IDENTIFIER.fullmatch(value) or len(value) > _MAX_IDENTIFIER:
            raise _bad(
                name, value, source, "it has up to 76 letters, digits, and single '.', '_', '-'"
            )
        return value
    if name in ("data_dir", "run_dir"):
        path = Path(value).expanduser()
        if not path.is_absolute():
            raise _bad(name, value, source, "give an absolute path")
        return path
    return value


def _checked_host(host: str, source: str) -> str:
    if "/" in host or "@" in host or any(c.isspace() for c in host):
        raise _bad("insecure_registries", host, source, "write HOST or HOST:PORT, without a path")
    return host


def _bad(name: str, value: object, source: str, remedy: str) -> InvalidSetting:
    where = "" if source == "argument" else f" (from {source})"
    return InvalidSetting(f"{value!r} is not a valid {name}{where}", hint=remedy)
