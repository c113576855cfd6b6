"""The exception tree: every error that Serpentine raises on purpose.

::

    SerpentineError
    ├── InputError                 fix what you typed
    │   ├── InvalidReference
    │   ├── InvalidPlatform
    │   ├── InvalidDigest
    │   ├── InvalidSetting
    │   └── NotPinned                  only pinned images are allowed, and this is none
    ├── RegistryError              the registry, or the way to it   (.host, .image)
    │   ├── RegistryUnreachable        try again, or mend the network
    │   ├── RegistryNotFound           no such repository, tag or digest there
    │   ├── AuthenticationError        no credentials, or wrong ones
    │   ├── RateLimited                try again later              (.retry_after)
    │   ├── TransferError              a body that broke off, was short or long
    │   │   └── NoSuchRange            a part of it that came as something else
    │   └── RegistryProtocolError      an answer that the specification does not allow
    ├── ImageError                 what the registry served is no image for us   (.image)
    │   ├── DigestMismatch
    │   ├── SizeMismatch
    │   ├── DocumentTooLarge
    │   ├── InvalidDocument
    │   ├── UnsupportedImage
    │   ├── PlatformNotFound                                        (.available)
    │   ├── LayerError                 a layer that does not unpack  (.digest)
    │   └── DiffIDMismatch             a layer with another content than the config says
    ├── DaemonError                no containerd that we can use    (.address)
    │   ├── DaemonNotFound
    │   ├── DaemonUnreachable
    │   ├── DaemonPermission
    │   └── DaemonFailed
    ├── ContainerdError            an answer of containerd          (.code)
    │   ├── NotFound, AlreadyExists, FailedPrecondition, InvalidArgument, OutOfRange
    │   ├── Locked                     another client holds the ingest
    │   ├── Unavailable                the connection went away
    │   ├── DeadlineExceeded, ResourceExhausted, PermissionDenied, Unimplemented
    │   └── NoSpace                    the daemon's disk is full
    ├── StepError                  a process on a snapshot          (.exit_code, .output)
    │   ├── UserNotFound               a name that the image's files do not have
    │   ├── CommandNotFound            127: no such program in the image
    │   ├── CommandNotExecutable       126: it is there and cannot be run
    │   ├── StepFailed                 it ended with another status than 0, or by a signal
    │   ├── StepTimeout                it did not end in time
    │   └── ServiceFailed              what was to run beside it ended, or was never ready
    ├── CopyError                  files that cannot be copied      (.path)
    │   ├── PathNotFound               there is nothing of that name
    │   └── FileChanged                a file is not what it was when it was begun
    └── (nothing else: any other exception is a bug in Serpentine)

``str(error)`` is one line that names the thing; ``error.hint`` is the remedy,
or an empty string.  Neither ever holds a secret.
"""

from __future__ import annotations

from typing import Self

__all__ = [
    "AlreadyExists",
    "AuthenticationError",
    "CommandNotExecutable",
    "CommandNotFound",
    "ContainerdError",
    "CopyError",
    "DaemonError",
    "DaemonFailed",
    "DaemonNotFound",
    "DaemonPermission",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "DiffIDMismatch",
    "DigestMismatch",
    "DocumentTooLarge",
    "FailedPrecondition",
    "FileChanged",
    "ImageError",
    "InputError",
    "InvalidArgument",
    "InvalidDigest",
    "InvalidDocument",
    "InvalidPlatform",
    "InvalidReference",
    "InvalidSetting",
    "LayerError",
    "Locked",
    "NoSpace",
    "NoSuchRange",
    "NotFound",
    "NotPinned",
    "OutOfRange",
    "PathNotFound",
    "PermissionDenied",
    "PlatformNotFound",
    "RateLimited",
    "RegistryError",
    "RegistryNotFound",
    "RegistryProtocolError",
    "RegistryUnreachable",
    "ResourceExhausted",
    "SerpentineError",
    "ServiceFailed",
    "SizeMismatch",
    "StepError",
    "StepFailed",
    "StepTimeout",
    "TransferError",
    "Unavailable",
    "Unimplemented",
    "UnsupportedImage",
    "UserNotFound",
]


