"""The images that are measured: made once from Debian packages, kept in .cache/bench."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "bench"
CHUNK = 1024 * 1024

# About 1 GB in six gzip layers.
LARGE = {
    "browser": ["chromium"],
    "firefox": ["firefox-esr"],
    "mail": ["thunderbird"],
    "wine": ["libwine"],
    "languages": ["openjdk-17-jdk-headless", "openjdk-17-jre-headless", "golang-1.19-go"],
    "kernel": ["linux-source-6.1", "llvm-14-dev"],
}


@dataclass(frozen=True)
class Blob:
    """A file that is a layer, with both digests."""

    path: Path
    digest: str
    diff_id: str
    size: int
    unpacked: int


def large_layers() -> list[Blob]:
    """Return the six layers, making them if they are not there yet (a few minutes)."""
    return [_layer(name, packages) for name, packages in LARGE.items()]


def small_layers() -> list[Blob]:
    """Return one layer of about 1 MB."""
    return [_layer("small", ["busybox-static"])]


def _layer(name: str, packages: list[str]) -> Blob:
    folder = CACHE / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{name}.json"
    path = folder / f"{name}.tar.gz"
    if not note.exists():
        print(f"making layer {name} of {', '.join(packages)}", flush=True)
        _make(packages, path, note)
    values = json.loads(note.read_text())
    return Blob(path=path, **values)


def _make(packages: list[str], path: Path, note: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        root = folder / "root"
        root.mkdir()
        subprocess.run(
            ["apt-get", "download", "-q", *packages], cwd=folder, check=True, capture_output=True
        )
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
        tar = subprocess.Popen(
            ["tar", "--sort=name", "--mtime=@0", "--numeric-owner", "-C", root, "-c", "."],
            stdout=subprocess.PIPE,
        )
        partial = folder / "layer.gz"
        diff_id = hashlib.sha256()
        unpacked = 0
        assert tar.stdout
        with partial.open("wb") as out:
            gzip = subprocess.Popen(["gzip", "-n", "-6"], stdin=subprocess.PIPE, stdout=out)
            assert gzip.stdin
            while chunk := tar.stdout.read(CHUNK):
                diff_id.update(chunk)
                unpacked += len(chunk)
                gzip.stdin.write(chunk)
            gzip.stdin.close()
            if tar.wait() or gzip.wait():
                raise SystemExit(f"could not make {path.name}")
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = partial.stat().st_size
        partial.replace(path)
    values = {
        "digest": f"sha256:{digest}",
        "diff_id": f"sha256:{diff_id.hexdigest()}",
        "size": size,
        "unpacked": unpacked,
    }
    note.write_text(json.dumps(values))
