"""The one place where gRPC's errors become ours."""

from __future__ import annotations

import re

import grpc

from serpentine import errors
from serpentine.errors import ContainerdError

__all__ = ["translate", "why_ended"]

_BY_CODE: dict[grpc.StatusCode, type[ContainerdError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    # Not our own cancellation, which is asyncio.CancelledError: the server or the connection
    # gave the call up.
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.ABORTED: ContainerdError,
    grpc.StatusCode.DATA_LOSS: ContainerdError,
    grpc.StatusCode.INTERNAL: ContainerdError,
    grpc.StatusCode.UNKNOWN: ContainerdError,
    grpc.StatusCode.OK: ContainerdError,
}

# Trap 7: the same code as a connection that is gone; or none, when containerd finds the lock only
# at the first write, as for a blob that another namespace has ("truncate failed: ref … locked").
_LOCKED_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
_LOCKED = re.compile(r"\bref .* locked\b", re.DOTALL)
_NO_SPACE = "no space left on device"

# What a shim says, without a code, of a process that is not in the state for it; 1.6 adds what
# code it has.
_STATE = re.compile(r"\bcannot \w+ (a|in a) \w+ (process|container|state)(: unknown)?$")

# What gRPC says, with a code that means nothing, of a stream that a proxy or a server which died
# has cut.  The last is Python's own word for a message that could not be sent: of most writes that
# are under way when containerd is killed, nothing better is ever known.
_CUT = re.compile(r"^Stream removed\b|\bRST_STREAM\b|^Internal error from Core$")

_HINTS: dict[type[ContainerdError], str] = {
    errors.Unavailable: "look whether containerd still runs, and try again",
    errors.DeadlineExceeded: "containerd is busy or stuck; look at its log",
    errors.NoSpace: "make room on the disk that holds containerd's root directory",
    errors.PermissionDenied: "check the user, or the token, that reaches this containerd",
    errors.Unimplemented: "use a newer containerd",
}


def translate(code: grpc.StatusCode, details: str | None) -> ContainerdError:
    """Return the error of our tree that says the same; a plain function, total over the codes."""
    details = details or code.name.lower().replace("_", " ")
    kind = _BY_CODE[code]
    if code in _LOCKED_CODES and _LOCKED.search(details):
        kind = errors.Locked
    elif _NO_SPACE in details.lower():
        kind = errors.NoSpace  # trap 25: comes as UNKNOWN
    elif code is grpc.StatusCode.UNKNOWN and _STATE.search(details):
        kind = errors.FailedPrecondition
    elif kind is ContainerdError and _CUT.search(details):
        kind = errors.Unavailable
        details = f"the connection was cut ({details})"
    return kind(f"containerd: {details}", code=code.name, hint=_HINTS.get(kind, ""))


def why_ended(code: grpc.StatusCode, details: str | None) -> ContainerdError:
    """Return the error for a call that ended so, and sooner than it should have."""
    if code is grpc.StatusCode.OK:
        return errors.Unavailable("containerd ended a write before it was complete")
    return translate(code, details)
