"""An OCI distribution client: from references to verified documents and streams of bytes."""

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
