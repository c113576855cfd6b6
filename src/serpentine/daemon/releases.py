"""containerd, runc and the CNI plugins as their projects release them, in our data directory.

What is wanted stands in a file of sha256 sums.  What is installed is one directory that holds
all of it, named after these sums; ``bin`` is a symbolic link to it.  Both appear by a rename:
nobody ever sees half of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hashlib
import importlib.resources
import ipaddress
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from serpentine._concurrency import shielded, task_group
from serpentine.daemon._lock import locked
from serpentine.errors import (
    DaemonError,
    DaemonFailed,
    DaemonNotFound,
    DaemonPermission,
    InvalidSetting,
)
from serpentine.events import (
    OnEvent,
    ReleaseInstalled,
    ReleaseProgress,
    ReleaseWaiting,
    Retrying,
)
from serpentine.settings import Settings

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Installed", "Release", "install", "installed", "parse_sums", "search_path", "select"]

KINDS = ("containerd", "runc", "cni")
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}

MAX_DOWNLOAD = 512 * 1024 * 1024
MAX_UNPACKED = 2 * 1024 * 1024 * 1024
CHUNK = 1024 * 1024
CONNECT_TIMEOUT = 30.0
READ_TIMEOUT = 60.0
# How long before each try after the first.
RETRY_DELAYS = (0.5, 3.0)
# What is already handed to the disk is waited for, on a slow one, too.
DISK_TIMEOUT = 600.0

# Without these, what is installed is of no use.
_NEEDED: dict[str, tuple[str, ...]] = {
    "containerd": ("containerd", "ctr", "containerd-shim-runc-v2"),
    "runc": ("runc",),
    "cni": (),
}
_NOTE = "installed.json"
_LINK = "bin"
_TEMPORARY = ".install-"

_LINE = re.compile(r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<path>[\w.+~%-]+(?:/[\w.+~%-]+)*)", re.ASCII)
_VERSION = r"(?P<version>\d[\w.+~-]*)"
_FILES = {
    "containerd": re.compile(
        rf"containerd(?:-static)?-{_VERSION}-linux-(?P<arch>amd64|arm64)\.tar\.gz", re.ASCII
    ),
    # Its version stands in the directory only.
    "runc": re.compile(rf"(?:v?{_VERSION}/)?runc\.(?P<arch>amd64|arm64)", re.ASCII),
    "cni": re.compile(
        rf"cni-plugins-linux-(?P<arch>amd64|arm64)-v{_VERSION}\.(?:tgz|tar\.gz)", re.ASCII
    ),
}


@dataclass(frozen=True, slots=True)
class Release:
    """One file that a project releases, for one architecture.

    kind: ``containerd`` (an archive of ``bin/``), ``runc`` (a program), ``cni`` (an archive).
    version: empty if its path does not tell.
    sha256: of the file, in lower case.
    path: below the releases URL.
    """

    kind: str
    version: str
    arch: str
    sha256: str
    path: str

    @property
    def line(self) -> str:
        """The release as a line of a file of sums."""
        return f"{self.sha256}  {self.path}\n"


@dataclass(frozen=True, slots=True)
class Installed:
    """What is installed, and where; ``containerd``, ``runc`` and ``cni`` are versions."""

    directory: Path
    containerd: str
    runc: str
    cni: str

    @property
    def plugins(self) -> Path:
        """Where the CNI plugins lie."""
        return self.directory / "cni"


# --- what is wanted --------------------------------------------------------------------------


def parse_sums(text: str, source: str) -> tuple[Release, ...]:
    """Return the releases that a file of sums names, of all architectures.

    ``source`` is the file's name, for errors.  Files of which we know no use are left out.
    Raises InvalidSetting, naming the line.
    """
    found: dict[str, Release] = {}
    for number, line in enumerate((line.strip() for line in text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match or any(set(part) == {"."} for part in match["path"].split("/")):
            raise InvalidSetting(
                f"line {number} of {source} is not a sha256 sum, two spaces and a path",
                hint="write it as sha256sum does, the path below the releases URL",
            )
        release = _release(match["sum"].lower(), match["path"])
        if release is not None:
            before = found.setdefault(release.path, release)
            if before != release:
                raise InvalidSetting(
                    f"line {number} of {source} gives {release.path} another sum",
                    hint="leave one of them",
                )
    return tuple(found.values())


def _release(sha256: str, path: str) -> Release | None:
    name = path.rpartition("/")[2]
    for kind, pattern in _FILES.items():
        if match := pattern.fullmatch(name):
            version = match["version"]
            if version is None and (versioned := pattern.search(path)):
                version = versioned["version"]
            return Release(kind, version or "", match["arch"], sha256, path)
    return None


def select(releases: tuple[Release, ...], machine: str, source: str) -> tuple[Release, ...]:
    """Return the three releases for a machine (``x86_64``): containerd, runc, CNI plugins.

    Raises DaemonNotFound for a machine that nobody releases for, InvalidSetting when the sums
    of ``source`` do not say exactly what to install.
    """
    arch = ARCHITECTURES.get(machine.lower())
    if arch is None:
        raise DaemonNotFound(
            f"there are releases for amd64 and arm64 only, and this machine is {machine!r}",
            hint="install your distribution's containerd and runc, or name a containerd with"
            " --address or CONTAINERD_ADDRESS",
        )
    chosen = []
    for kind in KINDS:
        fitting = [r for r in releases if (r.kind, r.arch) == (kind, arch)]
        if len(fitting) != 1:
            found = " and ".join(r.path for r in fitting) or "none"
            raise InvalidSetting(
                f"{source} must name one release of {kind} for linux/{arch}, and names {found}",
                hint="mend it, or unset SERPENTINE_RELEASES_SUMS to install those that we pin",
            )
        chosen += fitting
    return tuple(chosen)


def directory_name(releases: tuple[Release, ...]) -> str:
    """Return the name of the directory that holds exactly these releases."""
    lines = "".join(release.line for release in releases)
    return f"bin-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def _wanted(settings: Settings, machine: str) -> tuple[Release, ...]:
    if settings.releases_sums is None:
        source = "releases.sha256"
        folder = importlib.resources.files("serpentine.daemon")
        text = folder.joinpath("image", source).read_text(encoding="utf-8")
    else:
        source = str(settings.releases_sums)
        try:
            text = settings.releases_sums.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not a text"
            raise InvalidSetting(
                f"cannot read the sums of the releases, {source}: {why}",
                hint="mend or unset SERPENTINE_RELEASES_SUMS",
            ) from None
    return select(parse_sums(text, source), machine, source)


# --- what is there ---------------------------------------------------------------------------


def installed(data_dir: Path) -> Installed | None:
    """Return what is installed and whole, else None.

    Its directory is the one behind the link: a daemon that was started from it keeps it when
    another one takes its place.
    """
    # RuntimeError: a link to itself.
    with contextlib.suppress(OSError, RuntimeError):
        return _whole((data_dir / _LINK).resolve(strict=True))
    return None


def search_path(data_dir: Path) -> str:
    """Return the PATH for our own containerd: what we installed goes before the rest."""
    path = os.environ.get("PATH", os.defpath)
    ours = installed(data_dir)
    return f"{ours.directory}{os.pathsep}{path}" if ours else path


def _whole(directory: Path) -> Installed | None:
    """Return what a directory holds if every file is there in its full length, else None."""
    try:
        note = json.loads((directory / _NOTE).read_text(encoding="utf-8"))
        for name, size in note["files"].items():
            status = (directory / name).stat()
            if not (stat.S_ISREG(status.st_mode) and status.st_mode & 0o111):
                return None
            if status.st_size != size:
                return None
        if not {name for names in _NEEDED.values() for name in names} <= set(note["files"]):
            return None
        return Installed(directory, *(str(note["versions"][kind]) for kind in KINDS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# --- installing ------------------------------------------------------------------------------


async def install(
    settings: Settings, *, on_event: OnEvent, machine: str | None = None
) -> Installed:
    """Make sure that the releases are installed, and return what is; quick when they are.

    ``machine`` is this one by default.  Safe when several processes do it at once: one does,
    the others find it.  On any failure everything is as it was before.  Raises DaemonFailed,
    DaemonPermission, DaemonNotFound, InvalidSetting.
    """
    began = time.monotonic()
    # A variable: a type checker for another system would call the rest unreachable.
    system: str = sys.platform
    if not system.startswith("linux"):
        raise DaemonNotFound(
            f"containerd does not run on {system}, so there is nothing to install",
            hint="name a containerd with --address or CONTAINERD_ADDRESS",
        )
    wanted = await asyncio.to_thread(_wanted, settings, machine or platform.machine())
    data_dir = settings.data_dir
    directory = data_dir / directory_name(wanted)
    done = await asyncio.to_thread(installed, data_dir)
    fetched = 0
    if done is None or done.directory.name != directory.name:
        async with _locked(data_dir, on_event):
            await asyncio.to_thread(_check_link, data_dir / _LINK)
            if await asyncio.to_thread(_whole, directory) is None:
                if settings.offline:
                    raise DaemonFailed(
                        f"the releases are not in {directory}, and offline nothing is downloaded",
                        hint="once, with a network: serpentine daemon install",
                    )
                fetched = await _bring(wanted, directory, settings.releases_url, on_event)
            else:
                await _in_thread(_switch, data_dir, directory.name)
        done = await asyncio.to_thread(installed, data_dir)
        if done is None:
            raise DaemonFailed(
                f"what was installed in {directory} is gone or harmed", hint="try again"
            )
    on_event(ReleaseInstalled(str(done.directory), fetched, time.monotonic() - began))
    return done


async def _bring(
    releases: tuple[Release, ...], directory: Path, base: str, on_event: OnEvent
) -> int:
    """Download, verify and unpack releases into a directory; return how many bytes came."""
    with _on_disk(directory.parent):
        # Beside its later place: a rename does not cross file systems.
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory.parent))
    try:
        async with _session(base) as session, task_group() as group:
            tasks = [
                group.create_task(
                    _download(session, f"{base}/{r.path}", r, temporary / r.kind, on_event)
                )
                for r in releases
            ]
        # One piece of work: a cancellation comes before it or after it, not in between.
        await _in_thread(_publish, releases, temporary, base, directory)
        return sum(task.result() for task in tasks)
    finally:
        await _in_thread(shutil.rmtree, temporary, True)


async def _in_thread(work: Callable[..., object], *arguments: object) -> None:
    """Do work that blocks; even when cancelled not before it has ended.

    Otherwise it would go on writing while we clean up.
    """
    await shielded(asyncio.to_thread(work, *arguments), timeout=DISK_TIMEOUT)


@asynccontextmanager
async def _locked(data_dir: Path, on_event: OnEvent) -> AsyncIterator[None]:
    """Let one process at a time install."""
    lock = data_dir / "install.lock"
    async with contextlib.AsyncExitStack() as stack:
        with _on_disk(data_dir):
            # 0711: as the embedded daemon makes it.
            await asyncio.to_thread(data_dir.mkdir, 0o711, parents=True, exist_ok=True)
            # No limit: a slow line takes as long as it takes, and its holder has time-outs.
            await stack.enter_async_context(
                locked(
                    lock,
                    timeout=math.inf,
                    on_wait=lambda: on_event(ReleaseWaiting(str(lock))),
                )
            )
            await _in_thread(_remove_leftovers, data_dir)
        yield


def _remove_leftovers(data_dir: Path) -> None:
    """Remove what installs left that were killed; whoever holds the lock is the only one."""
    for leftover in data_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


# --- downloading -----------------------------------------------------------------------------


class _BrokenOffError(Exception):
    """A transfer that is worth another try."""


@asynccontextmanager
async def _session(base: str) -> AsyncIterator[aiohttp.ClientSession]:
    import aiohttp

    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT
        ),
        # Sums are over the bytes as stored.
        headers={"User-Agent": "serpentine", "Accept-Encoding": "identity"},
        auto_decompress=False,
        read_bufsize=CHUNK,
        # Proxies, and ~/.netrc for a mirror that wants a login.  Loopback is never reached
        # through a proxy.
        trust_env=not _is_loopback(base),
    ) as session:
        yield session


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


async def _download(
    session: aiohttp.ClientSession, url: str, release: Release, path: Path, on_event: OnEvent
) -> int:
    """Download a release into a file and verify it; return its size.

    A transfer that breaks off begins again, a few times.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return await _transfer(session, url, release, path, on_event)
        except _BrokenOffError as broken:
            if delay is None:
                raise DaemonFailed(
                    f"cannot download {url}: {broken}",
                    hint="check the network, HTTPS_PROXY and NO_PROXY; or name a mirror of"
                    " the releases in SERPENTINE_RELEASES_URL",
                ) from broken.__cause__
            on_event(Retrying(what=url, reason=str(broken), delay=delay))
            await asyncio.sleep(delay)
    raise AssertionError("the last try returns or raises")


