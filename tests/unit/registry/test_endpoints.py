"""Where a registry's content may be had: containerd's hosts.toml, and our short form."""

from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import InvalidSetting
from serpentine.registry.endpoints import Endpoint, Endpoints, in_order, parse_hosts

SOURCE = "/certs/example.org/hosts.toml"


def parse(text: str, registry: str = "example.org") -> tuple[Endpoint, ...]:
    return parse_hosts(text.encode(), registry, SOURCE)


def test_mirrors_in_their_order_and_the_registry_last():
    assert parse("""
        [host."https://one.example"]
        [host."http://two.example:5000"]
          capabilities = ["pull"]
        [host."three.example/path"]
    """) == (
        Endpoint("one.example", "https", mirror=True),
        Endpoint("two.example:5000", "http", resolve=False, mirror=True),
        Endpoint("three.example", None, "/path/v2", mirror=True),
        Endpoint("example.org"),
    )


def test_everything_that_a_host_may_say():
    first, _ = parse("""
        server = "https://example.org"
        [host."https://one.example/mirror/v2/example.org"]
          capabilities = ["pull", "resolve", "push"]
          ca = "ca.pem"
          client = [["/a/client.pem", "/a/client.key"], ["both.pem", ""]]
          skip_verify = true
          override_path = true
          dial_timeout = "2s"
          [host."https://one.example/mirror/v2/example.org".header]
            x-one = "1"
            x-two = ["2", "3"]
    """)
    assert first == Endpoint(
        "one.example",
        "https",
        "/mirror/v2/example.org",
        headers={"x-one": "1", "x-two": "2, 3"},
        ca=("/certs/example.org/ca.pem",),
        client=(("/a/client.pem", "/a/client.key"), ("/certs/example.org/both.pem", "")),
        skip_verify=True,
        mirror=True,
    )
    # A header may be a password.
    assert "2, 3" not in repr(first)


def test_another_server():
    (own,) = parse('server = "https://elsewhere.example"\nskip_verify = true')
    assert own == Endpoint("elsewhere.example", "https", skip_verify=True)
    assert own.has_tls
    assert not own.mirror


def test_what_is_at_the_top_counts_without_a_server_too():
    """But for the path and what it may be asked for, as with containerd."""
    mirror, own = parse("""
        capabilities = ["push"]
        override_path = true
        ca = "ca.pem"
        skip_verify = true
        [host."https://one.example"]
    """)
    assert mirror == Endpoint("one.example", "https", mirror=True)
    assert own == Endpoint("example.org", ca=("/certs/example.org/ca.pem",), skip_verify=True)


@pytest.mark.parametrize(
    ("named", "pull", "resolve"), [("", True, True), ('"Pull"', True, False), ('"push"', 0, 0)]
)
def test_capabilities(named, pull, resolve):
    first, _ = parse(f'[host."https://one.example"]\ncapabilities = [{named}]')
    assert (first.pull, first.resolve) == (pull, resolve)


def test_a_registry_that_is_its_own_mirror_is_none():
    first, own = parse('[host."https://registry-1.docker.io"]', "docker.io")
    assert not first.mirror
    assert own.host == "registry-1.docker.io"


@pytest.mark.parametrize(
    "text",
    [
        "host = 1",
        "host = {",
        "server = 1",
        'server = "ftp://x"',
        'server = ""',
        '[host."https://user:s3cr3t@x"]',
        '[host."https://x/?a=b"]',
        '[host."https://x y"]',
        '[host."https://x:99999"]',
        'host."https://x" = 1',
        '[host."https://x"]\ncapabilities = "fly"',
        '[host."https://x"]\ncapabilities = ["fly"]',
        '[host."https://x"]\nskip_verify = "yes"',
        '[host."https://x"]\noverride_path = 1',
        '[host."https://x"]\nca = 1',
        '[host."https://x"]\nca = ["a\\u0000b"]',
        '[host."https://x"]\nclient = [["a", "b", "c"]]',
        '[host."https://x"]\nclient = 1',
        '[host."https://x"]\nheader = 1',
        '[host."https://x".header]\n"a b" = "c"',
        '[host."https://x".header]\na = "c\\r\\nd"',
        '[host."https://x".header]\na = "\\u00e9"',
    ],
)
def test_what_is_none_is_named_with_its_file(text):
    with pytest.raises(InvalidSetting) as caught:
        parse(text)
    assert SOURCE in str(caught.value)
    assert caught.value.hint
    assert "s3cr3t" not in str(caught.value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="replace")))
