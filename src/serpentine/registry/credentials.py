"""Credentials from where Docker and Podman keep them.

Files, in this order: ``REGISTRY_AUTH_FILE``; Docker's ``config.json`` in ``DOCKER_CONFIG`` or
``~/.docker``; the containers tools' ``auth.json``.  Formats: Docker's config file, its credential
helper protocol, and containers-auth.json(5).  Nothing is kept on disk by us, and no secret
appears in ``repr`` or in an error.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from serpentine.errors import AuthenticationError, InvalidSetting
from serpentine.model.reference import DOCKER_HUB

__all__ = ["Credential", "CredentialStore"]

HELPER_TIMEOUT = 30.0
# A file with thousands of logins is far from this.
MAX_FILE = 4 * 1024 * 1024
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = (_HUB_KEY, DOCKER_HUB, "index.docker.io", "registry-1.docker.io")
# The user name by which a helper says that the secret is an identity token.
_TOKEN_USER = "<token>"  # noqa: S105
_NOT_FOUND = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credential:
    """How to log in somewhere: user and password, or a token; ``source`` says where from."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    source: str = ""

    @property
    def who(self) -> str:
        """The user, in words for an error."""
        return f"user {self.username!r}" if self.username else "the token"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    auths: Mapping[str, Any]
    helpers: Mapping[str, str]
    store: str


