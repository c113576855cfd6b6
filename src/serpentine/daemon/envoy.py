"""The door of a containerd whose socket cannot be shared: Envoy, with TLS and a token.

Localhost is no boundary: every web page that a user opens, and every other user of the machine,
can talk to a port there.  So the port speaks TLS with a certificate that was made for this daemon
and that the client pins (a stranger who takes the port gets no token), and every call must carry
a token of 256 bits (a stranger who finds the port gets nowhere).
"""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import secrets
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from serpentine.containerd import Endpoint
from serpentine.containerd.client import PROXY_ALONE
from serpentine.daemon.state import write_private
from serpentine.errors import DaemonPermission

__all__ = ["PORT", "SERVER_NAME", "UID", "Door", "envoy_config", "envoy_files"]

# Inside the container; outside it is a free port that the engine chooses.
PORT = 7443
# What the certificate is for and what ``:authority`` must say.  No DNS knows it, so no web page
# can have it as its origin (DNS rebinding).
SERVER_NAME = "containerd.serpentine.internal"
# Envoy's user in its container, who may open containerd's socket there.
UID = 65532

_FOLDER = "/etc/serpentine"
_LIFETIME = dt.timedelta(days=3650)
_FILES = ("token", "ca.pem", "cert.pem", "key.pem")


@dataclass(frozen=True, slots=True)
class Door:
    """The token and the certificate of one daemon."""

    token: str = field(repr=False)
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def make(cls) -> Self:
        """Make a new token, and a certificate by an authority whose key is thrown away."""
        ca, certificate, key = _make_certificate()
        return cls(secrets.token_urlsafe(32), ca, certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read it; None if it is not there.

        Raises DaemonPermission if others may read what must be secret, or change what is
        trusted: who can put an authority of their own there is shown the token.
        """
        try:
            for path in (folder, *(folder / name for name in _FILES)):
                _refuse_loose(path)
            read = {name: (folder / name).read_bytes() for name in _FILES}
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise DaemonPermission(
                f"cannot read {error.filename}: permission denied",
                hint="run as the user who started the daemon",
            ) from None
        token = read["token"].decode("ascii", errors="replace").strip()
        return cls(token, read["ca.pem"], read["cert.pem"], read["key.pem"]) if token else None

    def save(self, folder: Path) -> None:
        """Write it where only its owner may read."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The key first and the token last: whoever finds a token finds all of it.
        write_private(folder / "key.pem", self.key)
        write_private(folder / "cert.pem", self.certificate)
        write_private(folder / "ca.pem", self.ca)
        write_private(folder / "token", self.token.encode())

    def endpoint(self, port: int) -> Endpoint:
        """Return how to get in at a port of this machine."""
        return Endpoint(
            f"127.0.0.1:{port}",
            metadata=(("authorization", f"Bearer {self.token}"),),
            root_certificates=self.ca,
            server_name=SERVER_NAME,
        )


def _refuse_loose(path: Path) -> None:
    status = path.stat()
    # On Windows the access list of the profile directory protects what is in it.
    if sys.platform != "win32" and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
        raise DaemonPermission(
            f"{path} may be read or changed by others (mode {status.st_mode & 0o777:03o},"
            f" owner {status.st_uid})",
            hint="run 'serpentine daemon rotate-token', which makes a new one",
        )


def envoy_config(token: str) -> dict[str, Any]:
    """Return Envoy's configuration.

    No ``admin``: there is no interface to protect.  All time limits that count from the start of
    a call, or while it is silent, are off: an Apply says nothing for minutes (trap 18).
    """
    http2 = {"connection_keepalive": {"interval": "30s", "timeout": "20s"}}
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "door",
                    "address": {"socket_address": {"address": "0.0.0.0", "port_value": PORT}},  # noqa: S104 - published on loopback only
                    "filter_chains": [
                        {
                            "transport_socket": _tls(),
                            "filters": [
                                _typed(
                                    "envoy.filters.network.http_connection_manager",
                                    "extensions.filters.network.http_connection_manager"
                                    ".v3.HttpConnectionManager",
                                    _connection_manager(token, http2),
                                )
                            ],
                        }
                    ],
                }
            ],
            "clusters": [_cluster()],
        }
    }


