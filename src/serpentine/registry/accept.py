"""Which kinds of documents we ask registries for."""

from __future__ import annotations

from serpentine.model.documents import INDEX_TYPES, MANIFEST_TYPES, SCHEMA1_TYPES

__all__ = ["ACCEPT", "MAX_DOCUMENT"]

# What other engines take, too: containerd's limit is 4.4 MB.
MAX_DOCUMENT = 4 * 1024 * 1024

ACCEPT = ", ".join(
    [
        *sorted(MANIFEST_TYPES | INDEX_TYPES),
        # Only so that a registry does not convert it, and we can say what is wrong with it.
        *(f"{kind};q=0.1" for kind in sorted(SCHEMA1_TYPES)),
        "*/*;q=0.01",
    ]
)
