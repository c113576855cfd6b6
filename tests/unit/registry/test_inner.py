"""A registry on the internet cannot send us to addresses within our own network."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import RegistryNotFound, RegistryProtocolError
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from serpentine.model.reference import Reference
from serpentine.registry import CredentialStore, RegistryClient
from serpentine.registry import transport as transport_module
from serpentine.registry.hosts import address_kind, host_of, inner_kind, may_lead
from tests.support.fake_registry import Answer, FakeRegistry
from tests.support.faulty import Fault, FaultyRegistry, Where
from tests.support.images import image

DATA = b"some bytes" * 100
BLOB = Descriptor(media_type="x", digest=Digest.of(DATA), size=len(DATA))


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("localhost", "loopback"),
        ("localhost:5000", "loopback"),
        ("LOCALHOST.", "loopback"),
        ("a.localhost", "loopback"),
        ("127.0.0.1:80", "loopback"),
        ("127.255.255.254", "loopback"),
        ("127.0.0.1.", "loopback"),
        ("[::1]:5000", "loopback"),
        ("[::ffff:127.0.0.1]", "loopback"),
        ("[::7f00:1]", "loopback"),
        # What the C library takes for an address, and so would a connection.
        ("127.1", "loopback"),
        ("2130706433", "loopback"),
        ("0x7f000001:80", "loopback"),
        ("0177.0.0.1", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1:8443", "private"),
        ("100.64.0.1", "private"),
        ("198.18.0.1", "private"),
        ("255.255.255.255", "private"),
        ("[fd00::1]", "private"),
        ("[fec0::1]", "private"),
        ("[64:ff9b::a00:1]", "private"),
        ("[2002:a00:1::]", "private"),
        ("10.1", "private"),
        ("169.254.169.254", "link-local"),
        ("0xa9fea9fe", "link-local"),
        ("[fe80::1]", "link-local"),
        ("[fe80::1%25eth0]", "link-local"),
        ("[::ffff:169.254.169.254]:80", "link-local"),
        ("0.0.0.0", "unspecified"),
        ("0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("[::]:443", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("[ff02::1]", "multicast"),
        ("registry.example", ""),
        ("localhost.example", ""),
        ("127.0.0.1.example", ""),
        ("8.8.8.8:443", ""),
        ("172.32.0.1", ""),
        ("134744072", ""),
        ("[2606:4700::1111]", ""),
        ("[64:ff9b::808:808]", ""),
        ("fee", ""),
        ("", ""),
    ],
)
def test_the_kind_of_a_host(host, kind):
    assert inner_kind(host) == kind


@given(st.text(max_size=30) | st.text("0123456789.:abcdefx[]%", max_size=12))
def test_any_text_has_a_kind(text):
    """Of a host, that is one of a URL that came as a redirect."""
    kinds = {"", "loopback", "private", "link-local", "unspecified", "multicast"}
    assert {address_kind(text), inner_kind(host_of(f"http://{text}/"))} <= kinds


@given(st.ip_addresses(v=4))
def test_an_address_is_the_same_in_all_its_forms(address):
    kind = address_kind(str(address))
    assert inner_kind(str(int(address))) == kind
    assert inner_kind(hex(int(address))) == kind
    assert address_kind(f"::ffff:{address}") == kind
    assert address_kind(f"64:ff9b::{address}") == kind
    assert (kind == "") <= address.is_global


def test_who_may_lead_where():
    inner = ("loopback", "private", "link-local", "unspecified", "multicast")
    assert all(may_lead(source, "") for source in ("", *inner))
    assert not any(may_lead("", target) for target in inner)
    for source in ("loopback", "private"):
        assert [target for target in inner if may_lead(source, target)] == ["loopback", "private"]
    assert may_lead("link-local", "link-local")


@pytest.fixture
def fake():
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def other():
    with FakeRegistry() as registry:
        registry.blobs[str(BLOB.digest)] = DATA
        yield registry


@pytest.fixture
def on_the_internet(monkeypatch, fake):
    """The fake registry's address is taken for a public one."""
    monkeypatch.setattr(
        transport_module,
        "inner_kind",
        lambda host: "" if host == fake.address else inner_kind(host),
    )


@pytest.fixture
def names(monkeypatch):
    """What names stand for."""
    known: dict[str, list[str]] = {}

    class Resolver:
        async def resolve(self, host, port=0, family=socket.AF_INET):
            return [
                {
                    "hostname": host,
                    "host": address,
                    "port": port,
                    "family": socket.AF_INET,
                    "proto": 0,
                    "flags": 0,
                }
                for address in known[host]
            ]

        async def close(self):
            pass

    monkeypatch.setattr(transport_module.aiohttp, "DefaultResolver", Resolver)
    return known


def client(*insecure: str) -> RegistryClient:
    return RegistryClient(credentials=CredentialStore([], {}), insecure=insecure)


async def read(opened: RegistryClient, reference: str, blob: Descriptor = BLOB) -> bytes:
    async with opened.repository(Reference.parse(reference)).open_blob(blob) as body:
        return b"".join([part async for part in body])


def port_of(registry: FakeRegistry) -> str:
    return registry.address.rpartition(":")[2]


