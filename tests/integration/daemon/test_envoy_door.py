"""The door of a containerd in a container: who gets in, and that nobody else gets anything.

The proof is taken behind the door.  Every attempt is a call that would change something: what it
would have made is looked for through containerd's own socket, which lies in a volume.  And behind
an Envoy of the same configuration, a recorder notes every byte that comes through.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trustme

import serpentine
from serpentine.containerd import Containerd, Endpoint
from serpentine.containerd._proto import leases_pb2
from serpentine.containerd.client import PROXY_ALONE
from serpentine.daemon.discovery import find
from serpentine.daemon.envoy import PORT, SERVER_NAME, UID, Door, envoy_config
from serpentine.errors import ContainerdError, DaemonPermission, DaemonUnreachable
from serpentine.events import ignore
from serpentine.settings import Settings
from tests.support.engines import BASE_IMAGE, OurDaemon, envoy_binary
from tests.support.http2 import TIMEOUT, Answer, Recorder, Squatter, ask, frame, say, tls_context
from tests.support.images import busybox_layer, image, push
from tests.support.servers import Server, free_port

NAMESPACE = "door"
CREATE = "/containerd.services.leases.v1.Leases/Create"
SILENT = "/containerd.services.diff.v1.Diff/Silent"
# Envoy's own limit for a route without one; a call must live longer than that.
ENVOYS_DEFAULT = 15.0


def create(name: str) -> bytes:
    """Return the body of a call that makes a lease."""
    return frame(leases_pb2.CreateRequest(id=name).SerializeToString())


@dataclass(frozen=True)
class Target:
    """An Envoy, and what its owner knows."""

    port: int
    door: Door

    @contextmanager
    def connected(
        self, *, alpn: tuple[str, ...] = ("h2",), newest: ssl.TLSVersion | None = None
    ) -> Iterator[socket.socket]:
        context = tls_context(self.door.ca, alpn=alpn, newest=newest)
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=SERVER_NAME) as secure,
        ):
            yield secure

    def headers(self, **changes: str | None) -> list[tuple[str, str]]:
        """Return the headers of a call that is let in, with changes; None leaves one out.

        Underscores stand for hyphens, a leading one for a colon; ``{token}`` for the token.
        """
        found: dict[str, str | None] = {
            ":method": "POST",
            ":scheme": "https",
            ":path": CREATE,
            ":authority": SERVER_NAME,
            "te": "trailers",
            "content-type": "application/grpc",
            "containerd-namespace": NAMESPACE,
            "authorization": "Bearer {token}",
        }
        for name, value in changes.items():
            found[name.replace("_", ":", name[0] == "_").replace("_", "-")] = value
        token = self.door.token
        basic = base64.b64encode(f"serpentine:{token}".encode()).decode()
        return [
            (
                name,
                value.replace("{token}", token)
                .replace("{basic}", basic)
                .replace("{swapped}", token.swapcase()),
            )
            for name, value in found.items()
            if value is not None
        ]

    def ask(self, body: bytes, **changes: str | None) -> Answer:
        with self.connected() as secure:
            return ask(secure, self.headers(**changes), body)


Attempt = Callable[[Target, bytes], str]


def asking(**changes: str | None) -> Attempt:
    return lambda target, body: str(target.ask(body, **changes))


def _two_tokens(target: Target, body: bytes) -> str:
    headers = target.headers(authorization="Bearer wrong") + target.headers()[-1:]
    with target.connected() as secure:
        return str(ask(secure, headers, body))


def _cut(target: Target, body: bytes) -> str:
    return str(target.ask(body, authorization=f"Bearer {target.door.token[:-1]}"))


def _old_request(target: Target, body: bytes, *more: str) -> bytes:
    lines = [
        f"POST {CREATE} HTTP/1.1",
        f"Host: {SERVER_NAME}",
        f"Authorization: Bearer {target.door.token}",
        "Content-Type: application/grpc",
        f"Containerd-Namespace: {NAMESPACE}",
        f"Content-Length: {len(body)}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _old_over_tls(*alpn: str) -> Attempt:
    def attempt(target: Target, body: bytes) -> str:
        try:
            with target.connected(alpn=alpn) as secure:
                got = say(secure, _old_request(target, body))
        except ssl.SSLError:
            return "closed"
        # At most the settings that a server of HTTP/2 begins with.
        return "answered" if b"HTTP/1" in got else "closed"

    return attempt


def _plain(target: Target, data: bytes) -> str:
    with socket.create_connection(("127.0.0.1", target.port), timeout=TIMEOUT) as plain:
        got = say(plain, data)
    # At most a TLS alert (21).
    return "closed" if not got or (got[0] == 21 and len(got) == 7) else "answered"


def _plain_old(target: Target, body: bytes) -> str:
    return _plain(target, _old_request(target, body))


def _plain_upgrade(target: Target, body: bytes) -> str:
    more = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAA")
    return _plain(target, _old_request(target, body, *more))


def _plain_new(target: Target, body: bytes) -> str:
    with socket.create_connection(("127.0.0.1", target.port), timeout=TIMEOUT) as plain:
        return str(ask(plain, target.headers(_scheme="http"), body))


def _old_tls(target: Target, body: bytes) -> str:
    try:
        with target.connected(newest=ssl.TLSVersion.TLSv1_2) as secure:
            return str(ask(secure, target.headers(), body))
    except ssl.SSLError:
        return "closed"


DENIED = "200 grpc 7"
UNKNOWN = "200 grpc 12"
# What a browser or a stranger may send, and how it must end.
ATTEMPTS: dict[str, tuple[Attempt, str]] = {
    "no token": (asking(authorization=None), DENIED),
    "an empty token": (asking(authorization="Bearer "), DENIED),
    "a wrong token": (asking(authorization="Bearer wrong"), DENIED),
    "a token cut short": (_cut, DENIED),
    "a token and more": (asking(authorization="Bearer {token}x"), DENIED),
    "the token in the other case": (asking(authorization="Bearer {swapped}"), DENIED),
    "a wrong token before the right one": (_two_tokens, DENIED),
    "the token alone": (asking(authorization="{token}"), DENIED),
    "bearer in lower case": (asking(authorization="bearer {token}"), DENIED),
    "BEARER in upper case": (asking(authorization="BEARER {token}"), DENIED),
    "two spaces": (asking(authorization="Bearer  {token}"), DENIED),
    "a tab": (asking(authorization="Bearer\t{token}"), DENIED),
    "Basic with the token": (asking(authorization="Basic {basic}"), DENIED),
    "Basic with the token as it is": (asking(authorization="Basic {token}"), DENIED),
    "the token in the query": (
        asking(authorization=None, _path=f"{CREATE}?authorization=Bearer%20{{token}}"),
        DENIED,
    ),
    "the token as access_token": (
        asking(authorization=None, _path=f"{CREATE}?access_token={{token}}"),
        DENIED,
    ),
    "the token in x-authorization": (
        asking(authorization=None, x_authorization="Bearer {token}"),
        DENIED,
    ),
    "the token in proxy-authorization": (
        asking(authorization=None, proxy_authorization="Bearer {token}"),
        DENIED,
    ),
    "the token in metadata of another name": (asking(authorization=None, token="{token}"), DENIED),
    "the token in binary metadata": (
        asking(authorization=None, authorization_bin="{basic}"),
        DENIED,
    ),
    "the token in a cookie": (asking(authorization=None, cookie="token={token}"), DENIED),
    "the token in the path": (asking(authorization=None, _path="/{token}" + CREATE), DENIED),
    "Authorization spelt in capitals": (
        asking(authorization=None, Authorization="Bearer {token}"),
        "closed",
    ),
    "an Origin": (asking(origin="https://evil.example"), DENIED),
    "the Origin of a file": (asking(origin="null"), DENIED),
    "an Origin that is ours": (asking(origin=f"https://{SERVER_NAME}"), DENIED),
    "an empty Origin": (asking(origin=""), DENIED),
    "a Referer": (asking(referer="https://evil.example/"), DENIED),
    "Sec-Fetch-Mode": (asking(sec_fetch_mode="no-cors"), DENIED),
    "a Cookie": (asking(cookie="a=b"), DENIED),
    "a preflight": (
        asking(
            _method="OPTIONS",
            authorization=None,
            content_type=None,
            te=None,
            origin="https://evil.example",
            access_control_request_method="POST",
            access_control_request_headers="authorization,content-type",
        ),
        "403",
    ),
    "a preflight with the token": (
        asking(
            _method="OPTIONS",
            origin="https://evil.example",
            access_control_request_method="POST",
        ),
        DENIED,
    ),
    "JSON": (asking(content_type="application/json"), "403"),
    "gRPC-Web": (asking(content_type="application/grpc-web"), "403"),
    "gRPC-Web in text": (asking(content_type="application/grpc-web-text"), "403"),
    "text": (asking(content_type="text/plain"), "403"),
    "a form": (asking(content_type="application/x-www-form-urlencoded"), "403"),
    "no content type": (asking(content_type=None), "403"),
    "GET": (asking(_method="GET"), DENIED),
    "PUT": (asking(_method="PUT"), DENIED),
    "GET that calls itself POST": (asking(_method="GET", x_http_method_override="POST"), DENIED),
    "a foreign Host": (asking(_authority="evil.example"), UNKNOWN),
    "localhost as Host": (asking(_authority="localhost"), UNKNOWN),
    "the address as Host": (asking(_authority="127.0.0.1"), UNKNOWN),
    "a Host that begins like ours": (asking(_authority=f"{SERVER_NAME}.evil.example"), UNKNOWN),
    "a Host that ends like ours": (asking(_authority=f"evil.{SERVER_NAME}"), UNKNOWN),
    "a path outside": (asking(_path="/grpc.health.v1.Health/Check"), UNKNOWN),
    "a path with a detour": (asking(_path=f"/x/..{CREATE}"), UNKNOWN),
    "a path with two slashes": (asking(_path=f"/{CREATE}"), UNKNOWN),
    "a path in capitals": (asking(_path=CREATE.replace("/c", "/C", 1)), UNKNOWN),
    "HTTP/1.1 over TLS": (_old_over_tls("http/1.1"), "closed"),
    "HTTP/1.1 over TLS, unannounced": (_old_over_tls(), "closed"),
    "HTTP/1.1 announced as HTTP/2": (_old_over_tls("h2"), "closed"),
    "an older TLS": (_old_tls, "closed"),
    "HTTP/1.1 in plain text": (_plain_old, "closed"),
    "HTTP/1.1 in plain text, asking for HTTP/2": (_plain_upgrade, "closed"),
    "HTTP/2 in plain text": (_plain_new, "closed"),
}


class Owner(OurDaemon):
    """One who has a containerd behind Envoy, and the command line."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "serpentine.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.environ},
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def must(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def folder_of_door(self) -> Path:
        return self.folder / "data" / "envoy"

    @property
    def door(self) -> Door:
        door = Door.load(self.folder_of_door)
        assert door
        return door

    @property
    def port(self) -> int:
        return json.loads((self.folder / "data" / "daemon.json").read_text())["port"]

    @property
    def endpoint(self) -> Endpoint:
        return self.door.endpoint(self.port)

    @property
    def socket(self) -> Endpoint:
        """Containerd's own socket, where nobody but root comes."""
        volume = self.engine.run(
            "volume", "inspect", "--format", "{{.Mountpoint}}", self.names.run_volume
        )
        return Endpoint.parse(f"{volume.strip()}/containerd.sock")

    def leases(self) -> list[str]:
        """Return the leases that containerd says it has."""

        async def look() -> list[str]:
            async with Containerd(self.socket, namespace=NAMESPACE) as client:
                return sorted(lease.id for lease in await client.leases.all())

        return asyncio.run(look())

    def bring_up(self) -> Settings:
        settings = self.settings()
        assert asyncio.run(find(settings, on_event=ignore))
        return settings


@pytest.fixture(scope="module")
def owner(docker, mirror):
    folder = Path(tempfile.mkdtemp(prefix="spt-"))
    found = Owner(docker, mirror, folder, SERPENTINE_TRANSPORT="envoy")
    found.bring_up()
    yield found
    found.must("daemon", "remove", "--volumes")
    shutil.rmtree(folder)


class LoneEnvoy(Server):
    """Envoy as it is configured in its container, before a socket of the tests."""

    name = "envoy"

    def __init__(self) -> None:
        super().__init__()
        self.door = Door.make()
        self.port = free_port()
        self.socket = self.folder / "behind.sock"

    def command(self) -> list[str]:
        text = json.dumps(envoy_config(self.door.token))
        for there, here in {
            "/etc/serpentine/": f"{self.folder}/",
            "/run/serpentine/containerd.sock": str(self.socket),
            '"0.0.0.0"': '"127.0.0.1"',
            f'"port_value": {PORT}': f'"port_value": {self.port}',
        }.items():
            assert there in text
            text = text.replace(there, here)
        (self.folder / "envoy.json").write_text(text)
        (self.folder / "cert.pem").write_bytes(self.door.certificate)
        (self.folder / "key.pem").write_bytes(self.door.key)
        config = str(self.folder / "envoy.json")
        options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        return [str(envoy_binary()), "--config-path", config, *options]

    def answers(self) -> bool:
        try:
            with self.target.connected():
                return True
        except OSError:
            return False

    @property
    def target(self) -> Target:
        return Target(self.port, self.door)


@pytest.fixture(scope="module")
def recorded():
    """An Envoy before a recorder, and the recorder."""
    envoy = LoneEnvoy()
    with Recorder(envoy.socket) as recorder, envoy:
        yield envoy.target, recorder


@pytest.fixture(scope="module", autouse=True)
def silence():
    """A call that is silent from the first test of this file on, and what it ends with.

    Started here, so that it can grow old while the others run.
    """
    envoy = LoneEnvoy()
    ended: list[Answer] = []
    with Recorder(envoy.socket) as recorder, envoy:

        def call() -> None:
            with envoy.target.connected() as secure:
                secure.settimeout(None)
                ended.append(ask(secure, envoy.target.headers(_path=SILENT), frame(b"")))

        thread = threading.Thread(target=call)
        thread.start()
        assert recorder.held.wait(TIMEOUT)
        yield time.monotonic(), thread, recorder, ended
        recorder.release()
        thread.join(TIMEOUT)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ATTEMPTS)
