"""What a registry's error answer means, in one line for people: a plain function."""

from __future__ import annotations

import msgspec

from serpentine.errors import (
    AuthenticationError,
    RegistryError,
    RegistryNotFound,
    RegistryProtocolError,
    RegistryUnreachable,
)
from serpentine.model.reference import Reference

__all__ = ["error_of"]

MAX_MESSAGE = 200


class _Entry(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Body(msgspec.Struct):
    errors: list[_Entry] | None = None


def error_of(status: int, body: bytes, reference: Reference, host: str) -> RegistryError:
    """Return the error for a status that is no success; ``.status`` holds it.

    The body is the distribution specification's list of errors, or anything at all.
    """
    codes, said = _read(body)
    image = str(reference)
    error: RegistryError
    if status == 404:
        if "NAME_UNKNOWN" in codes:
            what = f"{host} has no repository {reference.repository}"
        elif "MANIFEST_UNKNOWN" in codes:
            kind = "digest" if reference.digest else "tag"
            what = f"{host} has no {kind} {reference.object} in {reference.repository}"
        else:
            what = f"{host} does not have it{said}"
        error = RegistryNotFound(
            f"{image}: {what}",
            host=host,
            image=image,
            hint=f"check the name and the {'digest' if reference.digest else 'tag'}",
        )
    elif status in (401, 403):
        error = AuthenticationError(
            f"{image}: {host} denied access ({status}){said}",
            host=host,
            image=image,
            hint=f"check that you may pull it, or log in: docker login {reference.registry}",
        )
    elif status >= 500 or status == 408:
        error = RegistryUnreachable(
            f"{image}: {host} is not well: it answered {status}{said}",
            host=host,
            image=image,
            hint="try again later",
        )
    else:
        error = RegistryProtocolError(
            f"{image}: {host} answered {status}{said}",
            host=host,
            image=image,
            hint="check that there is a registry at this address",
        )
    error.status = status
    return error


def _read(body: bytes) -> tuple[set[str], str]:
    """Return the codes of an error body, and its first message as ``: text`` or nothing."""
    try:
        entries = msgspec.json.decode(body, type=_Body).errors or []
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return set(), ""
    codes = {entry.code.upper() for entry in entries if entry.code}
    message = next((e.message for e in entries if e.message), "")
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return codes, f": {line[:MAX_MESSAGE]}" if line else ""
