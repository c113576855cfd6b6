"""Settings: what wins over what, and what is refused."""

from pathlib import Path

import pytest

from serpentine.errors import InvalidSetting
from serpentine.settings import VARIABLES, Settings, hosts_folders, load


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> dict[str, str]:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return {"SERPENTINE_CONFIG": str(path)}

    return write


def test_defaults_without_anything(tmp_path):
    settings = load({}, {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)})
    assert settings.namespace == "serpentine"
    assert settings.address is None
    assert settings.insecure_registries == ()
    assert settings == Settings()


def test_flag_over_environment_over_file_over_default(config):
    environ = config('namespace = "file"\nsnapshotter = "file"\naddress = "/file"')
    environ |= {"CONTAINERD_NAMESPACE": "env", "CONTAINERD_SNAPSHOTTER": "env"}
    settings = load({"namespace": "flag", "snapshotter": None, "address": ""}, environ)
    assert settings.namespace == "flag"
    assert settings.snapshotter == "env"
    assert settings.address == "/file"
    assert settings.sources["namespace"] == "argument"
    assert settings.sources["snapshotter"] == "CONTAINERD_SNAPSHOTTER"
    assert settings.sources["address"] == environ["SERPENTINE_CONFIG"]


def test_an_empty_variable_is_not_set(config):
    settings = load({}, {**config('namespace = "file"'), "CONTAINERD_NAMESPACE": ""})
    assert settings.namespace == "file"


def test_insecure_registries_from_each_source(config):
    environ = config('insecure_registries = ["a:5000", "b"]')
    assert load({}, environ).insecure_registries == ("a:5000", "b")
    environ["SERPENTINE_INSECURE_REGISTRIES"] = "c, d:1,"
    assert load({}, environ).insecure_registries == ("c", "d:1")
    assert load({"insecure_registries": ("e",)}, environ).insecure_registries == ("e",)


def test_directories_are_paths(config):
    environ = config('data_dir = "/x/y"')
    assert load({}, environ).data_dir == Path("/x/y")
    assert load({"data_dir": Path("/z")}, environ).data_dir == Path("/z")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("namespace = 3", "namespace"),
        ('namespace = "a b"', "namespace"),
        ('namespace = "../x"', "namespace"),
        ('snapshotter = "-"', "snapshotter"),
        (f'namespace = "{"n" * 77}"', "namespace"),
        ("colour = true", "colour"),
        ('sources = "x"', "sources"),
        ('data_dir = "relative"', "data_dir"),
        ("max_concurrent_downloads = 0", "max_concurrent_downloads"),
        ("max_concurrent_downloads = true", "max_concurrent_downloads"),
        ("max_concurrent_unpacks = 0", "max_concurrent_unpacks"),
        ("max_connections = 65", "max_connections"),
        ('limit_rate = "10 M"', "limit_rate"),
        ('limit_rate = "fast"', "limit_rate"),
        ("limit_rate = 100", "limit_rate"),
        ("stall_timeout = 0", "stall_timeout"),
        ('stall_timeout = "nan"', "stall_timeout"),
        ("mirrors = 1", "mirrors"),
        ('mirrors = {"docker.io" = 1}', "mirrors"),
        ('sync = "perhaps"', "sync"),
        ("insecure_registries = 7", "insecure_registries"),
        ('insecure_registries = ["https://x"]', "insecure_registries"),
        ('insecure_registries = ["user:secret@x"]', "insecure_registries"),
        ("= broken", "TOML"),
    ],
)
def test_a_bad_file_is_refused_and_named(config, text, named):
    environ = config(text)
    with pytest.raises(InvalidSetting) as caught:
        load({}, environ)
    assert named in str(caught.value)
    assert environ["SERPENTINE_CONFIG"] in str(caught.value)
    assert caught.value.hint


def test_a_bad_variable_is_refused_and_named():
    with pytest.raises(InvalidSetting, match="CONTAINERD_NAMESPACE"):
        load({}, {"CONTAINERD_NAMESPACE": "a/b"})


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(InvalidSetting, match="does not exist"):
        load({}, {"SERPENTINE_CONFIG": str(tmp_path / "none.toml")})