async def _transfer(
    session: aiohttp.ClientSession, url: str, release: Release, path: Path, on_event: OnEvent
) -> int:
    import aiohttp

    hasher = hashlib.sha256()
    offset = 0
    with contextlib.ExitStack() as stack:
        with _on_disk(path.parent, url):
            # Unbuffered: whatever is left to write at its closing could fail there unnoticed.
            file = stack.enter_context(path.open("wb", buffering=0))

        async def keep(data: bytes) -> None:
            nonlocal offset
            with _on_disk(path.parent, url):
                await _in_thread(_append, file, hasher, data)
            offset += len(data)

        try:
            async with session.get(url) as response:
                _check_status(response.status, url)
                size = response.content_length
                on_event(ReleaseProgress(release.kind, release.version, url, 0, size))
                held = bytearray()
                while chunk := await response.content.readany():
                    held += chunk
                    if max(offset + len(held), size or 0) > MAX_DOWNLOAD:
                        raise DaemonFailed(
                            f"{url} is larger than {MAX_DOWNLOAD // 1024**2} MiB",
                            hint="check SERPENTINE_RELEASES_URL and SERPENTINE_RELEASES_SUMS",
                        )
                    if len(held) >= CHUNK:
                        await keep(bytes(held))
                        held.clear()
                        on_event(ReleaseProgress(release.kind, release.version, url, offset, size))
                await keep(bytes(held))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _broken(error, url) from error
    if hasher.hexdigest() != release.sha256:
        raise DaemonFailed(
            f"{url} is not the file that was released: its sha256 sum is"
            f" {hasher.hexdigest()}, not {release.sha256}",
            hint="nothing of it was used; look what serves it (SERPENTINE_RELEASES_URL, a"
            " proxy), or mend the sum in SERPENTINE_RELEASES_SUMS",
        )
    on_event(ReleaseProgress(release.kind, release.version, url, offset, size))
    return offset