def test_nothing_reaches_containerd(owner, name):
    """Done when 3."""
    attempt, outcome = ATTEMPTS[name]
    assert attempt(Target(owner.port, owner.door), create(name.replace(" ", "-"))) == outcome
    assert owner.leases() == []


def test_not_one_byte_passes_whatever_a_stranger_tries(recorded):
    target, recorder = recorded
    # Side by side: some connections are closed only after a second.
    with ThreadPoolExecutor(8) as pool:
        tried = {name: pool.submit(a, target, create("x")) for name, (a, _) in ATTEMPTS.items()}
    assert {name: future.result() for name, future in tried.items()} == {
        name: outcome for name, (_, outcome) in ATTEMPTS.items()
    }
    assert (recorder.connections, recorder.raw, recorder.requests) == (0, b"", [])

    # And it would have been noted; without the token, under whatever name.
    assert str(target.ask(create("x"))) == "200 grpc 0"
    (headers,) = recorder.requests
    assert (":path", CREATE) in headers
    assert ("containerd-namespace", NAMESPACE) in headers
    assert create("x") in recorder.raw
    assert "authorization" not in dict(headers)
    assert target.door.token[:8] not in str(headers)


@pytest.mark.timeout(120)
def test_the_owner_is_let_in(owner):
    """The same call, with nothing wrong about it: what the others would have done, is done."""
    target = Target(owner.port, owner.door)
    assert str(target.ask(create("owner"))) == "200 grpc 0"
    assert owner.leases() == ["owner"]

    async def tidy() -> None:
        async with Containerd(owner.endpoint, namespace=NAMESPACE) as client:
            await client.leases.delete("owner")

    asyncio.run(tidy())
    assert owner.leases() == []


