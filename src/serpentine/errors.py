"""The exception tree: every error that Serpentine raises on purpose.

::

    SerpentineError
    ├── InputError                 fix what you typed
    │   ├── InvalidReference
    │   ├── InvalidPlatform
    │   ├── InvalidDigest
    │   └── InvalidSetting
    ├── RegistryError              the registry, or the way to it   (.host, .image)
    │   ├── RegistryUnreachable        try again, or mend the network
    │   ├── RegistryNotFound           no such repository, tag or digest there
    │   ├── AuthenticationError        no credentials, or wrong ones
    │   ├── RateLimited                try again later              (.retry_after)
    │   ├── TransferError              a body that broke off, was short or long
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
    └── (nothing else: any other exception is a bug in Serpentine)

``str(error)`` is one line that names the thing; ``error.hint`` is the remedy,
or an empty string.  Neither ever holds a secret.
"""

from __future__ import annotations

from typing import Self

__all__ = [
    "AlreadyExists",
    "AuthenticationError",
    "ContainerdError",
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
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PlatformNotFound",
    "RateLimited",
    "RegistryError",
    "RegistryNotFound",
    "RegistryProtocolError",
    "RegistryUnreachable",
    "ResourceExhausted",
    "SerpentineError",
    "SizeMismatch",
    "TransferError",
    "Unavailable",
    "Unimplemented",
    "UnsupportedImage",
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
    """A body broke off, was shorter or longer than its descriptor says."""


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
