"""An OCI distribution client: from references to verified documents and streams of bytes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serpentine.registry.blobs import BlobStream
    from serpentine.registry.client import RegistryClient, Repository, Resolved
    from serpentine.registry.credentials import Credential, CredentialStore
    from serpentine.registry.endpoints import Endpoint, Endpoints

__all__ = [
    "BlobStream",
    "Credential",
    "CredentialStore",
    "Endpoint",
    "Endpoints",
    "RegistryClient",
    "Repository",
    "Resolved",
]

# Imported when first used: what only looks (look.py) needs no HTTP client.
_HOMES = {
    "BlobStream": "serpentine.registry.blobs",
    "Credential": "serpentine.registry.credentials",
    "CredentialStore": "serpentine.registry.credentials",
    "Endpoint": "serpentine.registry.endpoints",
    "Endpoints": "serpentine.registry.endpoints",
    "RegistryClient": "serpentine.registry.client",
    "Repository": "serpentine.registry.client",
    "Resolved": "serpentine.registry.client",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(home), name)
    return value