def test_each_variable_is_declared_once_and_sets_something_real():
    names = [variable.name for variable in VARIABLES]
    assert len(names) == len(set(names))
    for variable in VARIABLES:
        assert variable.meaning
        assert not variable.setting or hasattr(Settings(), variable.setting)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://mirror.example", "https://mirror.example"),
        ("http://127.0.0.1:8080/a/b//", "http://127.0.0.1:8080/a/b"),
    ],
)
def test_the_releases_url(given, kept):
    assert load({}, {"SERPENTINE_RELEASES_URL": given}).releases_url == kept


@pytest.mark.parametrize(
    "given",
    [
        "mirror.example",
        "ftp://x",
        "https://",
        "https://x?a=1",
        "https://x/#a",
        "https://x y",
        "https://x:port",
        "https://[x",
    ],
)
def test_a_releases_url_that_is_none(given):
    with pytest.raises(InvalidSetting, match="SERPENTINE_RELEASES_URL"):
        load({}, {"SERPENTINE_RELEASES_URL": given})


def test_a_login_in_the_releases_url_is_refused_and_not_shown():
    with pytest.raises(InvalidSetting, match="SERPENTINE_RELEASES_URL") as caught:
        load({}, {"SERPENTINE_RELEASES_URL": "https://user:secret@x"})
    assert "secret" not in str(caught.value) + caught.value.hint


def test_images_and_sums_of_ones_own(tmp_path):
    environ = {
        "SERPENTINE_RELEASES_SUMS": str(tmp_path / "sums"),
        "SERPENTINE_BASE_IMAGE": "mirror.example/base:1",
        "SERPENTINE_ENVOY_IMAGE": "mirror.example/envoy:1",
    }
    settings = load({}, environ)
    assert settings.releases_sums == tmp_path / "sums"
    assert settings.base_image == "mirror.example/base:1"
    assert settings.envoy_image == "mirror.example/envoy:1"
    assert Settings().releases_sums is Settings().base_image is Settings().envoy_image is None


def test_switches_from_each_source(config):
    environ = config("offline = true\nfrozen = false")
    assert (load({}, environ).offline, load({}, environ).frozen) == (True, False)
    environ |= {"SERPENTINE_OFFLINE": "0", "SERPENTINE_FROZEN": "yes"}
    assert (load({}, environ).offline, load({}, environ).frozen) == (False, True)
    # A flag that is not given is None, and does not hide the environment.
    assert load({"offline": None, "frozen": None}, environ).frozen is True
    assert load({"offline": True}, environ).offline is True
    with pytest.raises(InvalidSetting, match=r"offline.*SERPENTINE_OFFLINE"):
        load({}, {"SERPENTINE_OFFLINE": "perhaps"})


def test_the_lock_file_may_be_the_working_directorys():
    assert load({}, {}).lock_file == Path("serpentine.lock")
    assert load({"lock_file": "a/b"}, {}).lock_file == Path("a/b")
    assert load({}, {"SERPENTINE_LOCK_FILE": "~/x"}).lock_file == Path("~/x").expanduser()
    with pytest.raises(InvalidSetting, match="no-such-user"):
        load({"lock_file": "~no-such-user/x"}, {})


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2048", 2048), ("500k", 512_000), ("10M", 10 << 20), ("1.5m", 1_572_864), ("1G", 1 << 30)],
)
def test_rates(text, rate):
    assert load(environ={"SERPENTINE_LIMIT_RATE": text}).limit_rate == rate


def test_mirrors(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[mirrors]\n"docker.io" = "https://one"\n"*" = ["two", "http://three:5000"]\n')
    found = load(environ={"SERPENTINE_CONFIG": str(path)})
    assert found.mirrors == {"docker.io": ("https://one",), "*": ("two", "http://three:5000")}
    hash(found)


def test_where_hosts_are_configured(tmp_path):
    usual = hosts_folders(load(environ={}))
    assert usual[-1] == Path("/etc/containerd/certs.d")
    chosen = load(environ={"SERPENTINE_HOSTS_DIR": str(tmp_path)})
    assert hosts_folders(chosen) == (tmp_path,)
