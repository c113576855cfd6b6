"""Images made on the spot: layers from entries, documents by hand, pushed over plain HTTP."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import random
import re
import ssl
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
OCI_MANIFEST = f"{OCI}.manifest.v1+json"
OCI_INDEX = f"{OCI}.index.v1+json"
OCI_CONFIG = f"{OCI}.config.v1+json"
OCI_LAYER = f"{OCI}.layer.v1.tar"
DOCKER_MANIFEST = f"{DOCKER}.distribution.manifest.v2+json"
DOCKER_LIST = f"{DOCKER}.distribution.manifest.list.v2+json"
DOCKER_CONFIG = f"{DOCKER}.container.image.v1+json"
DOCKER_LAYER = f"{DOCKER}.image.rootfs.diff.tar"

BUSYBOX = Path("/bin/busybox")


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def noise(seed: object, size: int) -> bytes:
    """Return bytes that do not compress, the same for the same seed."""
    return random.Random(str(seed)).randbytes(size)


@dataclass(frozen=True)
class Entry:
    """One member of a layer's tar."""

    name: str
    data: bytes | None = None
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    device: tuple[int, int] = (0, 0)
    mtime: int = 1_700_000_000
    xattrs: dict[str, str] = field(default_factory=dict)


def file(name: str, data: bytes | str = b"", **more: Any) -> Entry:
    return Entry(name, data.encode() if isinstance(data, str) else data, **more)


def folder(name: str, mode: int = 0o755, **more: Any) -> Entry:
    return Entry(name, mode=mode, kind=tarfile.DIRTYPE, **more)


def symlink(name: str, target: str, **more: Any) -> Entry:
    return Entry(name, mode=0o777, kind=tarfile.SYMTYPE, target=target, **more)


def hardlink(name: str, target: str, **more: Any) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, target=target, **more)


def whiteout(name: str) -> Entry:
    parent, _, last = name.rpartition("/")
    return Entry(f"{parent}/.wh.{last}" if parent else f".wh.{last}", b"")


def opaque(name: str) -> Entry:
    return Entry(f"{name}/.wh..wh..opq", b"")


def make_tar(entries: Iterable[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
            info.type, info.linkname, info.mtime = entry.kind, entry.target, entry.mtime
            info.devmajor, info.devminor = entry.device
            info.pax_headers = {f"SCHILY.xattr.{k}": v for k, v in entry.xattrs.items()}
            data = entry.data or b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass(frozen=True)
class Layer:
    """A layer: its bytes as stored, and the diff ID of what they unpack to."""

    blob: bytes
    diff_id: str
    media_type: str

    @property
    def digest(self) -> str:
        return sha256(self.blob)

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.blob)}


def layer(entries: Iterable[Entry], *, compression: str = "gzip", docker: bool = False) -> Layer:
    """Make a layer; ``compression`` is ``gzip``, ``zstd`` or ``none``."""
    return layer_of_tar(make_tar(entries), compression=compression, docker=docker)


def layer_of_tar(tar: bytes, *, compression: str = "gzip", docker: bool = False) -> Layer:
    base = DOCKER_LAYER if docker else OCI_LAYER
    if compression == "gzip":
        blob, ext = gzip.compress(tar, 6, mtime=0), ".gzip" if docker else "+gzip"
    elif compression == "zstd":
        import zstandard

        blob, ext = zstandard.compress(tar), ".zstd" if docker else "+zstd"
    else:
        blob, ext = tar, ""
    return Layer(blob, sha256(tar), base + ext)


@dataclass
class Image:
    """Documents and blobs; ``data`` is what a tag points at."""

    data: bytes
    media_type: str
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: list[Image] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return sha256(self.data)

    def descriptor(self, platform: str | None = None, **more: Any) -> dict[str, Any]:
        value = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}
        if platform:
            system, architecture, *variant = platform.split("/")
            value["platform"] = {"os": system, "architecture": architecture}
            if variant:
                value["platform"]["variant"] = variant[0]
        return {**value, **more}


def image(
    layers: Sequence[Layer],
    *,
    docker: bool = False,
    platform: str = "linux/amd64",
    config: dict[str, Any] | None = None,
    diff_ids: Sequence[str] | None = None,
    with_media_type: bool = True,
    manifest: dict[str, Any] | None = None,
) -> Image:
    """Make a manifest with its config; ``manifest`` overrides members of it."""
    system, architecture, *variant = platform.split("/")
    document = {
        "os": system,
        "architecture": architecture,
        **({"variant": variant[0]} if variant else {}),
        "config": config if config is not None else {"Cmd": ["/bin/sh"]},
        "rootfs": {
            "type": "layers",
            "diff_ids": list(diff_ids) if diff_ids is not None else [one.diff_id for one in layers],
        },
    }
    config_data = json.dumps(document).encode()
    kind = DOCKER_MANIFEST if docker else OCI_MANIFEST
    value = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {
            "mediaType": DOCKER_CONFIG if docker else OCI_CONFIG,
            "digest": sha256(config_data),
            "size": len(config_data),
        },
        "layers": [one.descriptor for one in layers],
        **(manifest or {}),
    }
    if not with_media_type:
        del value["mediaType"]
    blobs = {one.digest: one.blob for one in layers}
    blobs[sha256(config_data)] = config_data
    return Image(json.dumps(value).encode(), kind, blobs)


