"""Settings: who wins, what is refused and in which words, and the table that documents them."""

import dataclasses
from pathlib import Path

import pytest

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.settings import (
    SETTINGS,
    Settings,
    default_config_file,
    default_data_dir,
    resolve,
    settings_markdown,
)

DOCS = Path(__file__).parents[3] / "docs" / "settings.md"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """An empty TOML file, so that no test reads the user's own."""
    file = tmp_path / "config.toml"
    file.touch()
    return file


def test_defaults_are_in_force_when_nothing_is_given(config_file: Path) -> None:
    settings = resolve({}, {}, config_file)
    assert settings == Settings()
    assert (settings.max_batch_size, settings.lease_s, settings.queue_limit) == (None, 15.0, 10_000)
    assert settings.redis is None
    assert settings.data_dir == default_data_dir()


def test_a_flag_beats_the_environment_which_beats_toml(config_file: Path) -> None:
    config_file.write_text('max_batch_size = 2\nthreads = 2\nmodel = "from-toml"\n')
    environ = {"MIXFLEET_MAX_BATCH_SIZE": "3", "MIXFLEET_THREADS": "3"}
    settings = resolve({"max_batch_size": "4", "threads": None}, environ, config_file)
    assert (settings.max_batch_size, settings.threads, settings.model) == (4, 3, "from-toml")


def test_an_empty_variable_is_not_set(config_file: Path) -> None:
    assert resolve({}, {"MIXFLEET_MAX_STEP_TOKENS": ""}, config_file).max_step_tokens == 512


def test_auto_leaves_the_batch_size_to_mixfleet_whatever_else_is_set(config_file: Path) -> None:
    environ = {"MIXFLEET_MAX_BATCH_SIZE": "3"}
    assert resolve({"max_batch_size": "auto"}, environ, config_file).max_batch_size is None


@pytest.mark.parametrize(("word", "value"), [("on", True), ("OFF", False), ("0", False)])
def test_a_switch_is_on_or_off(word: str, value: bool, config_file: Path) -> None:
    assert resolve({"prefix_cache": word}, {}, config_file).prefix_cache is value


def test_redis_url_is_honoured_after_our_own_variable_and_before_toml(config_file: Path) -> None:
    config_file.write_text('redis = "redis://toml"\n')
    theirs = {"REDIS_URL": "redis://theirs"}
    ours = theirs | {"MIXFLEET_REDIS": "redis://ours"}
    assert resolve({}, {}, config_file).redis == "redis://toml"
    assert resolve({}, theirs, config_file).redis == "redis://theirs"
    assert resolve({}, ours, config_file).redis == "redis://ours"
    assert resolve({"redis": "redis://flag"}, ours, config_file).redis == "redis://flag"


