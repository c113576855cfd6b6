"""A token server whose signed tokens a real docker-registry checks."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from tests.support.servers import RegistryServer

SERVICE = "test-registry"
ISSUER = "test-issuer"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True)
class TokenRequest:
    """How a token was asked for."""

    method: str
    user: str | None
    grant: str
    scopes: tuple[str, ...]
    status: int


class TokenServer:
    """Issues tokens over HTTP on loopback, by GET and by OAuth2 POST."""

    def __init__(self) -> None:
        self.users = {"alice": "wonder land"}
        self.refresh_tokens = {"refresh-secret": "alice"}
        self.lifetime = 300
        self.get_allowed = True
        self.anonymous = False
        self.requests: list[TokenRequest] = []
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._certificate = self._make_certificate()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                user, password = self._basic()
                outer._serve(self, "GET", query, user, password)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer._serve(self, "POST", parse_qs(body), None, "")

            def _basic(self) -> tuple[str | None, str]:
                header = self.headers.get("Authorization", "")
                if not header.startswith("Basic "):
                    return None, ""
                user, _, password = base64.b64decode(header[6:]).decode().partition(":")
                return user, password

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def settings(self, folder: Path) -> dict[str, str]:
        """Return the registry's settings that make it believe this server."""
        bundle = folder / "bundle.pem"
        bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        return {
            "realm": self.realm,
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(bundle),
        }

    def _make_certificate(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
        return builder.sign(self._key, hashes.SHA256())

    def token(self, scopes: list[str], user: str) -> str:
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": now + self.lifetime,
            "nbf": now - 10,
            "iat": now,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        text = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(claims).encode())}"
        signature = self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{_b64(signature)}"

    def _serve(self, handler, method: str, query: dict[str, list[str]], user, password) -> None:
        grant = query.get("grant_type", [""])[0]
        if grant == "password":
            user, password = query["username"][0], query["password"][0]
        if grant == "refresh_token":
            user = self.refresh_tokens.get(query["refresh_token"][0], "nobody")
            password = self.users.get(user, "")
        status, answer = 200, {}
        if method == "GET" and not self.get_allowed:
            status = 405
        elif (user is None and not self.anonymous) or (
            user is not None and self.users.get(user, None) != password
        ):
            status = 401
        scopes = [one for scope in query.get("scope", []) for one in scope.split()]
        if status == 200:
            name = "access_token" if method == "POST" else "token"
            answer = {name: self.token(scopes, user or ""), "expires_in": self.lifetime}
        self.requests.append(TokenRequest(method, user, grant, tuple(scopes), status))
        body = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


class TokenRegistry(RegistryServer):
    """A real registry behind a token server; what is pushed goes straight to its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenServer()
        self.open = RegistryServer()

    def start(self):
        self.tokens.__enter__()
        # The same storage, without authentication: for pushing.
        self.open.start()
        self.storage = self.open.storage
        self.token = self.tokens.settings(self.folder)
        return super().start()

    def close(self) -> None:
        super().close()
        self.open.close()
        self.tokens.__exit__()
