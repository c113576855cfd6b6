"""Challenges, tokens and credentials, without a registry."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serpentine.errors import AuthenticationError, InvalidSetting, RegistryProtocolError
from serpentine.registry.auth import Authenticator, Challenge, choose_challenge, parse_challenges
from serpentine.registry.credentials import Credential, CredentialStore, _from_entry


class TestChallenges:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (['Basic realm="x"'], [Challenge("basic", {"realm": "x"})]),
            (["Basic"], [Challenge("basic", {})]),
            (
                ['Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"'],
                [
                    Challenge(
                        "bearer",
                        {"realm": "https://a/t", "service": "s", "scope": "repository:a:pull,push"},
                    )
                ],
            ),
            (
                ['BEARER Realm="r" , Service=s'],
                [Challenge("bearer", {"realm": "r", "service": "s"})],
            ),
            (
                ['Basic realm="a", Bearer realm="b",service="c"'],
                [
                    Challenge("basic", {"realm": "a"}),
                    Challenge("bearer", {"realm": "b", "service": "c"}),
                ],
            ),
            (
                ['Basic realm="a"', 'Bearer realm="b"'],
                [Challenge("basic", {"realm": "a"}), Challenge("bearer", {"realm": "b"})],
            ),
            ([r'Basic realm="a \"b\" c"'], [Challenge("basic", {"realm": 'a "b" c'})]),
            (
                ["Negotiate, Basic realm=x"],
                [Challenge("negotiate", {}), Challenge("basic", {"realm": "x"})],
            ),
            (
                ['Bearer realm="r",error="invalid_token"'],
                [Challenge("bearer", {"realm": "r", "error": "invalid_token"})],
            ),
            ([""], []),
            ([], []),
        ],
    )  # fmt: skip
    def test_forms(self, values, expected):
        assert parse_challenges(values) == expected

    @given(st.lists(st.text(max_size=60), max_size=3))
    def test_any_text_is_read_without_an_exception(self, values):
        choose_challenge(parse_challenges(values))

    @given(st.text(alphabet='Basic earlm="\\, x\t', max_size=60))
    def test_almost_challenges_too(self, value):
        choose_challenge(parse_challenges([value]))

    def test_bearer_before_basic_and_never_without_a_realm(self):
        both = parse_challenges(['Basic realm="a", Bearer realm="b"'])
        assert choose_challenge(both).scheme == "bearer"
        assert choose_challenge(parse_challenges(["Bearer", "Basic"])).scheme == "basic"
        assert choose_challenge(parse_challenges(["Negotiate", "Bearer"])) is None


class Sender:
    """Plays the token server."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def __call__(self, method, url, *, params=None, data=None, authorization=None):
        self.asked.append((method, url, params, data, authorization))
        await asyncio.sleep(0)
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return status, json.dumps(body).encode() if isinstance(body, dict) else body


class Store(CredentialStore):
    def __init__(self, credential=None):
        super().__init__([], {})
        self.credential = credential

    async def find(self, registry, repository):
        return self.credential


BEARER = ['Bearer realm="https://auth.x/token",service="s",scope="repository:a/b:pull"']


def ask(authenticator, send, *, refused=None, values=BEARER, plain=False):
    return authenticator.answer(
        send,
        host="r.x",
        registry="r.x",
        repository="a/b",
        image="r.x/a/b:1",
        values=values,
        refused=refused,
        plain=plain,
    )