class SerpentineError(Exception):
    """The root: catch this to catch everything that Serpentine raises on purpose.

    ``hint`` says what to do next, in one line, and may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.hint = " ".join(hint.split())


# --- input ---------------------------------------------------------------------------------


class InputError(SerpentineError):
    """Something the caller wrote is not valid; nothing was contacted or changed."""


class InvalidReference(InputError):
    """The text is not an image reference."""


class InvalidPlatform(InputError):
    """The text is not a platform (``os/arch[/variant]``)."""


class InvalidDigest(InputError):
    """The text is not a digest (``algorithm:hex``) of an algorithm that we can check."""


class InvalidSetting(InputError):
    """A flag, environment variable or line of the configuration file is not valid."""


class NotPinned(InputError):
    """Only pinned images may be used, and the lock does not have this one, or this platform."""


# --- registry ------------------------------------------------------------------------------


class RegistryError(SerpentineError):
    """A registry could not serve what was asked.

    ``host`` is the host that was asked, ``image`` the reference as text where one is known,
    ``status`` the HTTP status where there was one.
    """

    def __init__(self, message: str, *, host: str = "", image: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.host = host
        self.image = image
        self.status: int | None = None

    def about(self, image: str) -> Self:
        """Name the image that was wanted, if the error does not yet; return the error."""
        if not self.image:
            self.image = image
            self.args = (f"{image}: {self}",)
        return self

    def during(self, what: str) -> Self:
        """Say what was being done, if the error does not yet; return the error."""
        if what not in str(self):
            self.args = (f"{self} ({what})",)
        return self


class RegistryUnreachable(RegistryError):
    """No answer: name resolution, connection, TLS, time-out, or a 5xx status."""


class RegistryNotFound(RegistryError):
    """The registry has no such repository, tag or digest (or hides it)."""


class AuthenticationError(RegistryError):
    """The registry wants credentials and got none, or wrong ones."""


class RateLimited(RegistryError):
    """The registry answered 429; ``retry_after`` is in seconds, or None if it did not say."""

    def __init__(
        self,
        message: str,
        *,
        host: str = "",
        image: str = "",
        hint: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, host=host, image=image, hint=hint)
        self.retry_after = retry_after


class TransferError(RegistryError):
    """A body broke off, was shorter or longer than its descriptor says.

    ``endpoint`` is the host that was asked for it, which may have sent us to ``host``; "" if
    it was not noted.
    """

    endpoint: str = ""


class NoSuchRange(TransferError):
    """A part of a body was asked for, and the answer was something else."""


class RegistryProtocolError(RegistryError):
    """The registry's answer is not one that the distribution specification allows."""


# --- image ---------------------------------------------------------------------------------


