"""No secret where it does not belong: a daemon's whole life, and then a search.

One fixture lives through everything that the command line can do, in Docker and in Podman, and
keeps all that could be seen meanwhile.  The tests search it for every token and key there was.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import serpentine
from serpentine.containerd import Containerd
from serpentine.daemon.container import ContainerDaemon, state_file
from serpentine.daemon.discovery import find
from serpentine.daemon.envoy import UID, Door
from serpentine.errors import DaemonPermission, SerpentineError
from serpentine.events import Event
from tests.support.engines import BASE_IMAGE, OurDaemon
from tests.support.http2 import Squatter
from tests.support.images import busybox_layer, image, push

# Whichever comes first waits for the whole life.
pytestmark = pytest.mark.timeout(180)

_FILES = ("token", "key.pem", "cert.pem", "ca.pem")


def secrets_of(door: Door) -> set[bytes]:
    """Return what may be seen nowhere: the token and the key, and how they might be written."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    token = door.token.encode()
    found = {
        token[:12],
        token[-12:],
        token.hex().encode(),
        base64.b64encode(token).rstrip(b"="),
        base64.b64encode(b"Bearer " + token)[12:-4],
        token.translate(bytes.maketrans(b"-_", b"+/"))[:12],
    }
    found |= {line for line in door.key.splitlines() if b"PRIVATE KEY" not in line}
    number = load_pem_private_key(door.key, None).private_numbers().private_value
    found |= {str(number).encode(), f"{number:x}".encode(), number.to_bytes(32, "big")}
    assert all(len(secret) >= 12 for secret in found), found
    return found