def test_any_bytes(data):
    with suppress(InvalidSetting):
        assert parse_hosts(data, "example.org", SOURCE)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
)
KEYS = st.sampled_from(
    ["capabilities", "ca", "client", "skip_verify", "header", "override_path", "other"]
)


@given(st.dictionaries(st.text(max_size=12), st.dictionaries(KEYS, VALUES), max_size=3))
def test_any_tables(hosts):
    def write(value):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return str(value % (1 << 62))
        if isinstance(value, list):
            return f"[{', '.join(map(write, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{write(k)} = {write(v)}" for k, v in value.items()) + "}"
        escaped = "".join(
            c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in str(value)
            if not 0xD800 <= ord(c) < 0xE000
        )  # fmt: skip
        return f'"{escaped}"'

    try:
        found = parse(f"host = {write(hosts)}")
    except InvalidSetting:
        return
    assert found[-1] == Endpoint("example.org")


@pytest.mark.parametrize("name", ["example.org:5000", "example.org_5000_", "_default"])
def test_which_folder(tmp_path, name):
    place = tmp_path / "second" / name
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text('[host."https://one.example"]')
    folders = [tmp_path / "first", tmp_path / "second"]
    found = Endpoints(folders).of("example.org:5000")
    assert [one.host for one in found] == ["one.example", "example.org:5000"]
    # The first that says anything counts, alone.
    first = tmp_path / "first" / "_default"
    first.mkdir(parents=True)
    (first / "hosts.toml").write_text('server = "https://else.example"')
    assert [one.host for one in Endpoints(folders).of("example.org:5000")] == ["else.example"]


def test_the_short_form():
    short = {"docker.io": ["mirror.example", "http://10.0.0.1:5000/v2"], "*": ["https://all"]}
    endpoints = Endpoints(mirrors=short)
    assert endpoints.of("docker.io") == (
        Endpoint("mirror.example", mirror=True),
        Endpoint("10.0.0.1:5000", "http", mirror=True),
        Endpoint("registry-1.docker.io"),
    )
    assert [one.host for one in endpoints.of("ghcr.io")] == ["all", "ghcr.io"]
    with pytest.raises(InvalidSetting, match="mirrors: 'a b' is no address"):
        Endpoints(mirrors={"docker.io": ["a b"]}).of("docker.io")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "_default" / "hosts.toml").mkdir(parents=True)
    with pytest.raises(InvalidSetting, match=r"hosts\.toml: is a directory"):
        Endpoints([tmp_path]).of("example.org")


def test_certificates(tmp_path):
    authority = trustme.CA()
    ca, client = tmp_path / "ca.pem", tmp_path / "client.pem"
    authority.cert_pem.write_to_path(str(ca))
    authority.issue_cert("me").private_key_and_cert_chain_pem.write_to_path(str(client))
    endpoint = Endpoint("x", ca=(str(ca),), client=((str(client), ""),))
    assert endpoint.context().verify_mode is ssl.CERT_REQUIRED
    assert len(endpoint.context().get_ca_certs()) > 0
    open_to_all = Endpoint("x", skip_verify=True).context()
    assert open_to_all.verify_mode is ssl.CERT_NONE
    for path, why in ((tmp_path / "none.pem", "no such file"), (tmp_path / "bad.pem", "PEM")):
        if why == "PEM":
            path.write_text("rubbish")
        for bad in (Endpoint("x", ca=(str(path),)), Endpoint("x", client=((str(path), ""),))):
            with pytest.raises(InvalidSetting) as caught:
                bad.context()
            assert str(path) in str(caught.value)
            assert why in str(caught.value)


def test_the_order():
    one, two, own = Endpoint("1", mirror=True), Endpoint("2", mirror=True), Endpoint("own")
    every = [one, two, own]
    assert in_order(every, dead=[], avoid=[]) == every
    assert in_order(every, dead=["1"], avoid=[]) == [two, own, one]
    assert in_order(every, dead=[], avoid=["1"]) == [two, own, one]
    assert in_order(every, dead=["1", "2"], avoid=["own"]) == [own, one, two]
    # The registry itself is never dead.
    assert in_order(every, dead=["own"], avoid=[]) == every
