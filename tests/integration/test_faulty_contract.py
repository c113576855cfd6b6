"""Without faults, the registry that misbehaves on purpose behaves as the real one does."""

from __future__ import annotations

import http.client
import json
import uuid

import pytest

from tests.support.faulty import FaultyRegistry
from tests.support.images import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    file,
    image,
    index,
    layer,
    noise,
    push,
    sha256,
)

LAYER = layer([file("a", noise("contract", 200_000))])
OCI = image([LAYER])
DOCKER = image([layer([file("a", b"x")], docker=True)], docker=True)
OCI_BOTH = index([(OCI, OCI.descriptor("linux/amd64"))])
DOCKER_BOTH = index([(DOCKER, DOCKER.descriptor("linux/amd64"))], docker=True)
IMAGES = {"oci": OCI, "docker": DOCKER, "both": OCI_BOTH, "list": DOCKER_BOTH}

SIZE = len(LAYER.blob)
NONE = sha256(b"there is no such thing")
ALL = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}, {DOCKER_LIST}"
# What a client may go by.
HEADERS = (
    "Accept-Ranges",
    "Content-Encoding",
    "Content-Length",
    "Content-Range",
    "Content-Type",
    "Docker-Content-Digest",
    "Docker-Distribution-Api-Version",
    "Etag",
    "Location",
    "Transfer-Encoding",
    "WWW-Authenticate",
)


@pytest.fixture(scope="module")
def both(registry):
    """The two, with the same images under the same name."""
    repository = f"contract/{uuid.uuid4().hex[:8]}"
    with FaultyRegistry() as faulty:
        for tag, made in IMAGES.items():
            push(registry, repository, tag, made)
            faulty.add(made, repository, tag)
        push(registry, f"{repository}/other", "1", DOCKER)
        faulty.add(DOCKER, f"{repository}/other", "1")
        yield registry, faulty, repository