class TestAuthenticator:
    async def test_a_token_is_kept_for_its_life(self):
        now = 0.0
        authenticator = Authenticator(Store(), clock=lambda: now)
        send = Sender((200, {"token": "t1", "expires_in": 300}))
        assert await ask(authenticator, send) == "Bearer t1"
        assert authenticator.known_header("r.x", "a/b") == "Bearer t1"
        now = 294.0
        assert authenticator.known_header("r.x", "a/b") == "Bearer t1"
        now = 296.0
        assert authenticator.known_header("r.x", "a/b") is None

    async def test_without_a_life_it_is_a_minute(self):
        now = 0.0
        authenticator = Authenticator(Store(), clock=lambda: now)
        await ask(authenticator, Sender((200, {"access_token": "t"})))
        now = 54.0
        assert authenticator.known_header("r.x", "a/b")
        now = 56.0
        assert authenticator.known_header("r.x", "a/b") is None

    async def test_scopes_are_ours_and_the_challenges(self):
        send = Sender((200, {"token": "t"}))
        more = ['Bearer realm="https://auth.x/t",scope="repository:a/b:pull repository:c:pull"']
        await ask(Authenticator(Store()), send, values=more)
        assert send.asked[0][2] == [
            ("scope", "repository:a/b:pull"),
            ("scope", "repository:c:pull"),
        ]

    async def test_one_request_however_many_wait(self):
        authenticator = Authenticator(Store())
        send = Sender((200, {"token": "t"}))
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(ask(authenticator, send))
        assert len(send.asked) == 1

    async def test_a_refused_token_is_thrown_away(self):
        authenticator = Authenticator(Store())
        send = Sender((200, {"token": "t1"}), (200, {"token": "t2"}))
        first = await ask(authenticator, send)
        assert await ask(authenticator, send, refused=first) == "Bearer t2"

    async def test_basic_once(self):
        authenticator = Authenticator(Store(Credential("u", "p", source="f")))
        values = ['Basic realm="x"']
        header = await ask(authenticator, Sender((500, b"")), values=values)
        assert header == "Basic " + base64.b64encode(b"u:p").decode()
        with pytest.raises(AuthenticationError, match="refused the credentials"):
            await ask(authenticator, Sender((500, b"")), values=values, refused=header)

    async def test_no_way_in_that_we_know(self):
        with pytest.raises(AuthenticationError, match="do not know"):
            await ask(Authenticator(Store()), Sender((200, b"")), values=["Negotiate"])

    async def test_a_token_server_without_tls_gets_nothing(self):
        values = ['Bearer realm="http://auth.x/token"']
        send = Sender((200, {"token": "t"}))
        secret = Store(Credential("u", "s3cr3t", source="f"))
        with pytest.raises(RegistryProtocolError, match="without TLS"):
            await ask(Authenticator(secret), send, values=values)
        assert send.asked == []
        assert await ask(Authenticator(secret), send, values=values, plain=True) == "Bearer t"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            {"token": None},
            b"[]",
            {},
            {"token": ""},
            {"token": "a\nb"},
            {"token": 3},
        ],
    )
    async def test_what_is_no_token(self, body):
        with pytest.raises(RegistryProtocolError, match="no token"):
            await ask(Authenticator(Store()), Sender((200, body)))

    async def test_members_that_are_null(self):
        send = Sender((200, {"token": None, "access_token": "t", "expires_in": None}))
        assert await ask(Authenticator(Store()), send) == "Bearer t"

    @pytest.mark.parametrize("realm", ["", "https://[x", "https://", "ftp://u:s3cr3t@x", "/token"])
    async def test_a_realm_that_is_no_address(self, realm):
        send = Sender((200, {"token": "t"}))
        with pytest.raises(RegistryProtocolError, match="no address") as caught:
            await ask(Authenticator(Store()), send, values=[f'Bearer realm="{realm}"'], plain=True)
        assert send.asked == []
        assert "s3cr3t" not in str(caught.value)

    async def test_a_realms_user_is_not_told(self):
        with pytest.raises(RegistryProtocolError, match=r"without TLS \(auth\.x\)"):
            await ask(
                Authenticator(Store()),
                Sender((200, {"token": "t"})),
                values=['Bearer realm="http://u:s3cr3t@auth.x/token"'],
            )

    async def test_a_leader_that_gives_up_hands_over(self):
        """Cancelling the one that fetches the token does not cost the others theirs."""
        authenticator = Authenticator(Store())
        first = asyncio.Event()

        async def stuck(*_, **__):
            first.set()
            await asyncio.Event().wait()

        send = Sender((200, {"token": "t"}))
        async with asyncio.TaskGroup() as group:
            leader = group.create_task(ask(authenticator, stuck))
            await first.wait()
            follower = group.create_task(ask(authenticator, send))
            leader.cancel()
        assert follower.result() == "Bearer t"
        assert len(send.asked) == 1

    async def test_a_failure_is_not_kept(self):
        authenticator = Authenticator(Store())
        send = Sender((401, b""), (200, {"token": "t"}))
        with pytest.raises(AuthenticationError):
            await ask(authenticator, send)
        assert await ask(authenticator, send) == "Bearer t"

    async def test_an_identity_token_is_exchanged_by_post(self):
        send = Sender((200, {"access_token": "t"}))
        store = Store(Credential(identity_token="it", source="f"))
        assert await ask(Authenticator(store), send) == "Bearer t"
        ((method, url, params, data, authorization),) = send.asked
        assert (method, url, params, authorization) == ("POST", "https://auth.x/token", None, None)
        assert data == {
            "client_id": "serpentine",
            "service": "s",
            "scope": "repository:a/b:pull",
            "grant_type": "refresh_token",
            "refresh_token": "it",
        }

    @pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 405, 500])
    @pytest.mark.parametrize("how", ["password", "identity_token"])
    async def test_no_secret_in_any_error(self, status, how):
        """Whatever the token server answers, to whatever kind of credential."""
        store = Store(Credential("u", source="f", **{how: "s3cr3t"}))
        with pytest.raises((AuthenticationError, RegistryProtocolError)) as caught:
            await ask(Authenticator(store), Sender((status, {})))
        assert "s3cr3t" not in f"{caught.value} {caught.value!r} {caught.value.hint}"

    async def test_a_token_server_that_fails(self):
        with pytest.raises(RegistryProtocolError, match="503"):
            await ask(Authenticator(Store()), Sender((503, b"")))


