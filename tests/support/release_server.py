"""A server of releases on loopback, and the archives that it serves."""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serpentine.daemon.releases import ARCHITECTURES

ARCH = ARCHITECTURES[platform.machine().lower()]
CONTAINERD = f"containerd/v1.0.0/containerd-static-1.0.0-linux-{ARCH}.tar.gz"
RUNC = f"runc/v1.0.1/runc.{ARCH}"
CNI = f"plugins/v1.0.2/cni-plugins-linux-{ARCH}-v1.0.2.tgz"

Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


def archive(programs: Mapping[str, bytes], *more: tarfile.TarInfo) -> bytes:
    """Return a compressed archive of programs, and of members without content."""
    out = io.BytesIO()
    # Without a time: the same programs make the same archive, so the same sum.
    zipped = gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0)
    with zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, content in programs.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return out.getvalue()


def script(text: str) -> bytes:
    """Return a program that is quickly made."""
    return f"#!/bin/sh\necho {text}\n".encode()


def small_releases(mark: str = "one") -> dict[str, bytes]:
    """Return releases of the right form, with programs that only say ``mark``."""
    programs = {
        f"bin/{name}": script(mark) for name in ("containerd", "ctr", "containerd-shim-runc-v2")
    }
    return {
        CONTAINERD: archive(programs),
        RUNC: script(mark),
        CNI: archive({"./bridge": script(mark), "./host-local": script(mark)}),
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        # A client that is killed breaks its connection, at any place.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*arguments)


class ReleaseServer:
    """Serves files by their path; ``faults`` answers for a path in its own way."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.faults: dict[str, Fault] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                outer.requests.append(path)
                body = outer.files.get(path)
                fault = outer.faults.get(path)
                if fault:
                    # A client that goes away in the middle is a part of the test.
                    self.close_connection = True
                    try:
                        fault(self, body or b"")
                    except OSError:
                        return
                elif body is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def sums(self, path: Path) -> Path:
        """Write the file of sums for what is served."""
        lines = [f"{hashlib.sha256(body).hexdigest()}  {p}\n" for p, body in self.files.items()]
        path.write_text("# ours\n" + "".join(lines))
        return path

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        # Not waiting for threads: one may hold a connection that its client keeps open.
        self._server.block_on_close = False
        self._server.server_close()