def _append(file: IO[bytes], hasher: Any, data: bytes) -> None:
    hasher.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _check_status(status: int, url: str) -> None:
    """Raise for any status but 200."""
    if status == 200:
        return
    if status in (408, 425, 429) or status >= 500:
        raise _BrokenOffError(f"the server answered {status}")
    if status in (401, 403):
        raise DaemonFailed(
            f"the server does not let us have {url} (HTTP status {status})",
            hint="check SERPENTINE_RELEASES_URL, and the login for it in ~/.netrc",
        )
    found = "does not exist" if status in (404, 410) else "cannot be downloaded"
    raise DaemonFailed(
        f"{url} {found} (HTTP status {status})",
        hint="check SERPENTINE_RELEASES_URL, and the paths in SERPENTINE_RELEASES_SUMS",
    )


def _broken(error: Exception, url: str) -> DaemonFailed | _BrokenOffError:
    """Return what a failure of aiohttp means; its own text may hold an address or a signature."""
    import aiohttp

    if isinstance(error, aiohttp.ClientSSLError):
        return DaemonFailed(
            f"cannot make a TLS connection to download {url}",
            hint="if its certificate's authority is your own, name it in SSL_CERT_FILE",
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return _BrokenOffError("cannot find the host")
    if isinstance(error, TimeoutError):
        return _BrokenOffError("nothing came for a while")
    if isinstance(error, aiohttp.ClientPayloadError):
        return _BrokenOffError("the connection broke off")
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError):
        number = error.errno or 0
        words = os.strerror(number).lower() if number in errno.errorcode else "no connection"
        return _BrokenOffError(words)
    if isinstance(error, aiohttp.ClientConnectionError):
        return _BrokenOffError("the connection broke off")
    return DaemonFailed(
        f"cannot download {url}: {type(error).__name__}",
        hint="check SERPENTINE_RELEASES_URL, HTTPS_PROXY and HTTP_PROXY",
    )