def answers(both, target: str, method: str = "GET", **headers: str):
    """Return what each says, in the same words."""
    real, faulty, repository = both
    path = target.format(name=f"/v2/{repository}")
    found = []
    for address in (real.address, faulty.address):
        connection = http.client.HTTPConnection(address, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            try:
                body = response.read()
            except http.client.IncompleteRead as error:
                # The real one announces more than it sends with 416, and closes.
                assert response.status == 416
                body = error.partial
        finally:
            connection.close()
        named = {name: response.headers[name] for name in HEADERS if name in response.headers}
        content: object = body
        if named.get("Content-Type", "").startswith("application/json") and body:
            content = json.loads(body)
        found.append((response.status, named, content))
    return found


def same(both, target: str, method: str = "GET", **headers: str):
    """Ask both, and return what both said."""
    real, ours = answers(both, target, method, **headers)
    assert ours == real
    return ours


@pytest.mark.parametrize("method", ["GET", "HEAD"])
class TestManifests:
    @pytest.mark.parametrize("tag", IMAGES)
    def test_by_tag_and_by_digest(self, both, method, tag):
        made = IMAGES[tag]
        for name in (tag, made.digest):
            status, headers, body = same(both, f"{{name}}/manifests/{name}", method, Accept=ALL)
            assert status == 200
            assert headers["Docker-Content-Digest"] == made.digest
            assert headers["Content-Type"] == made.media_type
            assert headers["Content-Length"] == str(len(made.data))
            assert body == (made.data if method == "GET" else b"")

    @pytest.mark.parametrize("name", ["none", NONE])
    def test_unknown(self, both, method, name):
        assert same(both, f"{{name}}/manifests/{name}", method, Accept=ALL)[0] == 404

    @pytest.mark.parametrize("name", ["1", NONE])
    def test_unknown_repository(self, both, method, name):
        assert same(both, f"/v2/no/such/manifests/{name}", method, Accept=ALL)[0] == 404

    @pytest.mark.parametrize(
        ("tag", "accept"),
        [
            ("oci", OCI_MANIFEST),
            ("oci", f"{DOCKER_MANIFEST}, {OCI_MANIFEST};q=0.5"),
            ("oci", DOCKER_MANIFEST),
            ("oci", "*/*"),
            ("both", OCI_INDEX),
            ("both", f"{OCI_MANIFEST},{DOCKER_LIST}"),
            ("docker", DOCKER_MANIFEST),
            ("list", DOCKER_LIST),
            ("list", DOCKER_MANIFEST),
            (DOCKER_BOTH.digest, DOCKER_MANIFEST),
        ],
    )
    def test_what_is_accepted(self, both, method, tag, accept):
        same(both, f"{{name}}/manifests/{tag}", method, Accept=accept)

    @pytest.mark.parametrize("tag", ["oci", "both"])
    def test_nothing_accepted(self, both, method, tag):
        same(both, f"{{name}}/manifests/{tag}", method)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
class TestBlobs:
    def test_whole(self, both, method):
        status, headers, body = same(both, f"{{name}}/blobs/{LAYER.digest}", method)
        assert status == 200
        assert headers["Content-Length"] == str(SIZE)
        assert body == (LAYER.blob if method == "GET" else b"")

    @pytest.mark.parametrize("digest", OCI.blobs | DOCKER.blobs)
    def test_each(self, both, method, digest):
        assert same(both, f"{{name}}/blobs/{digest}", method)[0] == 200

    @pytest.mark.parametrize(
        "value",
        [
            "bytes=0-",
            "bytes=0-0",
            "bytes=1000-",
            "bytes=1000-1999",
            f"bytes=1000-{SIZE * 2}",
            f"bytes={SIZE - 1}-",
            f"bytes={SIZE}-",
            f"bytes={SIZE + 1}-{SIZE + 2}",
            "bytes=-10",
            f"bytes=-{SIZE * 2}",
            "bytes=5-1",
            "bytes=",
            "bytes=x-",
            "bytes=-",
            "items=0-",
            "nonsense",
        ],
    )
    def test_ranges(self, both, method, value):
        status, _, body = same(both, f"{{name}}/blobs/{LAYER.digest}", method, Range=value)
        if status == 206 and method == "GET" and value.startswith("bytes=1000-"):
            assert body == LAYER.blob[1000:][: 1000 if value.endswith("1999") else None]

    def test_unknown(self, both, method):
        assert same(both, f"{{name}}/blobs/{NONE}", method)[0] == 404
        assert same(both, f"/v2/no/such/blobs/{NONE}", method)[0] == 404

    def test_in_another_repository(self, both, method):
        assert same(both, f"{{name}}/other/blobs/{LAYER.digest}", method)[0] == 404


class TestOthers:
    def test_the_api(self, both):
        assert same(both, "/v2/") == (
            200,
            {
                "Content-Length": "2",
                "Content-Type": "application/json; charset=utf-8",
                "Docker-Distribution-Api-Version": "registry/2.0",
            },
            {},
        )

    @pytest.mark.parametrize("target", ["/nothing", "/v2/a/b/nothing", "/v2/a/manifests/"])
    def test_no_such_path(self, both, target):
        assert same(both, target)[0] == 404

    def test_one_connection_for_many(self, both):
        for server in both[:2]:
            connection = http.client.HTTPConnection(server.address, timeout=10)
            connection.connect()
            first = connection.sock
            for _ in range(3):
                connection.request("GET", f"/v2/{both[2]}/blobs/{LAYER.digest}")
                assert connection.getresponse().read() == LAYER.blob
                assert connection.sock is first
            connection.close()

    def test_the_last_one(self, both):
        """``Connection: close`` is obeyed."""
        for server in both[:2]:
            connection = http.client.HTTPConnection(server.address, timeout=10)
            connection.request("GET", "/v2/", headers={"Connection": "close"})
            response = connection.getresponse()
            assert response.headers["Connection"] == "close"
            assert response.read() == b"{}"
            connection.close()