class CredentialStore:
    """Finds the credential for a repository.  Files are read when first asked."""

    def __init__(self, paths: list[tuple[Path, bool]], environ: Mapping[str, str]) -> None:
        """``paths`` are the files to look into, each with whether it must be there."""
        self._paths = paths
        self._environ = dict(environ)
        self._files: list[_File] | None = None
        self._found: dict[tuple[str, str], Credential | None] = {}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Return the store that the environment describes; ``os.environ`` by default."""
        environ = os.environ if environ is None else environ
        home = Path(environ.get("HOME") or Path.home())
        paths: list[tuple[Path, bool]] = []
        if named := environ.get("REGISTRY_AUTH_FILE"):
            paths.append((Path(named), True))
        docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker")
        paths.append((docker / "config.json", False))
        if runtime := environ.get("XDG_RUNTIME_DIR"):
            paths.append((Path(runtime) / "containers" / "auth.json", False))
        config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
        paths.append((config / "containers" / "auth.json", False))
        return cls(paths, environ)

    async def find(self, registry: str, repository: str) -> Credential | None:
        """Return the credential for ``registry/repository``, or None if there is none.

        Raises InvalidSetting for a file that cannot be read, AuthenticationError for a
        credential helper that fails.
        """
        key = (registry, repository)
        if key not in self._found:
            self._found[key] = await self._search(registry, repository)
        return self._found[key]

    async def _search(self, registry: str, repository: str) -> Credential | None:
        if self._files is None:
            self._files = await asyncio.to_thread(_read_all, self._paths)
        for file in self._files:
            credential = await self._in_file(file, registry, repository)
            if credential is not None:
                return credential
        return None

    async def _in_file(self, file: _File, registry: str, repository: str) -> Credential | None:
        names = _HUB_NAMES if registry == DOCKER_HUB else (registry,)
        for name in names:
            if helper := file.helpers.get(name):
                return await self._ask_helper(helper, _helper_key(registry), file.path)
        for name in _keys(registry, repository):
            for key, entry in file.auths.items():
                if _normalized(key) == name and isinstance(entry, Mapping):
                    credential = _from_entry(entry, f"{file.path}")
                    if credential is not None:
                        return credential
        if file.store:
            return await self._ask_helper(file.store, _helper_key(registry), file.path)
        return None

    async def _ask_helper(self, helper: str, key: str, path: Path) -> Credential | None:
        """Run ``docker-credential-HELPER get``, with the key on its standard input."""
        program = f"docker-credential-{helper}"
        if not _HELPER_NAME.fullmatch(helper):
            raise InvalidSetting(
                f"{path} names a credential helper {helper!r} that cannot be one",
                hint="mend that file",
            )
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                "get",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environ,
            )
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | PermissionError)
            raise AuthenticationError(
                f"{path} wants the credential helper {program}, which"
                f" {'is not on the PATH' if missing else 'does not start'}",
                hint="install it, or take it out of that file",
            ) from None
        try:
            async with asyncio.timeout(HELPER_TIMEOUT):
                out, err = await process.communicate(key.encode())
        except TimeoutError:
            raise AuthenticationError(
                f"the credential helper {program} did not answer for {key} within"
                f" {HELPER_TIMEOUT:.0f} seconds",
                hint="it may wait for input: unlock its store, or log in again",
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return _from_helper(program, key, process.returncode or 0, out, err)


def _from_helper(program: str, key: str, status: int, out: bytes, err: bytes) -> Credential | None:
    if status != 0:
        said = (out + err).decode(errors="replace").strip()
        if _NOT_FOUND in said.lower():
            return None
        raise AuthenticationError(
            f"the credential helper {program} failed for {key} with status {status}",
            hint=f"try it by hand: echo {key} | {program} get",
        )
    try:
        answer = json.loads(out)
        user, secret = answer["Username"], answer["Secret"]
        if not isinstance(user, str) or not isinstance(secret, str):
            raise TypeError
        (user + secret).encode()  # JSON can hold what no request can
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AuthenticationError(
            f"the credential helper {program} gave no JSON with Username and Secret for {key}",
            hint=f"try it by hand: echo {key} | {program} get",
        ) from None
    if not secret:
        return None
    if user == _TOKEN_USER:
        return Credential(identity_token=secret, source=program)
    return Credential(username=user, password=secret, source=program)


def _helper_key(registry: str) -> str:
    return _HUB_KEY if registry == DOCKER_HUB else registry


def _keys(registry: str, repository: str) -> Iterator[str]:
    """Yield the keys of an entry for the repository, the most specific first."""
    hosts = [_normalized(n) for n in _HUB_NAMES] if registry == DOCKER_HUB else [registry]
    parts = repository.split("/")
    for length in range(len(parts), -1, -1):
        for host in dict.fromkeys(hosts):
            yield "/".join([host, *parts[:length]])


def _normalized(key: str) -> str:
    """Return a key of a file without scheme, ``/v1/`` and ``/v2/``: old tools wrote URLs."""
    key = re.sub(r"^https?://", "", key).rstrip("/")
    return re.sub(r"/v[12]$", "", key)


def _read_all(paths: list[tuple[Path, bool]]) -> list[_File]:
    return [f for f in (_read(path, required=needed) for path, needed in paths) if f]


def _read(path: Path, *, required: bool) -> _File | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise InvalidSetting(
                f"the credentials file {path} is larger than {MAX_FILE // 1024 // 1024} MiB",
                hint="it cannot be one; mend it",
            )
        data = json.loads(content.decode() or "{}")
    except (FileNotFoundError, NotADirectoryError):
        if required:
            raise InvalidSetting(
                f"the credentials file {path} does not exist",
                hint="mend or unset REGISTRY_AUTH_FILE",
            ) from None
        return None
    except PermissionError:
        raise InvalidSetting(
            f"may not read the credentials file {path}", hint="mend its permissions"
        ) from None
    except json.JSONDecodeError as error:
        # Not the error's own text: it could quote a secret.
        raise InvalidSetting(
            f"the credentials file {path} is not valid JSON (line {error.lineno})",
            hint="mend it, or log in again",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidSetting(
            f"cannot read the credentials file {path} ({type(error).__name__})", hint="mend it"
        ) from None

    def member(name: str) -> Mapping[str, Any]:
        value = data.get(name) if isinstance(data, dict) else None
        return value if isinstance(value, dict) else {}

    store = data.get("credsStore") if isinstance(data, dict) else None
    helpers = {k: v for k, v in member("credHelpers").items() if isinstance(v, str)}
    return _File(path, member("auths"), helpers, store if isinstance(store, str) else "")


def _from_entry(entry: Mapping[str, Any], source: str) -> Credential | None:
    def text(name: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str):
            return ""
        try:
            value.encode()  # JSON can hold what no request can
        except UnicodeEncodeError:
            raise InvalidSetting(
                f"{source} has characters in {name!r} that are none", hint="log in again"
            ) from None
        return value

    user, password = text("username"), text("password")
    if packed := text("auth"):
        try:
            user, colon, password = base64.b64decode(packed, validate=True).decode().partition(":")
        except ValueError:
            colon = ""
        if not colon:
            raise InvalidSetting(
                f"{source} has an 'auth' that is not base64 of USER:PASSWORD",
                hint="log in again",
            )
        password = password.rstrip("\x00")
    identity, token = text("identitytoken"), text("registrytoken")
    if not (user or identity or token):
        return None  # an empty entry only says that a credential store has it
    return Credential(user, password, identity, token, source)