class TestRedirects:
    @pytest.mark.parametrize(
        "target",
        [
            "127.0.0.1:9",
            "localhost",
            "10.0.0.1",
            "[fd00::1]:80",
            "169.254.169.254",
            "0.0.0.0:9",
            "2130706433:9",
            "user@127.1:9",
            "[::ffff:10.0.0.1]",
            "224.0.0.1",
        ],
    )
    async def test_a_public_registry_to_an_inner_address(self, fake, on_the_internet, target):
        fake.on("GET", Answer(307, headers={"Location": f"http://{target}/x?sig=s3cr3t"}))
        async with client() as opened:
            with pytest.raises(RegistryProtocolError, match="within a network") as caught:
                await read(opened, f"{fake.address}/a")
        assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"
        assert len(fake.seen) == 1

    async def test_one_within_the_network_to_a_neighbour(self, fake, other):
        fake.on("GET", lambda s: Answer(307, headers={"Location": f"{other.url}{s.path}"}))
        async with client() as opened:
            assert await read(opened, f"{fake.address}/a") == DATA

    async def test_never_to_the_machines_own_credentials(self):
        """Link-local is where clouds have them; not even from a registry on loopback."""
        with FaultyRegistry(faults=[Fault("redirect-private", Where("blob"))]) as faulty:
            faulty.add(image([]), "a", "1")
            faulty.add_blob(DATA, "a")
            async with client() as opened:
                with pytest.raises(RegistryProtocolError, match=r"169\.254\.169\.254, an address"):
                    await read(opened, f"{faulty.address}/a")
                assert await read(opened, f"{faulty.address}/a") == DATA

    async def test_where_the_user_said_so(self, fake, other, on_the_internet):
        fake.on("GET", lambda s: Answer(307, headers={"Location": f"{other.url}{s.path}"}))
        async with client() as opened:
            with pytest.raises(RegistryProtocolError, match="within a network"):
                await read(opened, f"{fake.address}/a")
        assert other.seen == []
        for insecure in (other.address, fake.address):
            async with client(insecure) as opened:
                opened.transport._schemes[fake.address] = "http"
                assert await read(opened, f"{fake.address}/a") == DATA

    async def test_to_itself(self, fake, on_the_internet):
        fake.blobs[str(BLOB.digest)] = DATA
        fake.on("GET /v2", lambda s: Answer(307, headers={"Location": f"/blobs/{BLOB.digest}"}))
        async with client() as opened:
            assert await read(opened, f"{fake.address}/a") == DATA
        assert len({seen.client for seen in fake.seen}) == 1

    async def test_after_a_public_host(self, fake, on_the_internet):
        """The second hop is looked at like the first."""
        fake.on("GET /v2", Answer(307, headers={"Location": "/elsewhere"}))
        fake.on("GET /elsewhere", Answer(307, headers={"Location": "http://10.0.0.1/"}))
        async with client() as opened:
            with pytest.raises(RegistryProtocolError, match=r"10\.0\.0\.1, an address within"):
                await read(opened, f"{fake.address}/a")

    async def test_a_foreign_layers_place_is_the_registrys_word_too(self, fake, on_the_internet):
        foreign = Descriptor(
            media_type="x", digest=BLOB.digest, size=BLOB.size, urls=["https://127.0.0.1:9/x"]
        )
        async with client() as opened:
            with pytest.raises(RegistryNotFound):
                await read(opened, f"{fake.address}/a", foreign)


class TestNames:
    @pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"]])
    async def test_one_that_stands_for_an_inner_address(
        self, fake, other, on_the_internet, names, addresses
    ):
        names["cdn.example"] = addresses
        target = f"http://cdn.example:{port_of(other)}"
        fake.on("GET", lambda s: Answer(307, headers={"Location": f"{target}{s.path}?s3cr3t"}))
        async with client() as opened:
            with pytest.raises(RegistryProtocolError, match=r"sends us to cdn\.example") as caught:
                await read(opened, f"{fake.address}/a")
        assert "--insecure-registry" in caught.value.hint
        assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"
        assert other.seen == []

    async def test_also_where_that_host_has_been_reached_before(
        self, fake, other, on_the_internet, names
    ):
        """By its own name, it may be a registry within the network: no connection is shared."""
        host = f"cdn.example:{port_of(other)}"
        names["cdn.example"] = ["127.0.0.1"]
        fake.on("GET", lambda s: Answer(307, headers={"Location": f"http://{host}{s.path}"}))
        async with client() as opened:
            opened.transport._schemes[host] = "http"
            assert await read(opened, f"{host}/a") == DATA
            with pytest.raises(RegistryProtocolError, match="within a network"):
                await read(opened, f"{fake.address}/a")
        assert len(other.seen) == 1

    async def test_a_registry_whose_name_stands_for_one_has_neighbours(self, fake, other, names):
        names |= {"registry.example": ["127.0.0.1"], "store.example": ["127.0.0.1"]}
        host = f"registry.example:{port_of(fake)}"
        for target in ("store.example", "127.0.0.1"):
            where = f"http://{target}:{port_of(other)}"
            fake.on("GET", lambda s, w=where: Answer(307, headers={"Location": f"{w}{s.path}"}))
            async with client() as opened:
                opened.transport._schemes[host] = "http"
                assert await read(opened, f"{host}/a") == DATA

    async def test_a_proxy_looks_names_up_itself(self, fake, other, on_the_internet, monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", other.url)
        target = f"http://cdn.example/x/blobs/{BLOB.digest}"
        fake.on("GET", Answer(307, headers={"Location": target}))
        other.on("GET", Answer(body=DATA))
        async with client() as opened:
            assert await read(opened, f"{fake.address}/a") == DATA
        assert [seen.path for seen in other.seen] == [target]
