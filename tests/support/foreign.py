"""Images made and unpacked by other people's tools: umoci, buildah, skopeo."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def tool(*arguments: str | Path, **environ: str) -> str:
    """Run a foreign tool and return what it prints."""
    done = subprocess.run(
        [str(a) for a in arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: {done.stderr}"
    return done.stdout.strip()


def populate(root: Path) -> None:
    """Write a tree with one of everything that a layer can hold."""
    (root / "etc/deep/er").mkdir(parents=True)
    (root / "etc/plain").write_text("plain\n")
    (root / "etc/empty").touch()
    (root / "etc/deep/er/file").write_bytes(bytes(range(256)) * 300)
    (root / "secret").mkdir(mode=0o700)
    (root / "secret/key").write_text("key")
    (root / "secret/key").chmod(0o600)
    (root / "bin").mkdir()
    (root / "bin/tool").write_text("#!/bin/sh\n")
    (root / "bin/tool").chmod(0o4755)
    (root / "bin/tool-again").hardlink_to(root / "bin/tool")
    (root / "bin/link").symlink_to("tool")
    (root / "dangling").symlink_to("/nowhere/at/all")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    os.chown(root / "etc/plain", 1000, 1001)
    os.lchown(root / "bin/link", 33, 33)
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mkfifo(root / "pipe")
    (root / "ünïcode naïve").write_text("ü")
    (root / ("long" * 40)).write_text("a long name")
    os.utime(root / "etc/plain", (1_600_000_000, 1_600_000_000))
    os.setxattr(root / "etc/plain", "user.note", b"kept")
    (root / "gone").mkdir()
    for name in ("a", "b", "c"):
        (root / "gone" / name).write_text(name)
    (root / "replaced").mkdir()
    (root / "replaced/old").write_text("old")


def change(root: Path) -> None:
    """Change the tree in every way that a second layer can express."""
    (root / "etc/plain").unlink()
    shutil.rmtree(root / "gone")
    shutil.rmtree(root / "replaced")
    (root / "replaced").mkdir(mode=0o750)
    (root / "replaced/new").write_text("new")
    (root / "bin/link").unlink()
    (root / "bin/link").mkdir()
    (root / "bin/link/inside").write_text("a link became a directory")
    (root / "etc/empty").write_text("not any more")
    (root / "secret/more").write_text("more")
    (root / "secret").chmod(0o711)
    os.chown(root / "etc/deep", 5, 6)


class Umoci:
    """An OCI layout that umoci fills and unpacks."""

    def __init__(self, folder: Path) -> None:
        self.layout = folder / "layout"
        self.folder = folder

    def make(self) -> str:
        """Make an image of three layers; return its tag."""
        tool("umoci", "init", "--layout", self.layout)
        tool("umoci", "new", "--image", f"{self.layout}:empty")
        bundle = self.folder / "bundle"
        for before, after, work in (
            ("empty", "one", populate),
            ("one", "two", change),
            ("two", "three", lambda root: (root / "last").write_text("last")),
        ):
            shutil.rmtree(bundle, ignore_errors=True)
            tool("umoci", "unpack", "--image", f"{self.layout}:{before}", bundle)
            work(bundle / "rootfs")
            tool("umoci", "repack", "--image", f"{self.layout}:{after}", bundle)
        shutil.rmtree(bundle)
        return "three"

    def unpack(self, tag: str) -> Path:
        """Unpack and return the root file system."""
        bundle = self.folder / f"unpacked-{tag}"
        if not bundle.exists():
            tool("umoci", "unpack", "--image", f"{self.layout}:{tag}", bundle)
        return bundle / "rootfs"

    def take(self, reference: str, tag: str, *options: str) -> None:
        """Copy an image from a registry into the layout."""
        source, target = f"docker://{reference}", f"oci:{self.layout}:{tag}"
        tool("skopeo", "copy", *options, "--src-tls-verify=false", source, target)

    def push(self, tag: str, reference: str, *options: str) -> None:
        """Copy an image of the layout to a registry."""
        source, target = f"oci:{self.layout}:{tag}", f"docker://{reference}"
        tool("skopeo", "copy", *options, "--dest-tls-verify=false", source, target)

    def recompressed(self, tag: str, compression: str) -> Path:
        """Return a ``dir:`` of an image with ``zstd`` layers, or with ``none``."""
        plain, zstd = self.folder / "plain", self.folder / "zstd"
        if not plain.exists():
            tool("skopeo", "copy", "--dest-decompress", f"oci:{self.layout}:{tag}", f"dir:{plain}")
            options = ("--dest-compress", "--dest-compress-format", "zstd")
            tool("skopeo", "copy", *options, f"dir:{plain}", f"dir:{zstd}")
        return zstd if compression == "zstd" else plain


class Buildah:
    """Buildah with private storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._options = (
            *("--root", folder / "storage", "--runroot", folder / "run"),
            *("--storage-driver", "vfs"),
        )

    def __call__(self, *arguments: str | Path) -> str:
        return tool("buildah", *self._options, *arguments, BUILDAH_ISOLATION="chroot")

    def make(self, name: str, form: str) -> None:
        """Make an image of two layers in ``oci`` or ``docker`` form."""
        base = self("from", "scratch")
        populate(Path(self("mount", base)))
        self("umount", base)
        self("commit", "--format", form, base, f"{name}-base")
        self("rm", base)
        second = self("from", f"localhost/{name}-base")
        change(Path(self("mount", second)))
        self("umount", second)
        self("config", "--env", "A=b", "--workingdir", "/etc", "--cmd", "/bin/tool", second)
        self("commit", "--format", form, second, name)
        self("rm", second)

    def unpack(self, name: str) -> Path:
        """Return the root file system of an image, mounted until ``close``."""
        container = self("from", f"localhost/{name}")
        return Path(self("mount", container))

    def push(self, name: str, reference: str) -> None:
        self("push", "--tls-verify=false", f"localhost/{name}", f"docker://{reference}")

    def close(self) -> None:
        self("umount", "--all")
        self("rm", "--all")