class TestCredentials:
    @pytest.fixture
    def store(self, tmp_path):
        def make(config=None, *, auth=None, registry_auth=None, path="") -> CredentialStore:
            environ = {
                "HOME": str(tmp_path),
                "XDG_CONFIG_HOME": str(tmp_path / "config"),
                "PATH": f"{tmp_path}:{path}",
            }
            if config is not None:
                folder = tmp_path / ".docker"
                folder.mkdir(exist_ok=True)
                text = config if isinstance(config, str) else json.dumps(config)
                (folder / "config.json").write_text(text)
            if auth is not None:
                folder = tmp_path / "config/containers"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "auth.json").write_text(json.dumps(auth))
            if registry_auth is not None:
                (tmp_path / "named.json").write_text(json.dumps(registry_auth))
                environ["REGISTRY_AUTH_FILE"] = str(tmp_path / "named.json")
            return CredentialStore.from_environment(environ)

        return make

    @staticmethod
    def entry(user="u", password="p") -> dict[str, str]:
        return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}

    async def test_none_anywhere(self, store):
        assert await store().find("r.x", "a") is None
        assert await store({}).find("r.x", "a") is None

    @pytest.mark.parametrize(
        "key", ["r.x", "https://r.x", "http://r.x/", "https://r.x/v1/", "r.x/v2"]
    )
    async def test_keys_in_each_form(self, store, key):
        found = await store({"auths": {key: self.entry()}}).find("r.x", "a")
        assert (found.username, found.password) == ("u", "p")

    @pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io"])
    async def test_docker_hub_has_many_names(self, store, key):
        assert await store({"auths": {key: self.entry()}}).find("docker.io", "library/a")

    async def test_namespaces_of_docker_hub(self, store):
        made = store(auth={"auths": {
            "https://index.docker.io/v1/": self.entry("hub"),
            "docker.io/team": self.entry("team"),
            "docker.io/team/a": self.entry("a"),
        }})  # fmt: skip
        for repository, user in (("team/a", "a"), ("team/b", "team"), ("library/a", "hub")):
            assert (await made.find("docker.io", repository)).username == user

    async def test_a_host_with_a_port(self, store):
        made = store({"auths": {"https://r.x:5000/v1/": self.entry(), "[::1]:5000": self.entry()}})
        assert await made.find("r.x:5000", "a")
        assert await made.find("[::1]:5000", "a")
        assert await made.find("r.x", "a") is None

    async def test_another_host_is_another_host(self, store):
        made = store({"auths": {"r.x": self.entry()}})
        for other in ("x", "r.x:5000", "rr.x", "docker.io"):
            assert await made.find(other, "a") is None

    async def test_the_most_specific_first(self, store):
        made = store(auth={"auths": {
            "r.x": self.entry("host"),
            "r.x/a": self.entry("a"),
            "r.x/a/b": self.entry("ab"),
        }})  # fmt: skip
        for repository, user in (("a/b", "ab"), ("a/c", "a"), ("d", "host"), ("ab", "host")):
            assert (await made.find("r.x", repository)).username == user

    async def test_the_order_of_the_files(self, store):
        all_three = {
            "config": {"auths": {"r.x": self.entry("docker"), "s.x": self.entry("docker")}},
            "auth": {"auths": {n: self.entry("podman") for n in ("r.x", "s.x", "t.x")}},
            "registry_auth": {"auths": {"r.x": self.entry("named")}},
        }
        made = store(all_three["config"], auth=all_three["auth"],
                     registry_auth=all_three["registry_auth"])  # fmt: skip
        users = [(await made.find(n, "a")).username for n in ("r.x", "s.x", "t.x")]
        assert users == ["named", "docker", "podman"]

    async def test_tokens_and_plain_members(self, store):
        made = store({"auths": {
            "i.x": {"identitytoken": "it"},
            "r.x": {"registrytoken": "rt"},
            "p.x": {"username": "u", "password": "p"},
            "e.x": {},
            "n.x": None,
        }})  # fmt: skip
        assert (await made.find("i.x", "a")).identity_token == "it"
        assert (await made.find("r.x", "a")).registry_token == "rt"
        assert (await made.find("p.x", "a")).password == "p"
        assert await made.find("e.x", "a") is None
        assert await made.find("n.x", "a") is None

    @staticmethod
    def helper(folder, name: str, script: str) -> None:
        path = folder / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    async def test_helpers(self, store, tmp_path):
        script = 'read host; echo "{\\"Username\\":\\"$1 $host\\",\\"Secret\\":\\"s\\"}"'
        self.helper(tmp_path, "fake", script)
        made = store({"credHelpers": {"r.x": "fake"}}, path="/usr/bin:/bin")
        found = await made.find("r.x", "a")
        assert (found.username, found.password) == ("get r.x", "s")
        assert found.source == "docker-credential-fake"
        assert await made.find("s.x", "a") is None
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        assert (await made.find("docker.io", "a")).username == "get https://index.docker.io/v1/"

    async def test_a_helper_of_the_host_before_all_else_and_the_store_last(self, store, tmp_path):
        for name in ("host", "store"):
            answer = json.dumps({"Username": name, "Secret": "s"})
            self.helper(tmp_path, name, f"echo '{answer}'")
        made = store({
            "credHelpers": {"r.x": "host", "e.x": ""},
            "credsStore": "store",
            "auths": {"r.x": self.entry("file"), "s.x": self.entry("file"), "e.x": {}},
        }, path="/usr/bin:/bin")  # fmt: skip
        users = [(await made.find(n, "a")).username for n in ("r.x", "s.x", "t.x", "e.x")]
        assert users == ["host", "file", "store", "store"]

    async def test_a_helper_is_asked_once(self, store, tmp_path):
        answer = '{"Username":"u","Secret":"s"}'
        self.helper(tmp_path, "fake", f"echo asked >> {tmp_path}/log; echo '{answer}'")
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        for _ in range(3):
            await made.find("r.x", "a")
        assert (tmp_path / "log").read_text() == "asked\n"

    async def test_a_helper_that_does_not_answer(self, store, tmp_path, monkeypatch):
        monkeypatch.setattr("serpentine.registry.credentials.HELPER_TIMEOUT", 0.05)
        self.helper(tmp_path, "fake", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        with pytest.raises(AuthenticationError, match="did not answer"):
            await made.find("r.x", "a")
        pid = tmp_path / "pid"
        assert not pid.exists() or not Path(f"/proc/{pid.read_text().strip()}").exists()

    async def test_a_helper_that_is_no_program(self, store, tmp_path):
        path = tmp_path / "docker-credential-fake"
        path.write_bytes(b"\x7fELF, but not really")
        path.chmod(0o755)
        with pytest.raises(AuthenticationError, match="docker-credential-fake, which does not"):
            await store({"credsStore": "fake"}).find("r.x", "a")

    async def test_a_helper_with_an_empty_secret(self, store, tmp_path):
        self.helper(tmp_path, "fake", 'echo \'{"Username":"<token>","Secret":""}\'')
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        assert await made.find("r.x", "a") is None

    async def test_a_helper_with_an_identity_token(self, store, tmp_path):
        self.helper(tmp_path, "fake", 'echo \'{"Username":"<token>","Secret":"it"}\'')
        found = await store({"credsStore": "fake"}, path="/usr/bin:/bin").find("r.x", "a")
        assert (found.username, found.identity_token) == ("", "it")

    async def test_a_helper_that_has_none(self, store, tmp_path):
        self.helper(tmp_path, "fake", "echo credentials not found in native keychain; exit 1")
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        assert await made.find("r.x", "a") is None

    @pytest.mark.parametrize(
        "script",
        [
            "echo s3cr3t >&2; exit 3",
            "echo s3cr3t",
            "echo '[\"s3cr3t\"]'",
            "true",
            'echo \'{"Username":null,"Secret":"s3cr3t"}\'',
            'echo \'{"Username":"u","Secret":3}\'',
        ],
    )
    async def test_a_helper_that_fails(self, store, tmp_path, script):
        self.helper(tmp_path, "fake", script)
        made = store({"credsStore": "fake"}, path="/usr/bin:/bin")
        with pytest.raises(AuthenticationError, match="docker-credential-fake") as caught:
            await made.find("r.x", "a")
        assert "s3cr3t" not in str(caught.value)

    async def test_a_helper_that_is_missing(self, store):
        with pytest.raises(AuthenticationError, match="docker-credential-none"):
            await store({"credsStore": "none"}).find("r.x", "a")
        with pytest.raises(InvalidSetting, match="cannot be one"):
            await store({"credsStore": "../../evil"}).find("r.x", "a")

    @pytest.mark.parametrize(
        "text",
        [
            '{"auths": s3cr3t',
            '{"auths":{"r.x":{"auth":"s3cr3t"}}}',
            '{"auths":{"r.x":{"auth":"s3cr3t\u00e9"}}}',
            '{"auths":{"r.x":{"auth":"czNjcjN0"}}}',  # s3cr3t: no colon, so no user either
            '{"auths":{"r.x":{"auth":"/////w=="}}}',
            '{"s3cr3t": ' + "1" * 5000 + "}",
            '{"s3cr3t":' * 100_000,
        ],
        ids=["json", "base64", "ascii", "colon", "utf-8", "number", "depth"],
    )
    async def test_a_broken_file_is_named_and_not_quoted(self, store, tmp_path, text):
        with pytest.raises(InvalidSetting) as caught:
            await store(text).find("r.x", "a")
        assert str(tmp_path) in str(caught.value)
        assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"

    @pytest.mark.parametrize("text", ["[]", "3", '{"auths":[]}', '{"credHelpers":{"r.x":3}}', ""])
    async def test_an_odd_file_is_an_empty_one(self, store, text):
        assert await store(text).find("r.x", "a") is None

    async def test_a_named_file_must_be_there(self, tmp_path):
        environ = {"HOME": "/x", "REGISTRY_AUTH_FILE": str(tmp_path / "none")}
        with pytest.raises(InvalidSetting, match="does not exist"):
            await CredentialStore.from_environment(environ).find("r.x", "a")

    async def test_a_file_that_is_none(self, store, tmp_path):
        made = store({})
        (tmp_path / ".docker/config.json").unlink()
        (tmp_path / ".docker/config.json").mkdir()
        with pytest.raises(InvalidSetting, match=r"\.docker/config\.json"):
            await made.find("r.x", "a")

    @given(
        st.dictionaries(
            st.sampled_from(["auth", "username", "password", "identitytoken", "registrytoken"]),
            st.none() | st.integers() | st.text() | st.lists(st.text()),
        )
    )
    def test_any_entry_is_read_or_refused(self, entry):
        try:
            credential = _from_entry(entry, "f")
        except InvalidSetting:
            assert entry["auth"]
        else:
            assert credential is None or isinstance(credential, Credential)

    def test_no_secret_in_repr(self):
        text = repr(Credential("u", "s3cr3t", "s3cr3t", "s3cr3t", "f"))
        assert "s3cr3t" not in text
        assert "u" in text
