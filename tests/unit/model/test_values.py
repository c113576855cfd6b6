"""Digests, platforms, documents and states."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import (
    InvalidDigest,
    InvalidDocument,
    InvalidPlatform,
    SerpentineError,
    UnsupportedImage,
)
from serpentine.model.digest import ChainID, DiffID, Digest, chain_ids
from serpentine.model.documents import (
    Descriptor,
    Index,
    Manifest,
    decode_config,
    decode_document,
    layers_of,
    media_type_of,
)
from serpentine.model.platform import Platform
from serpentine.model.state import ContainerState
from tests.support.images import OCI_INDEX, OCI_MANIFEST, attestation, file, image, index, layer

HEX = "0123456789abcdef" * 4


class TestDigest:
    def test_reads_and_writes(self):
        for text in (f"sha256:{HEX}", f"sha512:{HEX * 2}"):
            assert str(Digest.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        ["", "sha256", f"sha256:{HEX}0", f"sha256:{HEX[1:]}", f"SHA256:{HEX}", f"md5:{HEX[:32]}",
         f"sha256:{HEX.upper()}", f"sha256:{HEX[1:]}\n", f"sha512:{HEX}"],
    )  # fmt: skip
    def test_refuses_what_cannot_be_checked(self, text):
        with pytest.raises(InvalidDigest):
            Digest.parse(text)

    def test_identities_are_never_equal(self):
        same = [kind.parse(f"sha256:{HEX}") for kind in (Digest, DiffID, ChainID)]
        assert len(set(same)) == 3
        assert same[0] == Digest.parse(f"sha256:{HEX}")

    def test_matches(self):
        assert Digest.of(b"x").matches(b"x")
        assert not Digest.of(b"x").matches(b"y")
        assert Digest.of(b"x", "sha512").matches(b"x")

    def test_chain_ids_are_those_of_the_specification(self):
        one, two = DiffID.of(b"1"), DiffID.of(b"2")
        chain = chain_ids([one, two])
        assert str(chain[0]) == str(one)
        assert chain[1] == ChainID.of(f"{one} {two}".encode())
        assert chain_ids([]) == ()


class TestPlatform:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("linux/s390x", "linux/s390x"),
        ],
    )
    def test_normal_forms(self, text, normal):
        assert str(Platform.parse(text)) == normal
        assert Platform.parse(normal) == Platform.parse(text)

    @pytest.mark.parametrize(
        "text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "li nux/x", "a/b\n"]
    )
    def test_what_is_refused(self, text):
        if text == "a/b\n":
            assert Platform.parse(text)  # surrounding space is the shell's, not the user's
            return
        with pytest.raises(InvalidPlatform):
            Platform.parse(text)

    @pytest.mark.parametrize(
        ("host", "served"),
        [
            ("linux/arm/v7", ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
            ("linux/arm/v5", ["linux/arm/v5"]),
            ("linux/amd64", ["linux/amd64", "linux/386"]),
            ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]),
            (
                "linux/arm64",
                ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
            ),
            ("linux/riscv64", ["linux/riscv64"]),
            ("linux/amd64/v999999999999", ["linux/amd64/v999999999999", "linux/386"]),
        ],
    )
    def test_what_runs_where_best_first(self, host, served):
        assert [str(p) for p in Platform.parse(host).serves()] == served

    def test_levels_of_arm64(self):
        served = [str(p) for p in Platform.parse("linux/arm64/v9.1").serves()]
        assert served[:3] == ["linux/arm64/v9.1", "linux/arm64/v9", "linux/arm64/v8.9"]
        assert served.index("linux/arm64") == 11
        assert served[12] == "linux/arm/v8"

    def test_rank(self):
        host = Platform.parse("linux/arm64")
        assert host.rank(Platform("linux", "arm64", "v8")) == 0
        assert host.rank(Platform("linux", "arm", "v6")) == 3
        assert host.rank(Platform("linux", "amd64")) is None
        assert host.rank(Platform("windows", "arm64")) is None
        assert Platform.parse("linux/amd64").rank(Platform("linux", "amd64", "v3")) is None


class TestDocuments:
    def test_a_manifest(self):
        made = image([layer([file("a")])])
        manifest = decode_document(made.data, OCI_MANIFEST, "it")
        assert isinstance(manifest, Manifest)
        assert len(manifest.layers) == 1

    def test_without_any_media_type_the_members_decide(self):
        made = image([], with_media_type=False)
        assert isinstance(decode_document(made.data, "", "it"), Manifest)
        whole = index([(made, made.descriptor("linux/amd64"))], with_media_type=False)
        decoded = decode_document(whole.data, "application/json", "it")
        assert isinstance(decoded, Index)
        assert media_type_of(decoded, "application/json") == OCI_INDEX
        assert media_type_of(decoded, "application/vnd.docker.distribution.manifest.list.v2+json")

    def test_a_contradiction_is_refused(self):
        made = image([])
        with pytest.raises(InvalidDocument, match="served as"):
            decode_document(made.data, OCI_INDEX, "it")

    def test_two_readings_are_refused(self):
        """CVE-2021-41190."""
        value = {**json.loads(image([]).data), "manifests": []}
        with pytest.raises(InvalidDocument, match="both"):
            decode_document(json.dumps(value).encode(), OCI_MANIFEST, "it")

    @pytest.mark.parametrize("version", [1, 3, None])
    def test_other_schema_versions(self, version):
        value = {**json.loads(image([]).data), "schemaVersion": version}
        with pytest.raises((UnsupportedImage, InvalidDocument)):
            decode_document(json.dumps(value).encode(), OCI_MANIFEST, "it")

    def test_a_negative_size(self):
        value = json.loads(image([layer([])]).data)
        value["layers"][0]["size"] = -1
        with pytest.raises(InvalidDocument, match="negative"):
            decode_document(json.dumps(value).encode(), OCI_MANIFEST, "it")

    def test_too_many_layers(self):
        value = json.loads(image([layer([])]).data)
        value["layers"] *= 1001
        with pytest.raises(UnsupportedImage, match="1001 layers"):
            decode_document(json.dumps(value).encode(), OCI_MANIFEST, "it")

    def test_attestations_are_known_by_annotation_or_platform(self):
        _, entry = attestation(image([]))
        for drop in ("annotations", "platform"):
            value = {k: v for k, v in entry.items() if k != drop}
            whole = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [value]}
            decoded = decode_document(json.dumps(whole).encode(), "", "it")
            assert decoded.manifests[0].is_attestation

    def test_layers_have_three_identities(self):
        parts = [layer([file("a")]), layer([file("b")], compression="zstd")]
        made = image(parts)
        manifest = decode_document(made.data, "", "it")
        config = decode_config(made.blobs[str(manifest.config.digest)], "it")
        layers = layers_of(manifest, config, "it")
        assert [str(one.descriptor.digest) for one in layers] == [p.digest for p in parts]
        assert [str(one.diff_id) for one in layers] == [p.diff_id for p in parts]
        assert layers[0].parent is None
        assert layers[1].parent == layers[0].chain_id

    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_document_or_our_error(self, data):
        for decode in (lambda d: decode_document(d, "", "it"), lambda d: decode_config(d, "it")):
            with contextlib.suppress(SerpentineError):
                decode(data)

    _json = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["schemaVersion", "mediaType", "manifests", "layers", "config", "size",
                             "digest", "rootfs", "diff_ids", "platform", "annotations"]),
            inner, max_size=5),
        max_leaves=20,
    )  # fmt: skip

    @given(_json)
    def test_any_json_is_a_document_or_our_error(self, value):
        data = json.dumps(value).encode()
        for decode in (lambda d: decode_document(d, "", "it"), lambda d: decode_config(d, "it")):
            with contextlib.suppress(SerpentineError):
                decode(data)

    def test_deep_nesting_is_our_error(self):
        with pytest.raises(InvalidDocument):
            decode_document(b'{"config":' + b"[" * 100_000, "", "it")


class TestState:
    def make(self, **more) -> ContainerState:
        return ContainerState(
            snapshot_key="k",
            snapshotter="overlayfs",
            platform="linux/amd64",
            **{"env": ("A=b",), "labels": (("a", "1"),), "cmd": ("x",), **more},
        )

    def test_json_both_ways(self):
        state = self.make(image="r/a@sha256:x", manifest_digest="d", index_digest="i", user="1:2")
        again = ContainerState.from_json(state.to_json())
        assert again == state
        assert again.to_dict() == state.to_dict()
        assert again.image == state.image

    def test_equal_by_content_not_by_name(self):
        assert self.make(image="a@sha256:1") == self.make(image="b@sha256:2", index_digest="i")
        assert hash(self.make(image="a@sha256:1")) == hash(self.make(image="b@sha256:2"))
        assert self.make() != self.make(env=())
        assert self.make() != "k"

    def test_immutable(self):
        with pytest.raises(AttributeError):
            self.make().snapshot_key = "other"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 1}', "null", '{"config":{}}'])
    def test_what_is_no_state(self, text):
        with pytest.raises(InvalidDocument):
            ContainerState.from_json(text)

    def test_empty_user_and_directory_mean_root_and_slash(self):
        """Trap 48."""
        for process in ('{"User":"","WorkingDir":""}', "{}", "null"):
            data = f'{{"os":"linux","architecture":"arm","config":{process}}}'.encode()
            config = decode_config(data, "it")
            state = ContainerState.from_config(config, snapshot_key="", snapshotter="native")
            assert (state.user, state.working_dir) == ("", "/")
            assert (state.platform, state.stop_signal) == ("linux/arm/v7", "SIGTERM")
            assert (state.env, state.cmd, state.entrypoint, state.labels) == ((), (), (), ())


def test_descriptors_are_immutable():
    descriptor = Descriptor(media_type="x", digest=Digest.of(b""), size=0)
    with pytest.raises(AttributeError):
        descriptor.size = 1
    assert msgspec.structs.replace(descriptor, size=1).size == 1