def index(
    entries: Sequence[tuple[Image, dict[str, Any]]],
    *,
    docker: bool = False,
    with_media_type: bool = True,
) -> Image:
    """Make an index of images, each with its descriptor there."""
    kind = DOCKER_LIST if docker else OCI_INDEX
    value = {
        "schemaVersion": 2,
        "mediaType": kind,
        "manifests": [descriptor for _, descriptor in entries],
    }
    if not with_media_type:
        del value["mediaType"]
    return Image(json.dumps(value).encode(), kind, manifests=[one for one, _ in entries])


def attestation(subject: Image) -> tuple[Image, dict[str, Any]]:
    """Make an attestation manifest as BuildKit does, and its entry for the index."""
    statement = Layer(b'{"_type":"x"}', sha256(b'{"_type":"x"}'), "application/vnd.in-toto+json")
    made = image([statement], platform="unknown/unknown")
    notes = {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": subject.digest,
    }
    return made, made.descriptor("unknown/unknown", annotations=notes)


def _libraries(program: Path) -> list[Entry]:
    """Return what a program is linked with, at its paths; nothing for a static one."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    paths = [Path(p) for p in re.findall(r"(/\S+) \(0x", listed)]
    return [file(str(p).lstrip("/"), p.read_bytes(), mode=0o755) for p in paths]


def busybox_layer(**more: Any) -> Layer:
    """Make a layer from which a shell and the usual small programs run."""
    links = ("sh", "ls", "cat", "echo", "true", "sleep", "id", "stat")
    return layer(
        [
            folder("bin"),
            file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
            *_libraries(BUSYBOX),
            *(symlink(f"bin/{name}", "busybox") for name in links),
            folder("etc"),
            file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            folder("root", 0o700),
            folder("tmp", 0o1777),
        ],
        **more,
    )


class Pusher:
    """Pushes blobs and manifests to a registry over HTTP or (unverified) HTTPS."""

    def __init__(self, address: str, *, user: str = "", password: str = "", tls: bool = False):
        if tls:
            context = ssl._create_unverified_context()
            self._connection = http.client.HTTPSConnection(address, context=context, timeout=60)
        else:
            self._connection = http.client.HTTPConnection(address, timeout=60)
        self._headers = {}
        if user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"

    def _send(self, method: str, path: str, body: Any = None, **headers: str):
        self._connection.request(method, path, body=body, headers={**self._headers, **headers})
        response = self._connection.getresponse()
        data = response.read()
        return response, data

    def blob(self, repository: str, digest: str, data: Any, size: int | None = None) -> None:
        response, _ = self._send("HEAD", f"/v2/{repository}/blobs/{digest}")
        if response.status == 200:
            return
        response, said = self._send("POST", f"/v2/{repository}/blobs/uploads/")
        assert response.status == 202, (response.status, said)
        location = response.headers["Location"].split("://", 1)[-1]
        location = "/" + location.partition("/")[2]
        joint = "&" if "?" in location else "?"
        length = str(len(data) if size is None else size)
        response, said = self._send(
            "PUT",
            f"{location}{joint}digest={digest}",
            data,
            **{"Content-Type": "application/octet-stream", "Content-Length": length},
        )
        assert response.status == 201, (response.status, said)

    def manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> None:
        response, said = self._send(
            "PUT",
            f"/v2/{repository}/manifests/{reference}",
            data,
            **{"Content-Type": media_type},
        )
        assert response.status == 201, (response.status, said)

    def image(self, repository: str, tag: str, made: Image) -> None:
        """Push an image with all that it leads to."""
        for child in made.manifests:
            self.image(repository, child.digest, child)
        for digest, data in made.blobs.items():
            self.blob(repository, digest, data)
        self.manifest(repository, tag, made.data, made.media_type)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def push(registry: Any, repository: str, tag: str, made: Image) -> str:
    """Push to a RegistryServer (with its htpasswd, if it has one); return the reference."""
    user, password = registry.htpasswd or ("", "")
    with Pusher(registry.address, user=user, password=password, tls=bool(registry.tls)) as pusher:
        pusher.image(repository, tag, made)
    return f"{registry.address}/{repository}:{tag}"