def _typed(name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    at = {"@type": f"type.googleapis.com/envoy.{kind}"}
    return {"name": name, "typed_config": {**at, **value}}


def _tls() -> dict[str, Any]:
    return _typed(
        "envoy.transport_sockets.tls",
        "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        {
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": f"{_FOLDER}/cert.pem"},
                        "private_key": {"filename": f"{_FOLDER}/key.pem"},
                    }
                ],
            }
        },
    )


def _connection_manager(token: str, http2: dict[str, Any]) -> dict[str, Any]:
    return {
        "stat_prefix": "door",
        # Not AUTO: HTTP/1.1 is what a browser's form and a confused proxy speak.
        "codec_type": "HTTP2",
        "http2_protocol_options": http2,
        "stream_idle_timeout": "0s",
        "request_timeout": "0s",
        # This one limits a client that opens a stream and never ends its headers.
        "request_headers_timeout": "10s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "containerd",
                    "domains": [SERVER_NAME],
                    "routes": [
                        {
                            "match": {"prefix": "/containerd."},
                            "route": {"cluster": "containerd", "timeout": "0s"},
                        },
                    ],
                }
            ],
            "request_headers_to_remove": ["authorization"],
        },
        "http_filters": [
            _typed(
                "envoy.filters.http.rbac",
                "extensions.filters.http.rbac.v3.RBAC",
                {"rules": _rules(token)},
            ),
            _typed("envoy.filters.http.router", "extensions.filters.http.router.v3.Router", {}),
        ],
        "local_reply_config": {
            "mappers": [
                {
                    "filter": {
                        "status_code_filter": {
                            "comparison": {
                                "op": "EQ",
                                "value": {"default_value": 503, "runtime_key": "unused"},
                            }
                        }
                    },
                    "body": {"inline_string": PROXY_ALONE},
                }
            ]
        },
    }


def _rules(token: str) -> dict[str, Any]:
    def header(name: str, value: str) -> dict[str, Any]:
        return {"header": {"name": name, "string_match": {"exact": value}}}

    def absent(name: str) -> dict[str, Any]:
        return {"not_rule": {"header": {"name": name, "present_match": True}}}

    return {
        "action": "ALLOW",
        "policies": {
            "owner": {
                "permissions": [
                    {
                        "and_rules": {
                            "rules": [
                                header(":method", "POST"),
                                header("content-type", "application/grpc"),
                                absent("origin"),
                                absent("referer"),
                                absent("cookie"),
                                absent("sec-fetch-mode"),
                            ]
                        }
                    }
                ],
                "principals": [header("authorization", f"Bearer {token}")],
            }
        },
    }


def _cluster() -> dict[str, Any]:
    return {
        "name": "containerd",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "containerd",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {"pipe": {"path": "/run/serpentine/containerd.sock"}}
                            }
                        }
                    ]
                }
            ],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        # Every write of every pull is a request that lasts; the default allows 1024.
        "circuit_breakers": {
            "thresholds": [{"max_connections": 65536, "max_requests": 65536}],
        },
    }


def envoy_files(door: Door) -> bytes:
    """Return what goes into Envoy's container, as a tar archive for its root directory.

    This way and not as environment, arguments or a mount: there, ``docker inspect`` and ``ps``
    would show the token, or a file on a shared disk would hold it.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo(_FOLDER.lstrip("/"))
        folder.type, folder.mode, folder.uid, folder.gid = tarfile.DIRTYPE, 0o700, UID, UID
        tar.addfile(folder)
        for name, data in (
            ("envoy.json", json.dumps(envoy_config(door.token)).encode()),
            ("cert.pem", door.certificate),
            ("key.pem", door.key),
        ):
            info = tarfile.TarInfo(f"{folder.name}/{name}")
            info.size, info.mode, info.uid, info.gid = len(data), 0o600, UID, UID
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _make_certificate() -> tuple[bytes, bytes, bytes]:
    """Return an authority's certificate, a server's, and the server's key, as PEM."""
    # Here and not above: only who makes a daemon pays for the import.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = dt.datetime.now(dt.UTC)

    def certificate(
        subject: str, issuer: str, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # A virtual machine's clock may lag behind, after a sleep for instance.
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + _LIFETIME)
        )

    authority = "serpentine, this daemon only"
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = (
        certificate(authority, authority, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    server = (
        certificate(SERVER_NAME, authority, key)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        ca.public_bytes(pem),
        server.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
