"""Documents that somebody wrote to do harm: an error of ours each time, within bounds."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serpentine.errors import InvalidDocument, SerpentineError, UnsupportedImage
from serpentine.model.digest import ChainID, Digest
from serpentine.model.documents import (
    INDEX_TYPES,
    LAYER_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
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
from serpentine.pull.plan import candidates, list_platforms
from serpentine.pull.record import labelled_documents
from serpentine.pull.resolve import Document, ResolvedImage

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"
# What the client accepts as a document at all.
MAX_DOCUMENT = 4 * 1024 * 1024
# Errors are one line for people, whatever was in the document.
MAX_ERROR = 1000

_texts = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "../..", "a\nb", "\u202e", "x" * 5000, "{}", DIGEST, "linux", "amd64", "v8"]
)
_numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, True, None])
)
_digests = st.just(DIGEST) | st.sampled_from(
    ["", "sha256:", "sha256:x", f"md5:{HEX[:32]}", DIGEST.upper(), f"{DIGEST}0", 1, None, [DIGEST]]
) | _texts  # fmt: skip
_media_types = (
    st.sampled_from(sorted(MANIFEST_TYPES | INDEX_TYPES | LAYER_TYPES))
    | st.sampled_from(
        ["application/vnd.docker.distribution.manifest.v1+prettyjws", "text/html", None]
    )
    | _texts
)
_labels = st.dictionaries(
    st.sampled_from(
        [
            "containerd.io/gc.root",
            "containerd.io/gc.ref.content.l.0",
            "containerd.io/gc.ref.snapshot.overlayfs",
            "containerd.io/uncompressed",
            "containerd.io/distribution.source.evil.example",
            "vnd.docker.reference.type",
        ]
    )
    | _texts,
    _texts,
    max_size=4,
)
_anything = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


def objects(**members: st.SearchStrategy):
    """Make objects with some of these members, one of them perhaps of any kind at all."""
    some = st.fixed_dictionaries({}, optional=members)
    spoiled = st.dictionaries(st.sampled_from(sorted(members)), _anything, max_size=1)
    return st.tuples(some, spoiled).map(lambda pair: pair[0] | pair[1])


_platforms = objects(
    **{"os": _texts, "architecture": _texts, "variant": _texts, "os.version": _texts}
)
_descriptors = objects(
    mediaType=_media_types,
    digest=_digests,
    size=_numbers,
    annotations=_labels,
    platform=_platforms,
    urls=st.lists(_texts, max_size=2),
    artifactType=_texts,
)
# Well-formed ones too, or nothing would ever get past the first check.
_good = st.fixed_dictionaries(
    {
        "mediaType": st.sampled_from([OCI_LAYER_GZIP, *sorted(MANIFEST_TYPES | INDEX_TYPES)]),
        "digest": st.just(DIGEST),
        "size": st.integers(0, 2**70),
    },
    optional={"annotations": _labels, "platform": _platforms},
)
_parts = st.lists(_good, max_size=4) | st.lists(_good | _descriptors, max_size=3)
_documents = objects(
    schemaVersion=st.just(2) | _numbers,
    mediaType=_media_types,
    config=_good | _descriptors,
    layers=_parts,
    manifests=_parts,
    annotations=_labels,
    artifactType=_texts,
)
_manifests = st.fixed_dictionaries(
    {"schemaVersion": st.just(2), "config": _good, "layers": _parts},
    optional={"annotations": _labels, "mediaType": st.just(OCI_MANIFEST)},
)
_indexes = st.fixed_dictionaries(
    {"schemaVersion": st.just(2), "manifests": _parts}, optional={"annotations": _labels}
)
_health = objects(
    Test=st.lists(_texts, max_size=2) | st.just(["CMD", "x"]) | st.just(["CMD-SHELL", "x"]),
    Interval=_numbers,
    Timeout=_numbers,
    StartPeriod=_numbers,
    Retries=_numbers,
)
_good_health = st.fixed_dictionaries(
    {"Test": st.just(["CMD", "x"])},
    optional={
        name: st.integers() | st.sampled_from([2**63, -1, 10**400, -(10**400)])
        for name in ("Interval", "Timeout", "StartPeriod", "Retries")
    },
)
_processes = objects(
    User=_texts,
    Env=st.lists(_texts, max_size=2),
    Entrypoint=st.lists(_texts, max_size=2),
    Cmd=st.lists(_texts, max_size=2),
    WorkingDir=_texts,
    Labels=_labels,
    StopSignal=_texts,
    Healthcheck=_health | _good_health,
)
_configs = objects(
    architecture=_texts,
    os=_texts,
    variant=_texts,
    created=_texts,
    config=_processes | st.fixed_dictionaries({"Healthcheck": _good_health}),
    rootfs=objects(type=_texts, diff_ids=st.lists(_digests, max_size=4)),
)


def encoded(value: object) -> bytes:
    """Return JSON, or what is near it: NaN and Infinity are none, and are sent by some."""
    return json.dumps(value).encode()


def refused(error: SerpentineError) -> None:
    """Check that an error is one for people, however long what it is about."""
    assert len(str(error)) < MAX_ERROR
    assert len(error.hint) < MAX_ERROR


@given(_documents | _manifests | _indexes, _media_types.filter(lambda kind: kind is not None))
@settings(max_examples=300)
def test_any_document(value, served_as):
    try:
        document = decode_document(encoded(value), served_as, "it")
    except (InvalidDocument, UnsupportedImage) as error:
        refused(error)
        return
    assert media_type_of(document, served_as)
    parts = document.manifests if isinstance(document, Index) else document.layers
    for part in parts:
        # What travels to containerd has to fit there.
        assert 0 <= part.size < 2**63
        assert isinstance(part.digest, Digest)
    if isinstance(document, Index):
        list_platforms(document.manifests)
        for wanted in ("linux/amd64", "linux/arm/v7"):
            for entry in candidates(document.manifests, Platform.parse(wanted)):
                assert entry in document.manifests
                assert not entry.is_attestation


@given(_configs)
@settings(max_examples=300)
def test_any_config(value):
    try:
        config = decode_config(encoded(value), "it")
    except InvalidDocument as error:
        refused(error)
        return
    state = ContainerState.from_config(config, snapshot_key="", snapshotter="native")
    assert ContainerState.from_json(state.to_json()) == state
    if state.healthcheck is not None:
        check = state.healthcheck
        assert check.interval > 0
        assert check.timeout > 0
        assert check.retries > 0
        assert check.start_period >= 0
    Platform.parse("linux/amd64").rank(config.platform)


@given(_manifests, _configs)
@settings(max_examples=300)
def test_any_manifest_with_any_config(manifest, config):
    try:
        decoded = decode_document(encoded(manifest), "", "it")
        assert isinstance(decoded, Manifest)
        layers = layers_of(decoded, decode_config(encoded(config), "it"), "it")
    except (InvalidDocument, UnsupportedImage) as error:
        refused(error)
        return
    assert [layer.descriptor for layer in layers] == decoded.layers
    assert [layer.parent for layer in layers] == [None, *(layer.chain_id for layer in layers)][:-1]


@given(_labels, _labels)
def test_annotations_set_no_labels(one, two):
    """Labels decide what containerd keeps; they are ours, whatever documents say."""

    def labels(annotations, more):
        descriptor = {"digest": DIGEST, "size": 1, "annotations": annotations}
        layer = descriptor | {"mediaType": OCI_LAYER_GZIP}
        manifest = {"schemaVersion": 2, "config": descriptor, "layers": [layer]}
        index = {"schemaVersion": 2, "manifests": [descriptor], "annotations": more}
        config = {"rootfs": {"diff_ids": [DIGEST]}, "config": {"Labels": more}}
        decoded = decode_document(encoded(manifest | {"annotations": more}), "", "it")
        top = decode_document(encoded(index), OCI_INDEX, "it")
        image_config = decode_config(encoded(config), "it")
        layers = layers_of(decoded, image_config, "it")
        image = ResolvedImage(
            indexes=(Document(Descriptor(digest=Digest.parse(DIGEST), size=1), b""),),
            manifest=Document(top.manifests[0], b""),
            config=Document(decoded.config, b""),
            layers=layers,
            image_config=image_config,
        )
        return [
            (kind, found)
            for kind, _, found in labelled_documents(image, ChainID("sha256", HEX), "overlayfs")
        ]

    found = labels(one, two)
    assert found == labels({}, {})
    assert not any("gc.root" in name for _, names in found for name in names)


def many(text: str, around: str) -> bytes:
    """Return a document that repeats a text up to the size that a document may have."""
    head, _, tail = around.partition("*")
    count = (MAX_DOCUMENT - len(around)) // (len(text) + 1)
    return (head + ",".join([text] * count) + tail).encode()


_ENTRY = f'{{"digest":"{DIGEST}","size":1}}'
_HUGE = {
    "many manifests": many(_ENTRY, '{"schemaVersion":2,"manifests":[*]}'),
    "many layers": many(_ENTRY, f'{{"schemaVersion":2,"config":{_ENTRY},"layers":[*]}}'),
    "empty entries": many("{}", '{"schemaVersion":2,"manifests":[*]}'),
    "many members": many('"a":1', '{"schemaVersion":2,*}'),
    "one member again and again": many('"manifests":[]', '{"schemaVersion":2,"mediaType":"x",*}'),
    "many annotations": many(
        '"":""', f'{{"schemaVersion":2,"manifests":[{_ENTRY}],"annotations":{{*}}}}'
    ),
    "a long media type": b'{"schemaVersion":2,"mediaType":"' + b"x" * 4_000_000 + b'"}',
    "a long layer type": (
        f'{{"schemaVersion":2,"config":{_ENTRY},"layers":[{_ENTRY[:-1]},"mediaType":"'.encode()
        + b"x" * 4_000_000
        + b'"}]}'
    ),
    "a long digest": b'{"schemaVersion":2,"manifests":[{"size":1,"digest":"sha256:'
    + b"a" * 4_000_000
    + b'"}]}',
    "a long version": b'{"schemaVersion":' + b"9" * 4000 + b',"manifests":[]}',
    "a very long version": b'{"schemaVersion":' + b"9" * 4_000_000 + b',"manifests":[]}',
    "a long size": _ENTRY.replace("1}", "9" * 4_000_000 + "}").encode(),
    "an exponent": f'{{"schemaVersion":2,"manifests":[{_ENTRY[:-2]}1e999999999}}]}}'.encode(),
    "deep arrays": b'{"schemaVersion":2,"x":' + b"[" * 4_000_000,
    "deep objects": b'{"schemaVersion":2,"annotations":' + b'{"a":' * 800_000,
    "deep and complete": b'{"x":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
    "deep in what is skipped": b'{"manifests":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
    "spaces": b" " * 4_000_000,
    "zeros": bytes(4_000_000),
    "many diff IDs": many(f'"{DIGEST}"', '{"rootfs":{"diff_ids":[*]}}'),
    "many labels": many('"":""', '{"config":{"Labels":{*}}}'),
    "a long environment": many('""', '{"config":{"Env":[*]}}'),
}


@pytest.mark.parametrize("name", _HUGE)
def test_a_huge_document_costs_a_bounded_multiple(name):
    data = _HUGE[name]
    tracemalloc.start()
    try:
        for decode in (lambda: decode_document(data, "", "it"), lambda: decode_config(data, "it")):
            try:
                got = decode()
            except SerpentineError as error:
                refused(error)
                continue
            if isinstance(got, Manifest):
                try:
                    layers_of(got, decode_config(b"{}", "it"), "it")
                except SerpentineError as error:
                    refused(error)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The worst are the shortest things that become an object each.
    assert peak < 30 * MAX_DOCUMENT


@given(_anything | st.fixed_dictionaries({"config": _anything | objects(labels=_labels)}))
def test_any_state(value):
    """States come from files of a person's own, as to_json wrote them."""
    try:
        ContainerState.from_json(encoded(value))
    except InvalidDocument as error:
        refused(error)


@pytest.mark.parametrize(
    "text", ['{"config":"ab"}', b"\xff", "\ud800", "[" * 100_000, '{"config":' + '{"a":' * 100_000]
)
def test_what_is_no_state(text):
    with pytest.raises(InvalidDocument):
        ContainerState.from_json(text)


@pytest.mark.parametrize("size", [2**63, 2**64, 10**400])
@pytest.mark.parametrize("place", ["config", "layers", "manifests"])
def test_a_size_that_fits_nowhere(size, place):
    entry = {"digest": DIGEST, "size": size}
    good = entry | {"size": 2**63 - 1}
    value: dict[str, object] = {"schemaVersion": 2, "manifests": [good, entry]}
    if place != "manifests":
        value = {"schemaVersion": 2, "config": good, "layers": [good]}
        value[place] = entry if place == "config" else [entry]
    with pytest.raises(InvalidDocument, match="a size in it that nothing can have"):
        decode_document(encoded(value), "", "it")
