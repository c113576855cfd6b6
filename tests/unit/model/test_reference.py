"""References: Docker's rules, held against an independent parser."""

import pytest
from docker_image import reference as oracle
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import InvalidReference, SerpentineError
from serpentine.model.reference import Reference

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        (" alpine:3.20 ", "docker.io/library/alpine:3.20", "alpine:3.20"),
        ("a/b", "docker.io/a/b:latest", "a/b:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("docker.io/library/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
        ("localhost:5000/a", "localhost:5000/a:latest", "localhost:5000/a:latest"),
        ("ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1"),
        ("HOST/a", "HOST/a:latest", "HOST/a:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}", f"alpine@{DIGEST}"),
        (f"a:1@{DIGEST}", f"docker.io/library/a:1@{DIGEST}", f"a:1@{DIGEST}"),
        ("a--b/c__d", "docker.io/a--b/c__d:latest", "a--b/c__d:latest"),
    ],
)
def test_what_people_type(text, full, familiar):
    parsed = Reference.parse(text)
    assert str(parsed) == full
    assert parsed.familiar == familiar
    assert Reference.parse(full) == parsed
    assert Reference.parse(familiar) == parsed


def test_the_digest_decides():
    parsed = Reference.parse(f"a:1@{DIGEST}")
    assert (parsed.tag, parsed.object) == ("1", DIGEST)
    assert Reference.parse("a:1").object == "1"
    assert str(Reference.parse("a:1").with_digest(parsed.digest)).endswith(f"a@{DIGEST}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "UPPER",
        "a b",
        "a:",
        "a:.b",
        "a:" + "t" * 129,
        "a//b",
        "/a",
        "a/",
        "a@",
        "a@sha256:12",
        f"a@sha256:{HEX.upper()}",
        f"a@md5:{HEX[:32]}",
        f"a@{DIGEST}@{DIGEST}",
        "https://ghcr.io/a",
        "docker://alpine",
        "-a",
        "a___b",
        "host:port/a",
        "-host.x/a",
        HEX,
        "x/" + "a" * 255,
        "ä",
        "a\x00b",
    ],
)
def test_what_is_refused(text):
    with pytest.raises(InvalidReference) as caught:
        Reference.parse(text)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_very_long_text_is_not_repeated_in_full():
    with pytest.raises(InvalidReference) as caught:
        Reference.parse("A" * 100_000)
    assert len(str(caught.value)) < 500


_component = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}", fullmatch=True)
_host = st.from_regex(r"([a-z0-9]{1,6}\.[a-z]{2,3}|localhost)(:[0-9]{2,5})?", fullmatch=True)
_tag = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
_valid = st.builds(
    lambda host, path, tag, digest: (
        (f"{host}/" if host else "")
        + "/".join(path)
        + (f":{tag}" if tag else "")
        + (f"@{DIGEST}" if digest else "")
    ),
    st.none() | _host,
    st.lists(_component, min_size=1, max_size=4),
    st.none() | _tag,
    st.booleans(),
)


@given(_valid)
def test_agrees_with_an_independent_parser(text):
    try:
        expected = oracle.Reference.parse_normalized_named(text)
    except oracle.InvalidReference:
        # A first component with a dot is a host, and '0.0_0' is none.
        with pytest.raises(InvalidReference):
            Reference.parse(text)
        return
    ours = Reference.parse(text)
    assert ours.registry == expected.split_hostname()[0]
    assert ours.repository == expected.split_hostname()[1]
    assert ours.tag == (expected["tag"] or (None if expected["digest"] else "latest"))
    assert (str(ours.digest) if ours.digest else None) == expected["digest"]


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_our_error(text):
    try:
        parsed = Reference.parse(text)
    except SerpentineError:
        return
    assert Reference.parse(str(parsed)) == parsed
