"""The images that are measured: made once from Debian packages, kept in .cache/bench."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

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
SUFFIXES = {"gzip": "gz", "zstd": "zst"}
PACK = {"gzip": ["gzip", "-n", "-6"], "zstd": ["zstd", "-q", "-3", "-c"]}


@dataclass(frozen=True)
class Blob:
    """A file that is a layer, with both digests."""

    path: Path
    digest: str
    diff_id: str
    size: int
    unpacked: int
    compression: str = "gzip"


def one_layer() -> list[Blob]:
    """Return one large layer: the largest of the six."""
    return [max(six_layers(), key=lambda one: one.size)]


def six_layers() -> list[Blob]:
    """Return the six layers, making them if they are not there yet (a few minutes)."""
    return [_layer(name, packages) for name, packages in LARGE.items()]


def zstd_layers() -> list[Blob]:
    """Return the six layers again, compressed otherwise."""
    return [_again(one) for one in six_layers()]


def like_each_other(count: int) -> list[Blob]:
    """Return layers of about 1 MB, each of twenty files; fewer of them are the first of more."""
    return [
        _made(f"like-{number}", partial(_files, number, 20, 150_000)) for number in range(count)
    ]


def many_files() -> list[Blob]:
    """Return one layer of 100,000 files of up to 2 KB in a thousand directories."""
    return [_made("many-files", lambda: _files("files", 100_000, 1_000))]


def huge_layers() -> list[Blob]:
    """Return ten layers of about 1 GB, which take 50 GB of disk and a quarter of an hour."""
    return [
        _made(f"huge-{number}", partial(_files, f"huge-{number}", 27, 100_000_000))
        for number in range(10)
    ]


def small_layers() -> list[Blob]:
    """Return one layer of about 1 MB."""
    return [_layer("small", ["busybox-static"])]


IMAGES: dict[str, Callable[[], list[Blob]]] = {
    "small": small_layers,
    "one": one_layer,
    "six": six_layers,
    "ten": lambda: like_each_other(10),
    "forty": lambda: like_each_other(40),
    "hundred-twenty": lambda: like_each_other(120),
    "files": many_files,
    "zstd": zstd_layers,
    "huge": huge_layers,  # only when asked for
}


def _files(seed: object, count: int, size: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of files, half of whose bytes say nothing new."""
    chance = random.Random(str(seed))
    for number in range(count):
        half = chance.randbytes(chance.randrange(size // 2, size) // 2)
        yield f"srv/{seed}/{number % 1000:03}/{number}", half + bytes(len(half))


def _made(name: str, files: Callable[[], Iterator[tuple[str, bytes]]]) -> Blob:
    def write(tar: IO[bytes]) -> None:
        with tarfile.open(fileobj=tar, mode="w|") as archive:
            named: set[str] = set()
            for path, data in files():
                # Directories are named before what is in them, as all usual tools do it.
                for end in (at for at, letter in enumerate(path) if letter == "/"):
                    if path[:end] not in named:
                        named.add(path[:end])
                        folder = tarfile.TarInfo(path[:end])
                        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                        archive.addfile(folder)
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    return _blob(name, "gzip", write)


def _again(layer: Blob) -> Blob:
    def write(tar: IO[bytes]) -> None:
        gzip = subprocess.Popen(["gzip", "-dc", layer.path], stdout=subprocess.PIPE)
        assert gzip.stdout
        shutil.copyfileobj(gzip.stdout, tar, CHUNK)
        if gzip.wait():
            raise SystemExit(f"cannot read {layer.path.name}")

    return _blob(f"{layer.path.name.partition('.')[0]}-zstd", "zstd", write)


def _layer(name: str, packages: list[str]) -> Blob:
    def write(tar: IO[bytes]) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            folder = Path(temporary)
            root = folder / "root"
            root.mkdir()
            subprocess.run(
                ["apt-get", "download", "-q", *packages],
                cwd=folder,
                check=True,
                capture_output=True,
            )
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
            command = [
                "tar",
                "--sort=name",
                "--mtime=@0",
                "--numeric-owner",
                "-C",
                str(root),
                "-c",
                ".",
            ]
            made = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert made.stdout
            shutil.copyfileobj(made.stdout, tar, CHUNK)
            if made.wait():
                raise SystemExit(f"could not make {name}")

    return _blob(name, "gzip", write)


class _Hashed(io.BytesIO):
    """Counts and hashes what is written through it."""

    def __init__(self, target: IO[bytes]) -> None:
        super().__init__()
        self._target = target
        self.seen = hashlib.sha256()
        self.size = 0

    def write(self, data: Buffer) -> int:
        self.seen.update(data)
        size = memoryview(data).nbytes
        self.size += size
        self._target.write(data)
        return size


def _blob(name: str, compression: str, write: Callable[[IO[bytes]], None]) -> Blob:
    """Return a layer that ``write`` writes the archive of, if it is not there yet."""
    folder = CACHE / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tar.{SUFFIXES[compression]}"
    note = folder / f"{name}.json"
    if not note.exists():
        print(f"making {path.name}", flush=True)
        new = path.with_suffix(".new")
        with new.open("wb") as out:
            packing = subprocess.Popen(PACK[compression], stdin=subprocess.PIPE, stdout=out)
            assert packing.stdin
            hashed = _Hashed(packing.stdin)
            write(hashed)
            packing.stdin.close()
            if packing.wait():
                raise SystemExit(f"could not make {path.name}")
        with new.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        values = {
            "digest": f"sha256:{digest}",
            "diff_id": f"sha256:{hashed.seen.hexdigest()}",
            "size": new.stat().st_size,
            "unpacked": hashed.size,
            "compression": compression,
        }
        new.replace(path)
        note.write_text(json.dumps(values))
    return Blob(path=path, **json.loads(note.read_text()))
