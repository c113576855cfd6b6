"""What registries and token servers say to do harm, and credential files of any kind."""

from __future__ import annotations

import asyncio
import base64
import json
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serpentine.errors import (
    AuthenticationError,
    InvalidReference,
    InvalidSetting,
    RegistryError,
    RegistryProtocolError,
    SerpentineError,
)
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.registry.auth import Authenticator, choose_challenge, parse_challenges
from serpentine.registry.credentials import Credential, CredentialStore, _from_helper
from serpentine.registry.messages import error_of
from serpentine.registry.retry import parse_retry_after

REFERENCE = Reference.parse("r.example/a/b:1")
# What the transport lets through: one header, a token's answer, an error's body.
MAX_HEADER = 64 * 1024
MAX_TOKEN_BODY = 256 * 1024
MAX_ERROR_BODY = 16 * 1024
MAX_ERROR = 1000

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def refused(error: SerpentineError) -> None:
    """Check that an error is one line for people, however long what it is about."""
    assert str(error).isprintable()
    assert len(str(error)) < MAX_ERROR
    assert len(error.hint) < MAX_ERROR


def filled(piece: str, length: int, start: str = "") -> str:
    """Return a text that repeats a piece up to a length."""
    return (start + piece * (length // len(piece)))[:length]


# --- references ------------------------------------------------------------------------------

_pieces = st.sampled_from(
    [*"aA0._-/:@[] \0\n\u00e9\u0661\ud800", "__", "::1", "localhost", "docker.io", "sha256:"]
) | st.sampled_from(["f" * 64, "latest", "http://"])


@given(st.lists(_pieces, max_size=14).map("".join))
@settings(max_examples=500)
def test_what_looks_like_a_reference(text):
    try:
        parsed = Reference.parse(text)
    except InvalidReference as error:
        refused(error)
        return
    assert Reference.parse(str(parsed)) == parsed
    # It goes into URLs and into names at containerd.
    assert str(parsed).isascii()
    assert not set(str(parsed)) & set(" ?#%\\\"'\0\n")
    assert ".." not in str(parsed)


@pytest.mark.parametrize(
    "piece", ["a", "a-", "a.", "a_", "a__", "a/", "A", ":", "@", "/", "x://", "[", "a:", "--", " a"]
)
@pytest.mark.parametrize("start", ["", "r.example/", "r.example:", "a@sha256:", "[", "x:"])
def test_a_reference_of_a_megabyte(piece, start):
    """Were a pattern to look back, this would not end within the test's time."""
    with pytest.raises(InvalidReference) as caught:
        Reference.parse(filled(piece, 1_000_000, start) + "!")
    refused(caught.value)


def test_a_long_scheme_is_not_repeated_in_the_hint():
    with pytest.raises(InvalidReference) as caught:
        Reference.parse("x" * 1_000_000 + "://a")
    assert len(caught.value.hint) < MAX_ERROR


@given(st.text(alphabet="linux/amd64v8.\u00b2\u0661 \0", max_size=30))
def test_any_platform(text):
    try:
        parsed = Platform.parse(text)
    except SerpentineError as error:
        refused(error)
    else:
        assert Platform.parse(str(parsed)) == parsed


def test_a_long_platform_is_not_repeated():
    with pytest.raises(SerpentineError) as caught:
        Platform.parse("x" * 1_000_000)
    assert len(str(caught.value)) < MAX_ERROR


# --- challenges ------------------------------------------------------------------------------

_challenges = st.lists(
    st.sampled_from(
        [*' ,="\\\t\0\u00e9', "Bearer", "Basic", "Negotiate", "realm", "service", "scope"]
    )
    | st.sampled_from(['realm="http://r/t"', "https://t.example/token", "abc=", "a b"]),
    max_size=12,
).map("".join)


@given(st.lists(_challenges, max_size=3))
@settings(max_examples=500)
def test_what_looks_like_a_challenge(values):
    parsed = parse_challenges(values)
    for challenge in parsed:
        assert challenge.scheme == challenge.scheme.lower()
        assert challenge.scheme
    # Nothing is made up: each parameter was in there.
    written = "".join(values).lower()
    assert all(name in written for one in parsed for name in one.parameters)
    chosen = choose_challenge(parsed)
    assert chosen is None or chosen.scheme == "basic" or chosen.parameters["realm"] is not None


@pytest.mark.parametrize(
    "piece",
    ["a,", "a ", 'a="', 'a=",', "a=b ", "a=b,", "a", ", ", '"', "=,", "\\", 'a="\\",', " ", "a= "],
)
@pytest.mark.parametrize("start", ["", "Bearer ", 'Bearer realm="', "Bearer a=", "Bearer a"])
def test_a_challenge_as_long_as_a_header_may_be(piece, start):
    tracemalloc.start()
    try:
        choose_challenge(parse_challenges([filled(piece, MAX_HEADER, start)]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500 * MAX_HEADER


class _Store(CredentialStore):
    def __init__(self, credential: Credential | None) -> None:
        super().__init__([], {})
        self.credential = credential

    async def find(self, registry, repository):
        return self.credential


def login(values, answer: bytes, credential: Credential | None = None, status: int = 200) -> str:
    """Answer a challenge, with a token server that says this."""

    async def send(method, url, *, params=None, data=None, authorization=None):
        assert url.startswith("https://")
        return status, answer

    return asyncio.run(
        Authenticator(_Store(credential)).answer(
            send,
            host="r.example",
            registry="r.example",
            repository="a/b",
            image="r.example/a/b:1",
            values=values,
            refused=None,
            plain=False,
        )
    )


@given(st.lists(_challenges, max_size=2), st.sampled_from([None, Credential("u", "p")]))
def test_any_challenge_is_answered_or_refused(values, credential):
    try:
        header = login(values, b'{"token":"t"}', credential)
    except (AuthenticationError, RegistryProtocolError) as error:
        refused(error)
    else:
        assert header in ("Bearer t", "Basic dTpw")


_BEARER = ['Bearer realm="https://t.example/token",service="s"']
_token_answers = st.fixed_dictionaries(
    {},
    optional={
        "token": st.text(max_size=10) | _json,
        "access_token": st.text(max_size=10) | _json,
        "expires_in": st.floats() | st.sampled_from([0, -1, 1e308, 10**400]) | _json,
    },
)  # fmt: skip


@given(_token_answers | _json, st.sampled_from([200, 200, 200, 400, 404, 500]))
@settings(max_examples=300)
def test_any_token_answer(answer, status):
    try:
        header = login(_BEARER, json.dumps(answer).encode(), status=status)
    except (AuthenticationError, RegistryProtocolError) as error:
        refused(error)
    else:
        assert header.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b'{"token":"\\ud800"}',
        b'{"token":"a\\r\\nX: y"}',
        b'{"token":"t","expires_in":' + b"9" * 200_000 + b"}",
        b'{"x":' + b"[" * 200_000,
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"token":"t"}',
        b"[" * MAX_TOKEN_BODY,
        b'{"token":"' + b"t" * (MAX_TOKEN_BODY - 11),
    ],
)
def test_a_token_answer_to_do_harm(body):
    with pytest.raises(RegistryProtocolError, match="gave no token"):
        login(_BEARER, body)


# --- error bodies, and when to come back -----------------------------------------------------

_entries = st.fixed_dictionaries(
    {},
    optional={
        "code": st.sampled_from(["NAME_UNKNOWN", "DENIED", "denied"]) | st.text(max_size=9) | _json,
        "message": st.text(max_size=300) | _json,
        "detail": _json,
    },
)


@given(
    st.fixed_dictionaries({"errors": st.lists(_entries | _json, max_size=3) | _json}) | _json,
    st.integers(400, 599),
)
def test_any_error_body(body, status):
    error = error_of(status, json.dumps(body).encode(), REFERENCE, "r.example")
    assert isinstance(error, RegistryError)
    assert str(error).isprintable()
    assert len(str(error)) < MAX_ERROR
    assert error.status == status


@pytest.mark.parametrize(
    "body",
    [
        '{"errors":' + "[" * MAX_ERROR_BODY,
        '{"errors":[' + filled("{},", MAX_ERROR_BODY),
        '{"errors":[{"message":"' + "x" * (MAX_ERROR_BODY - 30) + '"}]}',
        '{"errors":[{"message":"' + "\\u0000" * 2000 + '"}]}',
        '{"errors":[{"message":"\\ud800\\u202e"}]}',
        '{"errors":[{"code":' + "9" * 5000 + "}]}",
        '{"errors":[{"detail":' + "[" * 7000 + "]" * 7000 + ',"message":"m"}]}',
    ],
)
def test_an_error_body_to_do_harm(body):
    error = error_of(404, body.encode(), REFERENCE, "r.example")
    assert str(error).isprintable()
    assert len(str(error)) < MAX_ERROR


_NOW = datetime(2026, 11, 26, tzinfo=UTC)
_dates = st.tuples(
    st.sampled_from(["", "Thu, "]),
    st.integers(-1, 40),
    st.sampled_from(["Jan", "Dec", "Foo", "1"]),
    st.sampled_from([0, 1, 69, 1970, 2026, 9999, 10_000, 10**20]),
    st.tuples(*[st.integers(-1, 99)] * 3),
    st.sampled_from(["", "GMT", "+0000", "-2359", "+9999", "-99999999", "+" + "9" * 30, "EST"]),
).map(lambda d: f"{d[0]}{d[1]} {d[2]} {d[3]} {d[4][0]}:{d[4][1]}:{d[4][2]} {d[5]}")


@given(_dates)
@settings(max_examples=500)
def test_any_date_to_come_back(value):
    after = parse_retry_after(value, _NOW)
    assert after is None or 0 <= after < float("inf")


@pytest.mark.parametrize("piece", ["9", " ", ":", "-", "1 ", "Jan ", "(", "\\", '"', "+", ","])
@pytest.mark.parametrize("start", ["", "Thu, 1 Jan 2026 00:00:00 "])
def test_a_moment_as_long_as_a_header_may_be(piece, start):
    after = parse_retry_after(filled(piece, MAX_HEADER, start), _NOW)
    assert after is None or 0 <= after < float("inf")


# --- credential files ------------------------------------------------------------------------

_secrets = st.text(max_size=10) | st.sampled_from(
    [
        base64.b64encode(b"u:p").decode(),
        base64.b64encode(b"\xff:\xff").decode(),
        base64.b64encode(b"nothing").decode(),
        "\ud800",
        "a\r\nb",
        "====",
    ]
)
_logins = st.dictionaries(
    st.sampled_from(["auth", "username", "password", "identitytoken", "registrytoken"]),
    _secrets | _json,
    max_size=3,
)
_files = st.fixed_dictionaries(
    {},
    optional={
        "auths": st.dictionaries(
            st.sampled_from(["r.example", "https://r.example/v1/", "r.example/a"])
            | st.text(max_size=10),
            _logins | _json,
            max_size=3,
        )
        | _json,
        "credHelpers": st.dictionaries(
            st.sampled_from(["r.example", "", "x"]), st.sampled_from(["", "../x", "a b", 1, None])
        )
        | _json,
        "credsStore": st.sampled_from(["", "../x", "a\0b", "no-such-helper-here"]) | _json,
    },
)


def find_in(path, content: bytes) -> Credential | None:
    path.write_bytes(content)
    store = CredentialStore([(path, True)], {"PATH": ""})
    return asyncio.run(store.find("r.example", "a/b"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("credentials") / "config.json"


@given(_files | _json)
@settings(max_examples=300)
def test_any_credentials_file(config, value):
    try:
        found = find_in(config, json.dumps(value).encode())
    except (InvalidSetting, AuthenticationError) as error:
        refused(error)
        return
    if found is not None:
        # It can be sent.
        login(["Basic"] if found.username else _BEARER, b'{"token":"t"}', found)


@given(st.binary(max_size=60))
def test_any_bytes_for_a_credentials_file(config, data):
    try:
        find_in(config, data)
    except InvalidSetting as error:
        refused(error)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"auths":' * 200_000,
        b'{"auths":{"r.example":{"username":"\\ud800"}}}',
        b'{"auths":{"r.example":{"username":"u","password":"\\udfff"}}}',
        b"9" * 1_000_000,
        b" " * 5_000_000,
    ],
)
def test_a_credentials_file_to_do_harm(config, content):
    with pytest.raises(InvalidSetting) as caught:
        find_in(config, content)
    assert str(config) in str(caught.value)
    assert len(str(caught.value)) < MAX_ERROR


def test_a_credentials_file_without_end():
    store = CredentialStore([(Path("/dev/zero"), True)], {})
    with pytest.raises(InvalidSetting, match="larger than 4 MiB"):
        asyncio.run(store.find("r.example", "a/b"))


@given(
    st.fixed_dictionaries({}, optional={"Username": _secrets | _json, "Secret": _secrets | _json})
    | _json,
    st.sampled_from([0, 0, 0, 1]),
)
def test_any_answer_of_a_helper(value, status):
    try:
        found = _from_helper("helper", "r.example", status, json.dumps(value).encode(), b"")
    except AuthenticationError:
        return
    if found is not None:
        login(["Basic"] if found.username else _BEARER, b'{"token":"t"}', found)