def _addresses() -> list[tuple[int, tuple]]:
    """Return every address of this machine, to connect to."""
    out = subprocess.run(["ip", "-json", "addr"], capture_output=True, check=True).stdout
    found = []
    for interface in json.loads(out):
        for entry in interface.get("addr_info", ()):
            address = entry["local"]
            if entry["family"] == "inet":
                found.append((socket.AF_INET, (address,)))
            else:
                scope = interface["ifindex"] if address.startswith("fe80") else 0
                found.append((socket.AF_INET6, (address, scope)))
    return found


def _opens(family: int, address: tuple, port: int) -> bool:
    place = (address[0], port) if family == socket.AF_INET else (address[0], port, 0, address[1])
    with socket.socket(family) as probe:
        probe.settimeout(TIMEOUT)
        try:
            probe.connect(place)
        except ConnectionRefusedError:
            return False
        return True


@pytest.mark.timeout(120)
def test_the_port_answers_on_loopback_only(owner):
    """Done when 3."""
    addresses = _addresses()
    assert (socket.AF_INET, ("127.0.0.1",)) in addresses
    # Docker's bridge, at least.
    assert len([a for a in addresses if a[0] == socket.AF_INET]) > 1
    addresses += [(socket.AF_INET, ("127.0.0.2",)), (socket.AF_INET6, ("::1", 0))]
    port = owner.port
    answering = {address[0] for family, address in addresses if _opens(family, address, port)}
    assert answering == {"127.0.0.1"}
    listening = [
        line.split()[3]
        for line in subprocess.run(
            ["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    assert listening == [f"127.0.0.1:{port}"]


@pytest.mark.timeout(120)
def test_from_another_container(owner):
    """On Docker's own network Envoy can be seen: its door is as closed there."""
    inspected = owner.engine.inspect(owner.names.envoy)
    address = inspected["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
    assert address
    body = base64.b64encode(create("neighbour")).decode()
    call = (
        "curl -sk --http2 --max-time 10 -D - -o /dev/null -H content-type:application/grpc"
        f" -H te:trailers -H containerd-namespace:{NAMESPACE} --connect-to ::{address}:{PORT}"
        f" https://{SERVER_NAME}{CREATE}"
    )
    making = f"echo {body} | base64 -d | {call} --data-binary @-"
    wrong = "-H 'authorization: Bearer wrong'"
    script = "\n".join(
        [
            # Envoy answers before it has all of the body; this curl then shows no answer.
            f"{making} >/dev/null; {making} {wrong} >/dev/null",
            f"{call} -d '' | grep grpc-status; {call} -d '' {wrong} | grep grpc-status",
            f"curl -sk --max-time 10 http://{address}:{PORT}/ || echo plain refused",
            f"curl -sk --http1.1 --max-time 10 https://{address}:{PORT}/ || echo HTTP/1.1 refused",
            # Neither a file nor an abstract socket nor a mount.
            "find / -xdev -name 'containerd.sock*'",
            "grep -c serpentine /proc/net/unix /proc/mounts",
        ]
    )
    out = owner.engine.run("run", "--rm", BASE_IMAGE, "sh", "-c", script, check=False)
    assert out.replace("\r", "").splitlines() == [
        "grpc-status: 7",
        "grpc-status: 7",
        "plain refused",
        "HTTP/1.1 refused",
        "/proc/net/unix:0",
        "/proc/mounts:0",
    ]
    assert owner.leases() == []
    # It was the door, and not the network: with the token the same call goes through.
    script = f"{making} -H 'authorization: Bearer {owner.door.token}' | grep ^HTTP"
    out = owner.engine.run("run", "--rm", BASE_IMAGE, "sh", "-c", script)
    assert out.split()[1] == "200"
    assert owner.leases() == ["neighbour"]

    async def tidy() -> None:
        async with Containerd(owner.endpoint, namespace=NAMESPACE) as client:
            await client.leases.delete("neighbour")

    asyncio.run(tidy())


@pytest.mark.timeout(120)
def test_from_a_step_on_this_containerd(owner, registry):
    """A process that runs on this containerd sees no socket, even with containerd's network."""
    reference = push(registry, "door/step", "1", image([busybox_layer()]))
    owner.must("pull", reference)
    script = (
        "busybox find / -xdev -name '*.sock*'; busybox grep -c serpentine /proc/mounts;"
        " busybox grep -c containerd.sock /proc/net/unix"
    )
    out = owner.engine.run(
        *("exec", owner.names.containerd, "ctr", "-a", "/run/serpentine/containerd.sock"),
        *("-n", "serpentine", "run", "--rm", "--net-host", reference, "step"),
        *("/bin/busybox", "sh", "-c", script),
        check=False,
    )
    # With its network the name of the socket can be read, but there is no way to it.
    assert out.splitlines()[0] == "0", out


def _their_certificate(*names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    trustme.CA().issue_cert(*names).configure_cert(context)
    return context


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["plain", "tls", "tls in our name"])
def test_who_takes_the_port_gets_no_token(owner, kind):
    token, port = owner.door.token, owner.port
    owner.engine.run("kill", owner.names.envoy)
    tls = {
        "plain": None,
        "tls": _their_certificate("127.0.0.1"),
        "tls in our name": _their_certificate(SERVER_NAME, "127.0.0.1"),
    }
    with Squatter(port, tls[kind]) as squatter:
        owner.must("images")
        assert owner.port != port
        assert owner.door.token == token
        with pytest.raises(DaemonUnreachable):
            asyncio.run(_check(owner.door.endpoint(port)))
    assert len(squatter.raw) >= 2
    for raw in squatter.raw:
        # The first words of TLS (22), and not of HTTP/2, which packs a token so that a search
        # does not find it.
        assert raw[:1] == b"\x16"
        for secret in (token, token[:8], "authorization", "Bearer"):
            assert secret.encode() not in raw
    assert squatter.plain == b""


async def _check(endpoint: Endpoint) -> str:
    async with Containerd(endpoint) as client:
        return (await client.check()).version


@pytest.mark.timeout(120)
def test_envoy_without_containerd(owner):
    """One error that says which of the two is down; the next command mends it."""
    owner.must("images")
    before = owner.engine.inspect(owner.names.envoy)["Id"]

    async def in_the_middle() -> str:
        async with serpentine.connect(settings=owner.settings()) as engine:
            await engine.images()
            owner.engine.run("kill", owner.names.containerd)
            with pytest.raises(ContainerdError) as caught:
                await engine.images()
            return str(caught.value)

    told = asyncio.run(in_the_middle())
    assert told == f"containerd: {PROXY_ALONE}"
    with pytest.raises(DaemonUnreachable) as caught:
        asyncio.run(_check(owner.endpoint))
    assert str(caught.value) == f"cannot reach containerd at {owner.endpoint}: {PROXY_ALONE}"

    owner.must("images")
    assert asyncio.run(_check(owner.endpoint))
    assert owner.engine.inspect(owner.names.envoy)["Id"] == before


@pytest.mark.timeout(120)
def test_rotate_token(owner, registry):
    reference = push(registry, "door/rotate", "1", image([busybox_layer()]))
    owner.must("pull", reference)
    before = owner.engine.inspect(owner.names.containerd)
    images = owner.must("images", "--json")
    assert reference in images
    old = owner.endpoint

    owner.must("daemon", "rotate-token")
    new = owner.endpoint
    assert old.metadata != new.metadata
    assert old.root_certificates != new.root_certificates
    # The old token is refused by who shows the new certificate, and the old certificate is gone.
    with pytest.raises(DaemonPermission):
        asyncio.run(_check(replace(new, metadata=old.metadata)))
    for address in {old.address, new.address}:
        with pytest.raises(DaemonUnreachable):
            asyncio.run(_check(replace(old, address=address)))
    assert asyncio.run(_check(new))

    after = owner.engine.inspect(owner.names.containerd)
    assert after["Id"] == before["Id"]
    assert after["State"]["Pid"] == before["State"]["Pid"]
    assert after["State"]["StartedAt"] == before["State"]["StartedAt"]
    assert owner.must("images", "--json") == images


@pytest.mark.timeout(120)
def test_rotate_token_when_envoy_was_removed(owner):
    """There is a token to renew, whether or not its Envoy is there at the moment."""
    old = owner.door.token
    owner.engine.run("rm", "-f", owner.names.envoy)
    owner.must("daemon", "rotate-token")
    assert owner.door.token != old
    assert asyncio.run(_check(owner.endpoint))


def _open_token(folder: Path) -> None:
    (folder / "token").chmod(0o644)


def _open_key(folder: Path) -> None:
    (folder / "key.pem").chmod(0o640)


def _foreign_token(folder: Path) -> None:
    os.chown(folder / "token", 54002, 54002)


def _writable_authority(folder: Path) -> None:
    (folder / "ca.pem").chmod(0o666)


def _open_folder(folder: Path) -> None:
    folder.chmod(0o777)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_open_token, "token"),
        (_open_key, "key.pem"),
        (_foreign_token, "token"),
        # Who can put their own authority there is shown the token.
        (_writable_authority, "ca.pem"),
        (_open_folder, ""),
    ],
    ids=["token", "key", "owner", "authority", "folder"],
)
def test_what_others_may_read_or_write_is_refused(owner, spoil, name):
    old = owner.door.token
    spoil(owner.folder_of_door)
    for arguments in (["images"], ["daemon", "status"]):
        told = owner.run(*arguments)
        assert told.returncode == 1
        (line,) = told.stderr.splitlines()
        path = str(owner.folder_of_door / name).rstrip("/")
        assert f"{path} may be read or changed by others" in line
        assert "'serpentine daemon rotate-token'" in line
        assert old not in told.stdout + told.stderr
    owner.must("daemon", "rotate-token")
    owner.must("images")
    assert owner.door.token != old
    folder = owner.folder_of_door
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == dict.fromkeys(
        ("token", "key.pem", "cert.pem", "ca.pem"), 0o600
    )


@pytest.mark.timeout(120)
def test_envoys_container_can_do_nothing_else(owner):
    """It reads a socket's directory, and serves one port."""
    found = owner.engine.inspect(owner.names.envoy)
    assert found["Config"]["User"] == f"{UID}:{UID}"
    assert [(m["Destination"], m["RW"]) for m in found["Mounts"]] == [("/run/serpentine", False)]
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert not found["HostConfig"]["CapAdd"]
    assert not found["HostConfig"]["Privileged"]
    bindings = found["NetworkSettings"]["Ports"]
    assert [b["HostIp"] for b in bindings[f"{PORT}/tcp"]] == ["127.0.0.1"]
    assert len(bindings) == 1
    # Within it, Envoy listens there and nowhere else: there is no admin interface.
    pid = str(found["State"]["Pid"])
    listed = subprocess.run(
        ["nsenter", "-t", pid, "-n", "ss", "-ltnH"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[3] for line in listed.splitlines()} == {f"0.0.0.0:{PORT}"}


def test_no_limit_cuts_a_long_call():
    config = envoy_config("token")
    (listener,) = config["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    assert manager["stream_idle_timeout"] == "0s"
    assert manager["request_timeout"] == "0s"
    (host,) = manager["route_config"]["virtual_hosts"]
    assert [route["route"]["timeout"] for route in host["routes"]] == ["0s"]
    assert "max_stream_duration" not in json.dumps(config)
    assert "admin" not in config


@pytest.mark.timeout(60)
def test_a_silent_call_is_not_cut(silence):
    """Longer than Envoy's own limit; most of it passed while the other tests ran."""
    began, thread, recorder, ended = silence
    thread.join(max(ENVOYS_DEFAULT + 1.5 - (time.monotonic() - began), 0))
    assert ended == []
    recorder.release()
    thread.join(TIMEOUT)
    assert [str(answer) for answer in ended] == ["200 grpc 0"]
