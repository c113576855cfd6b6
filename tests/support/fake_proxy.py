"""A proxy that opens tunnels, all of them to one place."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.fake_registry import Seen


class TunnelProxy:
    """Answers CONNECT with ``status``, and for 200 with a tunnel to ``target``."""

    def __init__(self, target: str) -> None:
        self.seen: list[Seen] = []
        self.status = 200
        name, _, port = target.rpartition(":")
        self.target = (name, int(port))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_CONNECT(self) -> None:
                headers = {k.lower(): v for k, v in self.headers.items()}
                outer.seen.append(Seen(self.command, self.path, headers))
                self.close_connection = True
                self.send_response(outer.status)
                self.end_headers()
                if outer.status == 200:
                    with socket.create_connection(outer.target) as far:
                        outer._join(self.connection, far)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @staticmethod
    def _join(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                for ready in select.select([one, other], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    (other if ready is one else one).sendall(data)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