class Watch:
    """Notes the arguments and the environment of every process, again and again."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ending.wait(0.1):
            self.look()

    def look(self) -> None:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                for name in ("cmdline", "environ"):
                    try:
                        self.seen.add(Path(entry.path, name).read_bytes())
                    except OSError:  # it has ended
                        break


class Life:
    """A daemon behind Envoy, and all that could be seen of it."""

    def __init__(self, ours: OurDaemon, registry: str) -> None:
        self.ours = ours
        self.registry = registry
        self.secrets: set[bytes] = set()
        self.doors: list[Door] = []
        # What was looked at -> what was seen there.
        self.commands: list[tuple[str, str]] = []
        self.engine: list[tuple[str, str]] = []
        self.objects: list[tuple[str, str]] = []
        self.processes: set[bytes] = set()
        self.data_root = ours.engine.folder

    @property
    def folder(self) -> Path:
        return self.ours.folder / "data" / "envoy"

    @property
    def port(self) -> int:
        return json.loads(state_file(self.ours.settings()).read_text())["port"]

    def remember(self) -> None:
        """Note the secrets that there are now."""
        door = None
        with contextlib.suppress(DaemonPermission):  # a loose file, which had been noted before
            door = Door.load(self.folder)
        if door is not None and door not in self.doors:
            self.doors.append(door)
            self.secrets |= secrets_of(door)

    def run(self, *arguments: str, status: int | None = 0, **environ: str) -> str:
        """Run a command and keep what it prints; ``status`` None: whatever it ends with."""
        done = subprocess.run(
            [sys.executable, "-m", "serpentine.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            # Whatever its user's mask allows.
            umask=0,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.ours.folder),
                **self.ours.environ,
                **environ,
            },
        )
        self.commands.append((f"{' '.join(arguments)} {environ}", done.stdout + done.stderr))
        assert status is None or done.returncode == status, done.stderr
        assert environ or "Traceback" not in done.stderr
        self.remember()
        return done.stdout + done.stderr

    def ask(self, *arguments: str) -> None:
        said = self.ours.engine.run(*arguments, check=False)
        self.engine.append((" ".join(arguments), said))

    def look(self) -> None:
        """Keep all that the engine tells of what is ours."""
        names, engine = self.ours.names, self.ours.engine
        containers = [names.containerd, names.envoy]
        images = [engine.inspect(name)["Image"] for name in containers]
        self.ask("inspect", *containers)
        self.ask("image", "inspect", *images)
        for found in images:
            self.ask("history", "--no-trunc", found)
        self.ask("volume", "inspect", names.data_volume, names.run_volume)
        for name in containers:
            self.ask("logs", "--timestamps", name)
            self.ask("top", name)
            self.ask("port", name)
            self.ask("diff", name)
        self.ask("ps", "-a", "--no-trunc")
        self.ask("images", "-a", "--no-trunc")


@pytest.fixture(scope="module", params=["docker", "podman"])
def life(request, mirror, registry):
    """What was seen in the life of a daemon, from its first start; it still runs."""
    engine = request.getfixturevalue(request.param)
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    reference = push(registry, "secrets/one", "1", image([busybox_layer()]))
    ours = OurDaemon(engine, mirror, folder, SERPENTINE_TRANSPORT="envoy")
    seen = Life(ours, registry.address)
    try:
        with Watch() as watch:
            live(seen, reference)
            in_one_process(seen)
            watch.look()
        seen.processes = watch.seen
        yield seen
    finally:
        seen.run("daemon", "remove", "--volumes")
        assert not seen.folder.exists()
        shutil.rmtree(folder)


# What grpcio and asyncio say when somebody looks for a fault.
LOUD = {"GRPC_VERBOSITY": "debug", "PYTHONASYNCIODEBUG": "1"}


def live(seen: Life, reference: str) -> None:
    """Do all that the command line can, and let it fail; in Podman, whatever concerns that."""
    run, engine = seen.run, seen.ours.engine
    run("daemon", "start", **LOUD)
    seen.look()
    run("pull", "--json", "--progress", "json", reference, **LOUD)
    run("daemon", "rotate-token", **LOUD)
    run("doctor", "--registry", seen.registry, "--json", status=None)
    if engine.kind == "docker":
        print_everything(seen, reference)
        spoil_files(seen)
        lose_parts(seen)
    engine.run("rm", "-f", seen.ours.names.envoy)
    run("daemon", "status", "--json", status=1)
    run("images", **LOUD)
    # What is no Envoy cannot be started, when it has got its files.
    run("daemon", "start", status=1, SERPENTINE_ENVOY_IMAGE=BASE_IMAGE)
    run("daemon", "restart", "--json", **LOUD)
    run("daemon", "logs", "--tail", "1000")
    seen.look()
    seen.ask("info")
    events = ["--since", "1h", "--until", "0s"] if engine.kind == "docker" else ["--stream=false"]
    seen.ask("events", *events)
    seen.engine.append(("its own log", engine.log.read_text(errors="replace")))


def print_everything(seen: Life, reference: str) -> None:
    """Run every command, with and without JSON."""
    run, absent = seen.run, "127.0.0.1:1/no/image:1"
    run("daemon", "start", "--json")
    run("daemon", "status")
    run("daemon", "status", "--json")
    run("doctor", "--registry", seen.registry, status=None)
    run("pull", reference)
    run("images")
    run("images", "--json")
    run("inspect", reference)
    run("inspect", "--json", reference)
    run("inspect", absent, status=1)
    run("pull", "--progress", "json", absent, status=1)
    run("rmi", "--json", absent, status=1)
    run("rmi", reference)
    run("pull", "--json", reference)
    run("rmi", "--json", reference)
    run("daemon", "rotate-token", "--json")
    run("daemon", "stop", "--json")
    # Asks the base image's registry, which the machine may not reach.
    run("daemon", "upgrade", "--json", status=None)
    run("daemon", "start")


def spoil_files(seen: Life) -> None:
    """Call without a token and with a wrong one, and let the file be open to others."""
    run, port = seen.run, seen.port
    run("--address", f"127.0.0.1:{port}", "images", status=1, **LOUD)
    wrong = "wrong-token-wrong-token-wrong-token-wrong-token"
    (seen.folder / "token").write_text(wrong)
    run("daemon", "status", status=1, **LOUD)
    run("images", **LOUD)
    seen.secrets.add(wrong.encode())
    (seen.folder / "token").chmod(0o644)
    for arguments in (["images"], ["daemon", "status", "--json"], ["daemon", "restart"]):
        assert "rotate-token" in run(*arguments, status=1)
    run("doctor", "--registry", seen.registry, "--json", status=1)
    run("daemon", "rotate-token")


def lose_parts(seen: Life) -> None:
    """Kill containerd; kill Envoy and take its port."""
    run, engine, names = seen.run, seen.ours.engine, seen.ours.names
    engine.run("kill", names.containerd)
    run("daemon", "status", status=1, **LOUD)
    run("doctor", "--registry", seen.registry, status=None)
    run("images", **LOUD)
    seen.look()
    port = seen.port
    engine.run("kill", names.envoy)
    with Squatter(port):
        run("daemon", "status", status=1, **LOUD)
        run("images", **LOUD)


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that anybody logs, whatever its level."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


def in_one_process(seen: Life) -> None:
    """Use the Python API, and keep what its objects, events, logs and errors say."""
    settings = seen.ours.settings()

    def keep(what: str, *values: object) -> None:
        for value in values:
            seen.objects.append((what, f"{value!r} {value}"))

    def keep_error(error: BaseException) -> None:
        while True:
            text = "".join(traceback.format_exception(error))
            keep("an error", error, error.args, getattr(error, "__dict__", {}), text)
            following = error.__cause__ or error.__context__
            if following is None:
                return
            error = following

    def on_event(event: Event) -> None:
        keep("an event", event, event.to_dict())

    async def use() -> None:
        daemon = await find(settings, on_event=on_event)
        remembered = ContainerDaemon.remembered(settings)
        assert daemon
        assert remembered
        await remembered.rotate_token(on_event=on_event)
        seen.remember()
        daemon = await find(settings, on_event=on_event)
        assert daemon
        endpoint = daemon.endpoint
        keep("Endpoint", endpoint)
        keep("Daemon", daemon)
        keep("ContainerDaemon", remembered, remembered.state)
        keep("Settings", settings)
        keep("Door", *seen.doors)
        async with Containerd(endpoint) as client:
            await client.check()
            keep("Containerd", client, client.leases, client.content)
        async with serpentine.connect(settings=settings) as engine:
            await engine.images()
            keep("Engine", engine)
            with pytest.raises(SerpentineError) as caught:
                await engine.inspect("127.0.0.1:1/no/image:1")
            keep_error(caught.value)
        token = endpoint.metadata[0][1]
        # Refused; a stranger's certificate; nobody there; what cannot be sent.
        for broken in (
            replace(endpoint, metadata=(("authorization", token[:-1]),)),
            replace(endpoint, root_certificates=Door.make().ca),
            replace(endpoint, address="127.0.0.1:1"),
        ):
            async with Containerd(broken) as client:
                for call in (client.check(timeout=2), client.leases.all(), client.wait_ready(0.2)):
                    with pytest.raises(SerpentineError) as caught:
                        await call
                    keep_error(caught.value)
        with pytest.raises(SerpentineError) as caught:
            replace(endpoint, metadata=(("Authorization", token),))
        keep_error(caught.value)

    with logged() as text:
        asyncio.run(use(), debug=True)
    seen.objects.append(("the log", text.getvalue()))


def holding(secrets: set[bytes], seen: Iterable[tuple[str, str]]) -> list[str]:
    """Return where a secret is found."""
    return [
        what
        for what, text in seen
        if any(secret in text.encode(errors="surrogateescape") for secret in secrets)
    ]


def test_the_search_finds_what_is_there(life):
    """Else the others would prove nothing."""
    # The first, a rotated one, and one in this process; in Docker three more, one of them wrong.
    assert len(life.doors) == (6 if life.ours.engine.kind == "docker" else 3)
    for door in life.doors:
        for text in (door.token, f"x{door.token}x", door.key.decode(), f"{vars_of(door)}"):
            assert holding(secrets_of(door), [("x", text)]) == ["x"]


def vars_of(door: Door) -> dict[str, object]:
    return {name: getattr(door, name) for name in ("token", "key")}


def test_what_commands_print(life):
    """Done when 5."""
    assert holding(life.secrets, life.commands) == []


def test_what_the_engine_shows(life):
    """Done when 5."""
    assert holding(life.secrets, life.engine) == []
    # It was about our two containers, and they said something.
    said = dict(life.engine)
    for name in (life.ours.names.containerd, life.ours.names.envoy):
        assert said[f"logs --timestamps {name}"]
        assert name in said["ps -a --no-trunc"]


def test_arguments_and_environments_of_processes(life):
    """Done when 5."""
    for part in (b"/etc/serpentine/envoy.json", b"serpentine.cli\0pull", b"containerd\0--config"):
        assert any(part in seen for seen in life.processes), part
    assert [s for s in life.processes if any(secret in s for secret in life.secrets)] == []


def test_objects_events_logs_and_errors(life):
    kinds = {what for what, _ in life.objects}
    assert kinds >= {"Door", "Endpoint", "Containerd", "Daemon", "Engine", "an error", "an event"}
    assert "Using selector" in dict(life.objects)["the log"]
    assert holding(life.secrets, life.objects) == []


def test_files_of_the_user(life):
    """Secret ones are the owner's alone, whatever the mask; no other holds a secret."""
    assert life.folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in life.folder.iterdir()}
    assert modes == dict.fromkeys(_FILES, 0o600)
    state = life.ours.folder / "data" / "daemon.json"
    assert state.stat().st_mode & 0o777 == 0o600
    others = [p for p in life.ours.folder.rglob("*") if p.is_file() and p.parent != life.folder]
    assert state in others
    texts = [(str(path), path.read_text(errors="surrogateescape")) for path in others]
    assert holding(life.secrets, texts) == []