def test_every_setting_can_be_given_in_every_way(config_file: Path) -> None:
    examples: dict[str, tuple[str, object]] = {
        "redis": ("unix:///r.sock", "unix:///r.sock"),
        "data_dir": ("/data", Path("/data")),
        "log_level": ("WARNING", "warning"),
        "model": ("mixtral-8x7b", "mixtral-8x7b"),
        "key_prefix": ("{team}:", "{team}:"),
        "queue_limit": ("5", 5),
        "queue_token_limit": ("500", 500),
        "tenant": ("team-a", "team-a"),
        "tenant_queue_limit": ("3", 3),
        "tenant_token_limit": ("300", 300),
        "ageing_s": ("30", 30.0),
        "durability": ("replica", "replica"),
        "result_ttl_s": ("60", 60.0),
        "first_token_timeout_s": ("0.5", 0.5),
        "worker_id": ("gpu-1", "gpu-1"),
        "listen": ("0.0.0.0:80", "0.0.0.0:80"),
        "require_key": ("on", True),
        "on_disconnect": ("continue", "continue"),
        "keep_alive_s": ("5", 5.0),
        "response_ttl_s": ("3600", 3600.0),
        "batch_max_bytes": ("4096", 4096),
        "batch_max_lines": ("100", 100),
        "batch_stored_bytes": ("8192", 8192),
        "batch_in_flight": ("4", 4),
        "batch_ttl_s": ("7200", 7200.0),
        "max_body_bytes": ("2048", 2048),
        "max_connections": ("100", 100),
        "cors_origins": ("https://a.example", "https://a.example"),
        "aime_endpoints": ("/etc/endpoints", Path("/etc/endpoints")),
        "vllm_metric_aliases": ("on", True),
        "log_json": ("on", True),
        "model_path": ("/models/m", Path("/models/m")),
        "chat_format": ("aime", "aime"),
        "max_batch_size": ("64", 64),
        "max_step_tokens": ("2048", 2048),
        "context_length": ("8192", 8192),
        "kv_cache_gib": ("1.5", 1.5),
        "prefix_cache": ("off", False),
        "itl_target_s": ("0.05", 0.05),
        "weight_dtype": ("int8", "int8"),
        "kv_dtype": ("fp8", "fp8"),
        "dtype": ("bfloat16", "bfloat16"),
        "device": ("cuda:1", "cuda:1"),
        "backend": ("reference", "reference"),
        "batch_invariant": ("off", False),
        "cuda_graphs": ("off", False),
        "tuning_s": ("2.5", 2.5),
        "threads": ("2", 2),
        "lease_s": ("2.5", 2.5),
        "max_losses": ("1", 1),
        "stall_s": ("10", 10.0),
        "drain_s": ("0", 0.0),
    }
    assert set(examples) == set(SETTINGS), "give the new setting an example"
    for name, (text, value) in examples.items():
        assert getattr(resolve({name: text}, {}, config_file), name) == value
        variable = SETTINGS[name].variable
        assert getattr(resolve({}, {variable: text}, config_file), name) == value
        quoted = f'"{text}"' if isinstance(value, str | Path | bool) else text
        config_file.write_text(f"{name} = {quoted}\n")
        assert getattr(resolve({}, {}, config_file), name) == value
        config_file.write_text("")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_batch_size", "0", "max_batch_size=0: must be at least 1, or auto"),
        ("max_batch_size", "many", "max_batch_size=many: must be a whole number, or auto"),
        ("max_batch_size", "1.5", "max_batch_size=1.5: must be a whole number, or auto"),
        ("max_batch_size", True, "max_batch_size=True: must be a whole number, or auto"),
        ("threads", "many", "threads=many: must be a whole number"),
        ("prefix_cache", "perhaps", "prefix_cache=perhaps: must be on or off"),
        ("prefix_cache", 1, "prefix_cache=1: must be on or off"),
        ("itl_target_s", "0", "itl_target_s=0: must be more than 0"),
        ("weight_dtype", "int2", "weight_dtype=int2: must be one of auto, fp8, int8, int4"),
        ("kv_dtype", "int8", "kv_dtype=int8: must be one of auto, fp8"),
        ("queue_limit", "-1", "queue_limit=-1: must be at least 1"),
        ("lease_s", "soon", "lease_s=soon: must be a number of seconds"),
        ("lease_s", "nan", "lease_s=nan: must be a number of seconds"),
        ("lease_s", "inf", "lease_s=inf: must be a number of seconds"),
        ("lease_s", [1], "lease_s=[1]: must be a number of seconds"),
        ("lease_s", "0.5", "lease_s=0.5: must be at least 1"),
        ("stall_s", "0", "stall_s=0: must be more than 0"),
        ("kv_cache_gib", "0", "kv_cache_gib=0: must be more than 0"),
        ("kv_cache_gib", "1e300", "kv_cache_gib=1e300: must be at most 1073741824"),
        ("dtype", "float8", "dtype=float8: must be one of auto, float32, bfloat16, float16"),
        ("device", "tpu", "device=tpu: must be auto, cpu, cuda or cuda:N"),
        ("model", "a/b", "model=a/b: must be 1 to 64 letters"),
        ("model", 7, "model=7: must be text"),
        ("worker_id", "-x", "worker_id=-x: must be 1 to 64 letters"),
        ("data_dir", "", "data_dir=: must be a path"),
        ("data_dir", "~nobody-of-that-name/x", "must be in a home directory that exists"),
        ("redis", "http://h", "redis=http://h: must start with redis://"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_it_must_be(
    name: str, value: object, message: str, config_file: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({name: value}, {}, config_file)
    assert message in str(caught.value)


def test_an_error_says_which_variable_or_file_the_value_came_from(config_file: Path) -> None:
    with pytest.raises(ConfigError) as from_variable:
        resolve({}, {"MIXFLEET_THREADS": "0"}, config_file)
    assert str(from_variable.value) == "threads=0: must be at least 1 (MIXFLEET_THREADS)"
    config_file.write_text("threads = 0\n")
    with pytest.raises(ConfigError) as from_file:
        resolve({}, {}, config_file)
    assert str(from_file.value) == f"threads=0: must be at least 1 (in {config_file})"


def test_an_error_never_shows_the_password_of_redis(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"redis": "redis://:hunter2@host:70000"}, {}, config_file)
    assert str(caught.value) == "redis=redis://:***@host:70000: must have a port from 1 to 65535"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("MIXFLEET_MAX_BATCH", "MIXFLEET_MAX_BATCH_SIZE"),
        ("MIXFLEET_BATCH_SIZE", "MIXFLEET_MAX_BATCH_SIZE"),
        ("MIXFLEET_REDIS_URL", "MIXFLEET_REDIS"),
        ("MIXFLEET_CONFG", "MIXFLEET_CONFIG"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(
    variable: str, nearest: str, config_file: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {variable: "1"}, config_file)
    assert str(caught.value) == f"{variable}: no such setting; did you mean {nearest}?"


def test_an_unknown_variable_like_none_points_to_the_list(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such setting; docs/settings.md lists them all"):
        resolve({}, {"MIXFLEET_QQQQQQQQQQQQQ": "1"}, config_file)


@pytest.mark.parametrize(
    "variable",
    [
        "MIXFLEET_SERVICE_HOST",
        "MIXFLEET_SERVICE_PORT",
        "MIXFLEET_SERVICE_PORT_HTTP",
        "MIXFLEET_PORT",
        "MIXFLEET_PORT_80_TCP",
        "MIXFLEET_PORT_80_TCP_ADDR",
        "MIXFLEET_REDIS_SERVICE_HOST",
        "MIXFLEET_REDIS_PORT_6379_TCP_PROTO",
    ],
)
def test_variables_that_kubernetes_makes_of_a_service_are_no_settings(
    variable: str, config_file: Path
) -> None:
    assert resolve({}, {variable: "tcp://10.0.0.1:80"}, config_file) == Settings()


def test_an_unknown_toml_key_is_an_error_that_names_the_nearest_and_the_file(
    config_file: Path,
) -> None:
    config_file.write_text("max_batch = 4\n")
    with pytest.raises(ConfigError) as caught:
        resolve({}, {}, config_file)
    expected = f"max_batch: no such setting; did you mean max_batch_size? (in {config_file})"
    assert str(caught.value) == expected


def test_an_unknown_flag_is_an_error() -> None:
    with pytest.raises(ConfigError, match="leases: no such setting; did you mean lease_s"):
        resolve({"leases": "1"}, {}, Path("/dev/null"))


def test_text_that_is_not_toml_is_an_error_that_names_the_file(config_file: Path) -> None:
    config_file.write_text("max_batch_size = = 4\n")
    with pytest.raises(ConfigError, match=f"config={config_file}: "):
        resolve({}, {}, config_file)


def test_a_config_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match="no such file"):
        resolve({}, {}, missing)
    with pytest.raises(ConfigError, match="no such file"):
        resolve({}, {"MIXFLEET_CONFIG": str(missing)})


def test_the_users_own_config_file_is_read_and_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert resolve({}, {}).threads is None
    default_config_file().parent.mkdir(parents=True)
    default_config_file().write_text("threads = 3\n")
    assert resolve({}, {}).threads == 3


def test_mixfleet_config_names_another_config_file(config_file: Path) -> None:
    config_file.write_text("threads = 5\n")
    assert resolve({}, {"MIXFLEET_CONFIG": str(config_file)}).threads == 5


def test_the_environment_of_the_process_is_the_default(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXFLEET_THREADS", "7")
    assert resolve({}, config_file=config_file).threads == 7


def test_a_path_is_made_absolute_and_knows_the_home_directory(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert resolve({"data_dir": "~/d"}, {}, config_file).data_dir == Path("/home/ada/d")
    assert resolve({"data_dir": "d"}, {}, config_file).data_dir == Path.cwd() / "d"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().threads = 2  # type: ignore[misc]


def test_the_table_has_one_row_per_field_with_a_help_text() -> None:
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(Settings)]
    for setting in SETTINGS.values():
        assert setting.help.endswith(".")
        assert setting.default


def test_the_markdown_table_shows_flag_variable_default_and_help() -> None:
    rows = settings_markdown().splitlines()
    assert rows[:2] == ["| flag | variable | default | what it sets |", "|---|---|---|---|"]
    assert len(rows) == 2 + len(SETTINGS)
    assert (
        "| `--max-step-tokens N` | `MIXFLEET_MAX_STEP_TOKENS` | `512` | "
        "Most tokens in one step; a longer prompt goes in chunks. |"
    ) in rows
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.skipif(not DOCS.exists(), reason="docs/settings.md comes with the documentation")
def test_the_documentation_holds_the_table_as_it_is_now() -> None:
    assert settings_markdown() in DOCS.read_text(), (
        "docs/settings.md is out of date: paste the output of "
        "`python -c 'from mixfleet_broker.settings import *; print(settings_markdown())'`"
    )
