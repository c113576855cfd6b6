"""Images made by other tools unpack to the tree that those tools themselves unpack.

Done when 4: umoci, buildah and skopeo; OCI and Docker form; gzip, zstd and plain layers; and
shapes that no tool makes by itself, which are then unpacked by umoci for comparison.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from tests.support.foreign import Buildah, Umoci, tool
from tests.support.images import (
    Pusher,
    attestation,
    file,
    folder,
    hardlink,
    image,
    index,
    layer,
    opaque,
    push,
    symlink,
    whiteout,
)
from tests.support.trees import differences, snapshot_tree, walk

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="session")
def umoci(tmp_path_factory):
    made = Umoci(tmp_path_factory.mktemp("umoci"))
    made.make()
    return made


@pytest.fixture(scope="session")
def buildah(tmp_path_factory):
    made = Buildah(tmp_path_factory.mktemp("buildah"))
    yield made
    made.close()


@pytest.fixture
def same_tree(containerd, engine):
    """Return a function that pulls, and compares the snapshot with a tool's own directory."""

    async def check(reference: str, root: Path):
        state = await engine.pull_image(reference)
        ours = await snapshot_tree(
            engine.containerd, state.snapshotter, state.snapshot_key, containerd.here
        )
        theirs = walk(root)
        assert len(theirs) > 1, "the tool unpacked nothing: nothing would be compared"
        assert differences(ours, theirs) == []
        return state

    return check


def manifest_of(registry, name: str, tag: str = "1") -> dict:
    request = urllib.request.Request(f"{registry.url}/v2/{name}/manifests/{tag}")
    kinds = ("oci.image.manifest.v1", "docker.distribution.manifest.v2")
    request.add_header("Accept", ", ".join(f"application/vnd.{kind}+json" for kind in kinds))
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


async def test_umoci(umoci, registry, same_tree):
    reference = f"{registry.address}/foreign/umoci:1"
    umoci.push("three", reference)
    await same_tree(reference, umoci.unpack("three"))


@pytest.mark.parametrize("form", ["oci", "docker"])
async def test_buildah(buildah, registry, same_tree, form):
    name = f"built-{form}"
    if name not in buildah("images", "--format", "{{.Name}}"):
        buildah.make(name, form)
    reference = f"{registry.address}/foreign/{name}:1"
    buildah.push(name, reference)
    kind = manifest_of(registry, f"foreign/{name}")["mediaType"]
    assert ("docker" in kind) == (form == "docker")
    state = await same_tree(reference, buildah.unpack(name))
    assert "A=b" in state.env
    assert (state.working_dir, state.cmd) == ("/etc", ("/bin/tool",))


async def test_skopeo_to_docker_form(umoci, registry, same_tree):
    reference = f"{registry.address}/foreign/v2s2:1"
    umoci.push("three", reference, "--format", "v2s2")
    made = manifest_of(registry, "foreign/v2s2")
    assert made["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    await same_tree(reference, umoci.unpack("three"))


@pytest.mark.parametrize("compression", ["zstd", "none"])
async def test_skopeo_to_other_compressions(umoci, registry, same_tree, compression):
    """Towards a registry this skopeo always writes gzip, so it writes a directory instead."""
    folder = umoci.recompressed("three", compression)
    name = f"foreign/{compression}"
    reference = push_folder(registry, name, folder)
    extension = "+zstd" if compression == "zstd" else ""
    assert {one["mediaType"] for one in manifest_of(registry, name)["layers"]} == {
        f"application/vnd.oci.image.layer.v1.tar{extension}"
    }
    await same_tree(reference, umoci.unpack("three"))


def push_folder(registry, name: str, folder: Path) -> str:
    """Push what skopeo wrote to a ``dir:``: its manifest, and files named by their digests."""
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    with Pusher(registry.address) as pusher:
        for one in (manifest["config"], *manifest["layers"]):
            blob = (folder / one["digest"].partition(":")[2]).read_bytes()
            pusher.blob(name, one["digest"], blob)
        kind = manifest.get("mediaType", "application/vnd.oci.image.manifest.v1+json")
        pusher.manifest(name, "1", data, kind)
    return f"{registry.address}/{name}:1"


async def test_an_index_with_attestations(umoci, registry, same_tree, engine):
    parts = [
        image([layer([file("platform", name)])], platform=name)
        for name in ("linux/arm64", "linux/amd64")
    ]
    proof, entry = attestation(parts[1])
    whole = index(
        [
            (parts[0], parts[0].descriptor("linux/arm64")),
            (proof, entry),
            (parts[1], parts[1].descriptor("linux/amd64")),
        ]
    )
    reference = push(registry, "foreign/index", "1", whole)
    umoci.take(reference, "index")
    await same_tree(reference, umoci.unpack("index"))


async def test_a_nested_index(umoci, registry, same_tree):
    part = image([layer([file("nested", "yes")])])
    inner = index([(part, part.descriptor("linux/amd64"))])
    outer = index([(inner, inner.descriptor())])
    reference = push(registry, "foreign/nested", "1", outer)
    # skopeo does not look into nested indexes, so it gets the manifest itself.
    umoci.take(f"{registry.address}/foreign/nested@{part.digest}", "nested")
    await same_tree(reference, umoci.unpack("nested"))


async def test_the_same_layer_twice_and_an_empty_one(umoci, registry, same_tree):
    twice = layer([folder("d"), file("d/x", "x"), file("y", "y")])
    made = image([twice, layer([whiteout("y"), file("d/z", "z")]), layer([]), twice])
    reference = push(registry, "foreign/twice", "1", made)
    umoci.take(reference, "twice")
    await same_tree(reference, umoci.unpack("twice"))


async def test_whiteouts_and_opaque_directories(umoci, registry, same_tree):
    made = image(
        [
            layer(
                [
                    folder("kept", 0o750, uid=7, gid=8),
                    file("kept/a", "a"),
                    file("kept/b", "b"),
                    folder("hidden"),
                    file("hidden/old", "old"),
                    folder("hidden/dir"),
                    file("hidden/dir/old", "old"),
                    folder("gone"),
                    file("gone/x", "x"),
                    symlink("link", "kept"),
                    file("one", "1", mode=0o640, uid=3, gid=4),
                    hardlink("two", "one", mode=0o640, uid=3, gid=4),
                ]
            ),
            layer(
                [
                    whiteout("kept/a"),
                    opaque("hidden"),
                    file("hidden/new", "new"),
                    whiteout("gone"),
                    whiteout("link"),
                    file("link", "now a file"),
                ]
            ),
            layer([folder("gone"), file("gone/y", "back again")]),
        ]
    )
    reference = push(registry, "foreign/whiteouts", "1", made)
    umoci.take(reference, "whiteouts")
    await same_tree(reference, umoci.unpack("whiteouts"))


async def test_no_layers(registry, engine):
    """There is no tree, and so nothing that a tool could unpack; it is an image all the same."""
    state = await engine.pull_image(push(registry, "foreign/none", "1", image([])))
    assert state.snapshot_key == ""


async def test_what_skopeo_says_of_it(umoci, registry, engine):
    reference = f"{registry.address}/foreign/said:1"
    umoci.push("three", reference)
    said = json.loads(tool("skopeo", "inspect", "--tls-verify=false", f"docker://{reference}"))
    state = await engine.pull_image(reference)
    assert state.manifest_digest == said["Digest"]
    assert state.platform == f"{said['Os']}/{said['Architecture']}"