def test_files_in_envoys_container(life):
    archive = subprocess.run(
        [*life.ours.engine.client, "cp", f"{life.ours.names.envoy}:/etc/serpentine", "-"],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            found[member.name.rstrip("/")] = (member.mode & 0o7777, member.uid, member.gid)
        held = tar.extractfile("serpentine/envoy.json")
        assert held
        assert life.doors[-1].token.encode() in held.read()
    secret = (0o600, UID, UID)
    assert found == {
        "serpentine": (0o700, UID, UID),
        "serpentine/envoy.json": secret,
        "serpentine/cert.pem": secret,
        "serpentine/key.pem": secret,
    }


def test_nothing_else_that_the_engine_stores(life, tmp_path):
    """Of every token there was, only the last is left, in Envoy's own files; no volume has one."""
    patterns = tmp_path / "patterns"
    lines = [door.token for door in life.doors]
    lines += [door.key.decode().splitlines()[1] for door in life.doors]
    patterns.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["grep", "-rlaF", "--devices=skip", "-f", patterns, life.data_root],
        capture_output=True,
        text=True,
        timeout=100,
    )
    found = {Path(line) for line in done.stdout.splitlines()}
    assert {path.name for path in found} == {"envoy.json", "key.pem"}
    assert {str(path.parent)[-len("/etc/serpentine") :] for path in found} == {"/etc/serpentine"}
    token = life.doors[-1].token
    for path in found:
        text = path.read_text()
        assert token in text or life.doors[-1].key.decode() == text
