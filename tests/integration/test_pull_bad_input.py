"""Bad input: one clear line that names the thing, status 1, and nothing half-made left behind.

The image is served by a registry that misbehaves on purpose; containerd is a real one.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.contents import NOTHING
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.images import (
    OCI_MANIFEST,
    Image,
    Layer,
    file,
    image,
    index,
    layer,
    noise,
    push,
    sha256,
)


@pytest.fixture
def fake():
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def refused(command, contents):
    """Return a function that pulls, and checks everything that all refusals have in common."""

    async def pull(
        *arguments: str,
        names: tuple[str, ...],
        status: int = 1,
        resumable: bool = False,
        **environ: str,
    ) -> str:
        before = await contents()
        done = command("pull", "-q", *arguments, **environ)
        assert done.status == status, done.err
        assert done.out == ""
        assert done.err.count("\n") == 1, done.err
        assert done.err.startswith("serpentine: ")
        for name in names:
            assert name in done.err
        assert "; " in done.err, "the remedy is missing"
        after = await contents()
        if resumable:
            # What came is kept for the next attempt, and nothing else.
            assert len(after.leases) == len(before.leases) + 1
            assert len(after.ingests) == len(before.ingests) + 1
            after = replace(after, leases=before.leases, ingests=before.ingests)
        assert after == before
        return done.err

    return pull


def small() -> Image:
    return image([layer([file("a", noise("small", 300_000))])])


async def test_a_malformed_reference(refused):
    await refused("Not/An:Image:Reference", names=("Not/An:Image:Reference",))


async def test_an_unknown_host(refused):
    await refused(
        "no-such-host.invalid/a:1",
        names=("no-such-host.invalid/a:1", "cannot find the host no-such-host.invalid"),
    )


async def test_nothing_listens(refused):
    await refused("127.0.0.1:9/a:1", names=("127.0.0.1:9/a:1", "cannot connect to 127.0.0.1:9"))


async def test_a_repository_or_tag_that_is_not_there(refused, registry):
    reference = push(registry, "bad/there", "1", small())
    missing = reference.replace(":1", ":2").replace("127.0.0.2", "127.0.0.1")
    missing = f"{registry.address}/bad/there:2"
    await refused(missing, names=(missing, "check the name"))
    missing = f"{registry.address}/bad/nowhere:1"
    await refused(missing, names=(missing, "check the name"))
    missing = f"{registry.address}/bad/there@sha256:{'0' * 64}"
    await refused(missing, names=(missing,))


async def test_no_credentials_or_wrong_ones(refused, registry_htpasswd, tmp_path):
    reference = push(registry_htpasswd, "bad/private", "1", small())
    host = registry_htpasswd.address
    await refused(reference, names=(reference, host, "docker login"))
    secret = "not-the-password"
    (tmp_path / "config.json").write_text(
        json.dumps({"auths": {host: {"username": "alice", "password": secret}}})
    )
    err = await refused(
        reference,
        names=(reference, host, "alice", str(tmp_path)),
        DOCKER_CONFIG=str(tmp_path),
    )
    assert secret not in err


async def test_no_entry_for_the_platform(refused, fake):
    part = image([layer([file("a")])], platform="linux/s390x")
    whole = index([(part, part.descriptor("linux/s390x"))])
    reference = fake.add("bad/platform", "1", whole)
    await refused(reference, names=(reference, "linux/amd64", "linux/s390x", "--platform"))
    single = fake.add("bad/platform-single", "1", part)
    await refused(single, names=(single, "linux/amd64", "linux/s390x"))


async def test_a_manifest_with_another_digest(refused, fake):
    made = small()
    reference = fake.add("bad/manifest", "1", made)
    path = f"bad/manifest/manifests/{made.digest}"
    fake.manifests[path] = (OCI_MANIFEST, made.data.replace(b" ", b"\t"))
    fake.on(f"GET /v2/{path}", Answer(body=made.data.replace(b" ", b"\t")))
    await refused(reference, names=(reference, made.digest, "another digest"))


async def test_a_manifest_of_another_size(refused, fake):
    made = small()
    reference = fake.add("bad/manifest-size", "1", made)
    fake.on("GET .*manifests", Answer(body=made.data + b" "))
    await refused(reference, names=(reference, made.digest))


async def test_a_config_with_another_digest(refused, fake):
    made = small()
    reference = fake.add("bad/config", "1", made)
    config = json.loads(made.data)["config"]["digest"]
    fake.blobs[config] = fake.blobs[config].replace(b"linux", b"LINUX")
    await refused(reference, names=(reference, config, "another digest"))


@pytest.mark.parametrize("declared", [True, False])
async def test_a_document_larger_than_the_cap(refused, fake, declared):
    huge = Image(b'{"schemaVersion":2,"x":"' + b"x" * 5_000_000 + b'"}', OCI_MANIFEST)
    reference = fake.add("bad/huge", "1", huge)
    if not declared:
        fake.on("HEAD", Answer(405))
    await refused(reference, names=(reference, "larger than 4 MiB"))


async def test_a_config_larger_than_the_cap(refused, fake):
    made = image([], config={"Cmd": ["x" * 5_000_000]})
    reference = fake.add("bad/huge-config", "1", made)
    await refused(reference, names=(reference, "larger than 4 MiB"))


async def test_a_blob_with_a_wrong_digest(refused, fake):
    made = small()
    reference = fake.add("bad/blob", "1", made)
    digest = next(iter(made.blobs))
    fake.blobs[digest] = bytes(len(made.blobs[digest]))
    await refused(reference, names=(reference, f"{fake.address} serves", digest))


async def test_a_blob_that_is_short(refused, fake):
    made = small()
    reference = fake.add("bad/short", "1", made)
    digest = next(iter(made.blobs))
    data = made.blobs[digest]
    fake.on(f"GET .*{digest}", Answer(body=data[:1000]))
    fake.on(f"GET .*{digest}", lambda s: Answer(416) if "range" in s.headers else None)
    await refused(reference, names=(reference, fake.address, digest), resumable=True)


async def test_a_blob_that_is_long(refused, fake):
    made = small()
    reference = fake.add("bad/long", "1", made)
    digest = next(iter(made.blobs))
    fake.blobs[digest] = made.blobs[digest] + b"more"
    await refused(reference, names=(reference, fake.address, digest, "longer"), resumable=True)


async def test_a_layer_with_a_wrong_diff_id(refused, fake):
    one = layer([file("a", "1")])
    wrong = sha256(b"something else")
    made = image([one], diff_ids=[wrong])
    reference = fake.add("bad/diff-id", "1", made)
    await refused(reference, names=(reference, one.digest, one.diff_id, wrong))


async def test_a_layer_that_is_no_tar(refused, fake):
    one = Layer(
        b"rubbish" * 1000, sha256(b"rubbish" * 1000), "application/vnd.oci.image.layer.v1.tar"
    )
    reference = fake.add("bad/rubbish", "1", image([one]))
    await refused(reference, names=(reference, one.digest, "does not unpack"))


async def test_a_good_layer_below_a_bad_one_is_not_kept(refused, fake):
    good, bad = layer([file("good", noise("good", 200_000))]), layer([file("bad")])
    made = image([good, bad], diff_ids=[good.diff_id, sha256(b"x")])
    await refused(fake.add("bad/second", "1", made), names=(bad.digest,))


async def test_a_config_with_another_number_of_layers(refused, fake):
    one = layer([file("a", "1")])
    made = image([one], diff_ids=[one.diff_id, one.diff_id])
    reference = fake.add("bad/count", "1", made)
    await refused(reference, names=(reference, "1 layers", "2 diff IDs"))


async def test_an_artifact(refused, fake):
    blob = Layer(b"chart", sha256(b"chart"), "application/vnd.cncf.helm.chart.content.v1.tar+gzip")
    chart = {"mediaType": "application/vnd.cncf.helm.config.v1+json"}
    made = image([blob])
    config = {**json.loads(made.data)["config"], **chart}
    made = image([blob], manifest={"config": config})
    await refused(fake.add("bad/chart", "1", made), names=("artifact", "helm"))
    unknown_layer = image([blob])
    await refused(fake.add("bad/layer-type", "1", unknown_layer), names=("helm",))


async def test_schema_1(refused, fake):
    data = b'{"schemaVersion":1,"name":"x","tag":"1","fsLayers":[],"history":[]}'
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    reference = fake.add("bad/schema1", "1", Image(data, kind))
    await refused(reference, names=(reference, "schema 1"))


async def test_a_manifest_that_is_no_json(refused, fake):
    reference = fake.add("bad/json", "1", Image(b"<html>", OCI_MANIFEST))
    await refused(reference, names=(reference, "not valid"))


async def test_what_is_no_registry(refused, fake):
    fake.on(".", Answer(200, b"<html>hello</html>", {"Content-Type": "text/html"}))
    await refused(f"{fake.address}/some/site:1", names=(fake.address,))


async def test_no_containerd_at_the_address(refused, tmp_path):
    missing = str(tmp_path / "no.sock")
    await refused("alpine", names=(missing,), CONTAINERD_ADDRESS=missing)


async def test_a_snapshotter_that_is_not_there(command, registry):
    done = command("--snapshotter", "nosuch", "pull", "-q", f"{registry.address}/a:1")
    assert done.status == 2
    assert "nosuch" in done.err
    assert "overlayfs" in done.err


async def test_an_image_that_is_not_there_locally(command):
    for arguments in (["inspect", "alpine"], ["rmi", "alpine"]):
        done = command(*arguments)
        assert (done.status, done.out) == (1, "")
        assert "alpine" in done.err
        assert "serpentine images" in done.err


async def test_after_all_that_a_good_pull_works(command, fake, contents):
    assert await contents() == NOTHING
    assert command("pull", "-q", fake.add("good/one", "1", small())).status == 0