class ImageError(SerpentineError):
    """What the registry serves under this name is not an image that we can use."""

    def __init__(self, message: str, *, image: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.image = image


class DigestMismatch(ImageError):
    """Bytes do not have the digest that names them."""


class SizeMismatch(ImageError):
    """A document is not as long as its descriptor says."""


class DocumentTooLarge(ImageError):
    """A manifest or config is larger than we accept."""


class InvalidDocument(ImageError):
    """A manifest, index or config is not the JSON that the specification asks for."""


class UnsupportedImage(ImageError):
    """A document that is well-formed, but not of a kind that unpacks: schema 1, an artifact."""


class PlatformNotFound(ImageError):
    """The index has no entry for the platform; ``available`` lists what there is."""

    def __init__(
        self, message: str, *, image: str = "", hint: str = "", available: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, image=image, hint=hint)
        self.available = available


class LayerError(ImageError):
    """A layer that containerd could not unpack; ``digest`` names it."""

    def __init__(self, message: str, *, image: str = "", hint: str = "", digest: str = "") -> None:
        super().__init__(message, image=image, hint=hint)
        self.digest = digest


class DiffIDMismatch(LayerError):
    """A layer unpacked to another content than the config's diff ID."""


# --- daemon --------------------------------------------------------------------------------


class DaemonError(SerpentineError):
    """There is no containerd that we can use; ``address`` is where we looked, if anywhere."""

    def __init__(self, message: str, *, address: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.address = address


class DaemonNotFound(DaemonError):
    """No address was given and none can be started here."""


class DaemonUnreachable(DaemonError):
    """Nothing answers at the address, or what answers is no containerd."""


class DaemonPermission(DaemonError):
    """The socket exists, and this user may not open it."""


class DaemonFailed(DaemonError):
    """Our own daemon did not start, or died."""


# --- containerd ----------------------------------------------------------------------------


class ContainerdError(SerpentineError):
    """An error that containerd answered; ``code`` is the gRPC status name."""

    code = "UNKNOWN"

    def __init__(self, message: str, *, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        if code:
            self.code = code


class NotFound(ContainerdError):
    """The object does not exist in this namespace."""

    code = "NOT_FOUND"


class AlreadyExists(ContainerdError):
    """The object exists already (traps 8, 19, 20: often a success)."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(ContainerdError):
    """The object's state does not allow it: a wrong digest or size, a snapshot with children."""

    code = "FAILED_PRECONDITION"


class InvalidArgument(ContainerdError):
    """containerd does not accept the request's values."""

    code = "INVALID_ARGUMENT"


class OutOfRange(ContainerdError):
    """A write behind the end of an ingest."""

    code = "OUT_OF_RANGE"


class Unavailable(ContainerdError):
    """The connection to containerd is gone, or it is shutting down."""

    code = "UNAVAILABLE"


class Locked(ContainerdError):
    """Another client is writing this ingest (trap 7: same code as a lost connection)."""

    code = "UNAVAILABLE"


class DeadlineExceeded(ContainerdError):
    """containerd did not answer in time."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(ContainerdError):
    """A message or a quota was too large."""

    code = "RESOURCE_EXHAUSTED"


class PermissionDenied(ContainerdError):
    """The daemon (or the proxy in front of it) refused this caller."""

    code = "PERMISSION_DENIED"


class Unimplemented(ContainerdError):
    """This containerd does not have the service or the method."""

    code = "UNIMPLEMENTED"


class NoSpace(ContainerdError):
    """The daemon's disk is full."""

    code = "UNKNOWN"


# --- steps ---------------------------------------------------------------------------------


class StepError(SerpentineError):
    """A process could not be run on a snapshot, or did not end well.

    ``exit_code`` is what the command line ends with, as Docker has it: 125 when we failed, 126
    and 127 when the command could not be run, else the process's own, 128 and the number of the
    signal that ended it.  ``output`` is the end of what it printed, as bytes.
    """

    def __init__(
        self, message: str, *, hint: str = "", exit_code: int = 125, output: bytes = b""
    ) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
        self.output = output


class UserNotFound(StepError):
    """The user or group to run as is in no file of the image, and no number."""


class CommandNotFound(StepError):
    """The image has no such program, or not on its ``PATH``."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, exit_code=127)


class CommandNotExecutable(StepError):
    """The program is there and cannot be run: a directory, no permission, another platform's."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, exit_code=126)


class StepFailed(StepError):
    """The process ended with another status than 0, or by a signal."""


class StepTimeout(StepError):
    """The process did not end within the time that it was given; it was ended then."""


# --- files ---------------------------------------------------------------------------------


class CopyError(SerpentineError):
    """Files could not be copied into a state or out of one; ``path`` is the one that failed."""

    def __init__(self, message: str, *, path: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path


class PathNotFound(CopyError):
    """There is no such file or directory."""


class FileChanged(CopyError):
    """A file changed while it was read: what was read is no state that it ever had."""


class ServiceFailed(StepError):
    """A service ended too early, or was not ready in time; ``output`` is the service's."""
