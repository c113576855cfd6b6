"""The plain functions of the registry client: retries, hosts, messages."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import (
    AuthenticationError,
    InvalidSetting,
    RegistryNotFound,
    RegistryProtocolError,
    RegistryUnreachable,
)
from serpentine.model.reference import Reference
from serpentine.registry.hosts import (
    api_host,
    host_of,
    is_loopback,
    matches,
    proxy_for,
    schemes_for,
)
from serpentine.registry.messages import error_of
from serpentine.registry.retry import parse_retry_after, retry_delay

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("Fri, 02 Jan 2026 03:04:15 GMT", 10.0),
        ("Fri, 02 Jan 2026 03:04:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
        ("1.5", None),
        ("Fri, 02 Jan 2026 03:04:15 +99999999999999999999", None),
        ("Fri, 02 Jan 99999999999999999999 03:04:15 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert parse_retry_after(value, NOW) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_read(value):
    result = parse_retry_after(value, NOW)
    assert result is None or result >= 0


def test_when_to_try_again():
    def delay(tries, status, after=None):
        return retry_delay(tries, status, after, lambda: 0.5)

    assert [delay(n, 503) for n in (1, 2, 3, 4)] == [0.25, 1.0, 4.0, None]
    assert delay(1, None) == 0.25
    assert all(delay(1, status) for status in (408, 429, 500, 502, 503, 504))
    assert [delay(1, status) for status in (200, 400, 401, 403, 404, 405, 416, 501)] == [None] * 8
    assert delay(1, 429, 10.0) == 10.5, "never before the time"
    assert delay(1, 429, 61.0) is None, "too long to wait silently"


def test_hosts():
    assert api_host("docker.io") == "registry-1.docker.io"
    assert api_host("ghcr.io") == "ghcr.io"
    for host in (
        "localhost",
        "localhost:5000",
        "127.0.0.1:1",
        "127.9.9.9",
        "[::1]:5000",
        "a.localhost",
    ):
        assert is_loopback(host)
        assert schemes_for(host, ()) == ("https", "http")
    for host in ("localhost.evil.com", "127.0.0.1.nip.io", "10.0.0.1", "[::2]", "example.com:80"):
        assert not is_loopback(host)
        assert schemes_for(host, ()) == ("https",)
    assert schemes_for("r.x:5000", ("r.x:5000",)) == ("https", "http")
    assert matches("r.x:5000", ("r.x",))
    assert not matches("r.x:5000", ("r.x:5001",))
    assert not matches("rr.x", ("r.x",))


def test_proxies(monkeypatch):
    assert proxy_for("https://r.x/v2/") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://u:p@proxy:3128")
    monkeypatch.setenv("http_proxy", "other:8080")
    assert proxy_for("https://r.x/v2/") == "http://u:p@proxy:3128"
    assert proxy_for("http://r.x/v2/") == "http://other:8080"
    monkeypatch.setenv("NO_PROXY", "r.x,.internal")
    assert proxy_for("https://r.x/v2/") is None
    assert proxy_for("https://r.x:5000/v2/") is None
    assert proxy_for("https://a.internal/v2/") is None
    assert proxy_for("https://s.x/v2/")


@pytest.mark.parametrize(
    "proxy",
    ["socks5://u:s3cr3t@p:1", "http://[", "http://u:s3cr3t@p:99999", "s3cr3t proxy", "http://"],
)
def test_what_is_no_proxy_is_not_quoted(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InvalidSetting, match="ALL_PROXY") as caught:
        proxy_for("https://r.x/v2/")
    assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://r.x/a?b#c", "r.x"),
        ("https://r.x:5000", "r.x:5000"),
        ("http://u:p@r.x:1/", "r.x:1"),
        ("http://[::1]:5000/x", "[::1]:5000"),
        ("https://[x/", ""),
        ("https://r.x:99999/", ""),
        ("https://r.x:y/", ""),
        ("https://a b/", ""),
        ("https://\u00e9/", ""),
        ("https://", ""),
        ("/path", ""),
        ("", ""),
    ],
)
def test_the_host_of_a_url(url, host):
    assert host_of(url) == host


@given(st.text(max_size=40), st.sampled_from(["", "http://", "https://", "https://u@"]))
def test_any_text_is_taken_for_a_url(text, start):
    host = host_of(start + text)
    assert "@" not in host
    assert host.isascii()


REFERENCE = Reference.parse("r.x/a/b:1")


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (404, b'{"errors":[{"code":"NAME_UNKNOWN"}]}', RegistryNotFound, "no repository a/b"),
        (404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}', RegistryNotFound, "no tag 1 in a/b"),
        (404, b"<html>", RegistryNotFound, "does not have it"),
        (
            403,
            b'{"errors":[{"code":"DENIED","message":"not you"}]}',
            AuthenticationError,
            "not you",
        ),
        (401, b"", AuthenticationError, "denied"),
        (500, b"", RegistryUnreachable, "500"),
        (503, b'{"errors":[{"message":"a\\nb"}]}', RegistryUnreachable, "a b"),
        (418, b"", RegistryProtocolError, "418"),
        (400, b'{"errors":null}', RegistryProtocolError, "400"),
        (400, b'{"errors":[{"code":null}]}', RegistryProtocolError, "400"),
        (400, b"\xff" * 10, RegistryProtocolError, "400"),
    ],
)
def test_what_a_status_means(status, body, kind, says):
    error = error_of(status, body, REFERENCE, "api.r.x")
    assert type(error) is kind
    assert says in str(error)
    assert (error.host, error.image, error.status) == ("api.r.x", "r.x/a/b:1", status)
    assert error.hint


@given(st.integers(400, 599), st.binary(max_size=100))
def test_any_answer_has_a_meaning(status, body):
    text = str(error_of(status, body, REFERENCE, "r.x"))
    assert text.isprintable()


def test_a_long_message_is_cut_and_control_characters_are_not_shown():
    body = b'{"errors":[{"message":"' + b"x" * 5000 + b'"}]}'
    assert len(str(error_of(400, body, REFERENCE, "r.x"))) < 400
    body = b'{"errors":[{"message":"\\u001b[31mred"}]}'
    assert "\x1b" not in str(error_of(400, body, REFERENCE, "r.x"))