# --- on the disk -----------------------------------------------------------------------------


@contextmanager
def _on_disk(directory: Path, url: str = "") -> Iterator[None]:
    """Turn the errors of files in our data directory into ours; ``url`` is what was to be kept."""
    what = f"cannot keep {url}" if url else "cannot install containerd"
    choose = "choose another directory with SERPENTINE_DATA_DIR"
    try:
        yield
    except PermissionError as error:
        raise DaemonPermission(
            f"{what} in {error.filename or directory}: permission denied",
            hint=f"run as root, or {choose}",
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DaemonFailed(
                f"{what} in {directory}: the disk is full", hint=f"make room, or {choose}"
            ) from None
        reason = error.strerror or str(error) or type(error).__name__
        raise DaemonFailed(
            f"{what} in {error.filename2 or error.filename or directory}: {reason.lower()}",
            hint=choose,
        ) from None


def _publish(releases: tuple[Release, ...], temporary: Path, base: str, directory: Path) -> None:
    """Unpack verified downloads, put the whole at its place in one step, and link to it."""
    new = temporary / "new"
    with _on_disk(directory.parent):
        (new / "cni").mkdir(parents=True)
    for release in releases:
        url = f"{base}/{release.path}"
        with _on_disk(directory.parent, url):
            if release.kind == "runc":
                with (temporary / release.kind).open("rb") as source:
                    _write_program(source, new / "runc")
            else:
                _unpack(temporary / release.kind, release.kind, new, url)
        wanting = [name for name in _NEEDED[release.kind] if not (new / name).exists()]
        if release.kind == "cni" and not any((new / "cni").iterdir()):
            wanting = ["plugin"]
        if wanting:
            raise _unfit(url, f"it holds no {' and no '.join(wanting)}")
    with _on_disk(directory.parent):
        files = {
            str(path.relative_to(new)): path.stat().st_size
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        note = {"versions": {r.kind: r.version for r in releases}, "files": files}
        with (new / _NOTE).open("x", encoding="utf-8") as file:
            json.dump(note, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o755)
        (new / "cni").chmod(0o755)
        if directory.exists():
            # One that somebody harmed: out of the way.
            directory.rename(temporary / "old")
        new.rename(directory)
    _switch(directory.parent, directory.name)


def _unpack(archive: Path, kind: str, into: Path, url: str) -> None:
    """Unpack the programs of a verified archive.

    By hand: not every Python 3.11 has tarfile's filters, and all that we want of a member is
    its name and its bytes.
    """
    room = MAX_UNPACKED
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                target = _target(member.name, kind)
                if target is None or member.isdir():
                    continue
                room -= member.size
                if room < 0:
                    raise _unfit(url, f"it unpacks to more than {MAX_UNPACKED // 1024**3} GiB")
                source = tar.extractfile(member) if member.isreg() else None
                if source is None:
                    raise _unfit(url, f"{member.name!r} in it is no regular file")
                with source:
                    _write_program(source, into / target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, UnicodeError) as error:
        raise _unfit(url, f"it is no archive ({error})") from None


def _target(name: str, kind: str) -> str | None:
    """Return where a member of an archive goes, below the directory; None for nowhere."""
    parts = PurePosixPath(name).parts
    if ".." in parts:
        return None
    if kind == "containerd":
        return parts[1] if len(parts) == 2 and parts[0] == "bin" else None
    return f"cni/{parts[0]}" if len(parts) == 1 and parts[0] != "/" else None


def _write_program(source: IO[bytes], path: Path) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(source, file, CHUNK)
        file.flush()
        path.chmod(0o755)
        # Before the rename says that it is whole: a power failure must not prove it wrong.
        os.fsync(file.fileno())


def _unfit(url: str, why: str) -> DaemonError:
    return DaemonFailed(
        f"cannot use {url}: {why}", hint="check what SERPENTINE_RELEASES_SUMS names"
    )


def _check_link(link: Path) -> None:
    """Raise for what no link can replace, before anything is downloaded."""
    if link.is_dir() and not link.is_symlink():
        raise DaemonFailed(
            f"{link} is in the way: it is a directory, and not one of ours",
            hint="move it away, or choose another directory with SERPENTINE_DATA_DIR",
        )


def _switch(data_dir: Path, name: str) -> None:
    """Let the link point to a directory, in one step, and remove what is older than the last."""
    link = data_dir / _LINK
    with _on_disk(data_dir):
        try:
            before = str(link.readlink())
        except OSError:
            before = ""  # there is none, or it is none: the replacing will say so
        if before != name:
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=data_dir) as temporary:
                new = Path(temporary) / _LINK
                new.symlink_to(name)
                new.replace(link)
            _sync(data_dir)
    for old in data_dir.glob("bin-*"):
        # The last one stays: somebody may have looked it up and be about to start it.
        if old.name not in (name, before) and before != name and not _in_use(old):
            shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _in_use(directory: Path) -> bool:
    """Tell whether a process runs a program of a directory."""
    prefix = f"{directory.resolve()}/"
    for link in Path("/proc").glob("[0-9]*/exe"):
        # It ended meanwhile, or is somebody else's.
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(prefix):
                return True
    return False
