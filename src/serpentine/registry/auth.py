"""Authentication: what a registry asks for, and the tokens that answer it.

HTTP authentication is RFC 9110 section 11; the token flow is the distribution project's (GET,
and POST as in OAuth2), which every registry with tokens speaks.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from serpentine._concurrency import KeyedLock
from serpentine.errors import AuthenticationError, RegistryProtocolError
from serpentine.registry.credentials import Credential, CredentialStore
from serpentine.registry.hosts import host_of

__all__ = ["Authenticator", "Challenge", "TokenAnswer", "choose_challenge", "parse_challenges"]

# A token whose life is not told lives for 60 seconds (distribution, token specification).
DEFAULT_LIFETIME = 60.0
# Use a token only while this much of its life is left: a request takes time to arrive.
SAFETY_MARGIN = 5.0
CLIENT_ID = "serpentine"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PARAMETER = re.compile(
    r"""\s*(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*
        (?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s,"]+))\s*""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a registry offers: a scheme in lower case, and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Read the ``WWW-Authenticate`` headers; several may stand in one (trap 32).

    What cannot be read is left out: a registry may offer schemes that nobody knows.
    """
    challenges: list[Challenge] = []
    for value in values:
        rest = value.strip().lstrip(",").lstrip()
        while scheme := _TOKEN.match(rest):
            rest = rest[scheme.end() :]
            parameters: dict[str, str] = {}
            while found := _PARAMETER.match(rest):
                quoted = found["quoted"]
                text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else found["bare"]
                parameters.setdefault(found["name"].lower(), text)
                rest = rest[found.end() :]
                if not rest.startswith(","):
                    break
                rest = rest.lstrip(", \t")
            challenges.append(Challenge(scheme[0].lower(), parameters))
            # Anything else (a bare token68, rubbish) up to the next comma.
            if rest and not _TOKEN.match(rest):
                rest = rest.partition(",")[2]
            rest = rest.lstrip(", \t")
    return challenges


def choose_challenge(challenges: Iterable[Challenge]) -> Challenge | None:
    """Return the way in that we take: Bearer before Basic, None if there is neither."""
    known = list(challenges)
    for scheme in ("bearer", "basic"):
        for challenge in known:
            if challenge.scheme == scheme and (
                scheme == "basic" or "realm" in challenge.parameters
            ):
                return challenge
    return None


class TokenAnswer(msgspec.Struct):
    """What a token endpoint answers; ``token`` and ``access_token`` mean the same."""

    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None

    @property
    def value(self) -> str:
        """The token."""
        return self.token or self.access_token or ""


class Send(Protocol):
    """How a token is asked for: one request, its status and its body (bounded)."""

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        params: list[tuple[str, str]] | None = None,
        data: dict[str, str] | None = None,
        authorization: str | None = None,
    ) -> tuple[int, bytes]:
        """Send it."""


@dataclass(frozen=True, slots=True)
class _Cached:
    header: str
    until: float


class Authenticator:
    """Headers for requests, one token per registry and scope, fetched once however many wait."""

    def __init__(
        self, credentials: CredentialStore, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._credentials = credentials
        self._clock = clock
        self._headers: dict[tuple[str, str], _Cached] = {}
        self._locks = KeyedLock()

    def known_header(self, host: str, repository: str) -> str | None:
        """Return a header that is known to be good, without asking anybody."""
        cached = self._headers.get((host, repository))
        return cached.header if cached and cached.until > self._clock() else None

    async def answer(
        self,
        send: Send,
        *,
        host: str,
        registry: str,
        repository: str,
        image: str,
        values: Iterable[str],
        refused: str | None,
        plain: bool,
    ) -> str:
        """Return the Authorization header that answers a 401.

        ``values`` are its WWW-Authenticate headers, ``refused`` the header that was sent with
        the request, ``plain`` whether the registry itself is reached over plain HTTP.

        Raises AuthenticationError, RegistryProtocolError.
        """
        challenge = choose_challenge(parse_challenges(values))
        if challenge is None:
            raise AuthenticationError(
                f"{image}: {host} wants an authentication that we do not know",
                host=host,
                image=image,
                hint="it must offer Basic or Bearer",
            )
        key = (host, repository)
        async with self._locks(key):
            cached = self._headers.get(key)
            if cached and cached.header != refused and cached.until > self._clock():
                return cached.header  # somebody fetched it while we waited
            self._headers.pop(key, None)
            credential = await self._credentials.find(registry, repository)
            if challenge.scheme == "basic":
                fresh = self._basic(credential, refused, host=host, image=image)
            else:
                scopes = _scopes(challenge, f"repository:{repository}:pull")
                fresh = await self._bearer(
                    send, challenge, scopes, credential, host=host, image=image, plain=plain
                )
            self._headers[key] = fresh
            return fresh.header

    async def rejection(
        self, *, host: str, registry: str, repository: str, image: str
    ) -> AuthenticationError:
        """Return the error for a header that was fresh and did not help."""
        return _refused(host, image, await self._credentials.find(registry, repository))

    def _basic(
        self, credential: Credential | None, refused: str | None, *, host: str, image: str
    ) -> _Cached:
        if credential is None or not credential.username:
            raise _refused(host, image, None)
        header = _basic_header(credential)
        if header == refused:
            raise _refused(host, image, credential)
        return _Cached(header, float("inf"))

    async def _bearer(
        self,
        send: Send,
        challenge: Challenge,
        scopes: tuple[str, ...],
        credential: Credential | None,
        *,
        host: str,
        image: str,
        plain: bool,
    ) -> _Cached:
        realm = challenge.parameters["realm"]
        server = host_of(realm)
        scheme = urlsplit(realm).scheme if server else ""
        if scheme not in ("http", "https"):
            raise RegistryProtocolError(
                f"{image}: {host} names a token server that has no address",
                host=host,
                image=image,
                hint="tell the registry's operators",
            )
        if scheme == "http" and not plain:
            raise RegistryProtocolError(
                f"{image}: {host} sends us to a token server without TLS ({server[:80]})",
                host=host,
                image=image,
                hint=f"if you trust the way to it, use --insecure-registry {host}",
            )
        if credential is not None and credential.registry_token:
            return _Cached(f"Bearer {credential.registry_token}", float("inf"))
        asked = self._clock()
        service = challenge.parameters.get("service", "")
        status, body = await self._ask(send, realm, service, scopes, credential)
        if status in (400, 401, 403):
            raise _refused(host, image, credential)
        if status != 200:
            raise RegistryProtocolError(
                f"{image}: the token server of {host} answered {status}",
                host=host,
                image=image,
                hint="try again later",
            )
        try:
            answer = msgspec.json.decode(body, type=TokenAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            answer = TokenAnswer()
        if not answer.value or not answer.value.isprintable():
            raise RegistryProtocolError(
                f"{image}: the token server of {host} gave no token",
                host=host,
                image=image,
                hint="try again later",
            )
        lifetime = answer.expires_in or DEFAULT_LIFETIME
        # From when we asked, by our own clock: the server's may be wrong (trap 33).
        until = asked + max(lifetime - SAFETY_MARGIN, lifetime / 2)
        return _Cached(f"Bearer {answer.value}", until)

    async def _ask(
        self,
        send: Send,
        realm: str,
        service: str,
        scopes: tuple[str, ...],
        credential: Credential | None,
    ) -> tuple[int, bytes]:
        form = {"client_id": CLIENT_ID, "service": service, "scope": " ".join(scopes)}
        if credential is not None and credential.identity_token:
            form |= {"grant_type": "refresh_token", "refresh_token": credential.identity_token}
            return await send("POST", realm, data=form)
        # GET first: it is the older flow and every token server has it; POST is for those few
        # that refuse it.
        params = [("service", service)] if service else []
        params += [("scope", scope) for scope in scopes]
        if credential is None:
            return await send("GET", realm, params=params)
        params.append(("account", credential.username))
        status, body = await send(
            "GET", realm, params=params, authorization=_basic_header(credential)
        )
        if status in (401, 404, 405):
            form |= {
                "grant_type": "password",
                "username": credential.username,
                "password": credential.password,
            }
            other, answer = await send("POST", realm, data=form)
            if other not in (404, 405):
                return other, answer
        return status, body


def _scopes(challenge: Challenge, scope: str) -> tuple[str, ...]:
    """Return our own scope and what the challenge names besides (trap 31)."""
    return tuple(dict.fromkeys([scope, *challenge.parameters.get("scope", "").split()]))


def _basic_header(credential: Credential) -> str:
    pair = f"{credential.username}:{credential.password}".encode()
    return "Basic " + base64.b64encode(pair).decode()


def _refused(host: str, image: str, credential: Credential | None) -> AuthenticationError:
    login = "docker.io" if host == "registry-1.docker.io" else host
    if credential is None:
        return AuthenticationError(
            f"{image}: {host} says that it does not exist or needs credentials, and there are none"
            f" for {login}",
            host=host,
            image=image,
            hint=f"check the name, or log in: docker login {login}",
        )
    return AuthenticationError(
        f"{image}: {host} refused the credentials of {credential.who} from {credential.source}",
        host=host,
        image=image,
        hint=f"log in again: docker login {login}; or check that you may pull this image",
    )
