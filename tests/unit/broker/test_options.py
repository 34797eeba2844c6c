"""Settings as click options: resolved before the command's body, wrong ones refused."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REDIS_URL", raising=False)


@click.command()
@click.argument("word")
@setting_options("max_step_tokens", "redis", "chat_format")
@click.option("--loud", is_flag=True)
def command(settings: Settings, word: str, loud: bool) -> None:
    """A command of the test."""
    click.echo(f"{settings.max_step_tokens} {settings.redis} {settings.lease_s} {word} {loud}")


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(command, arguments)


def test_a_command_gets_settings_beside_its_own_parameters() -> None:
    result = run("hello", "--loud", "--max-step-tokens", "3")
    assert result.output == "3 None 15.0 hello True\n"


def test_a_setting_without_a_flag_here_comes_from_the_environment() -> None:
    result = run("hello", MIXFLEET_LEASE_S="7", MIXFLEET_MAX_STEP_TOKENS="5")
    assert result.output == "5 None 7.0 hello False\n"


def test_a_flag_beats_the_environment() -> None:
    assert run("x", "--max-step-tokens=2", MIXFLEET_MAX_STEP_TOKENS="5").output.startswith("2 ")


def test_a_value_that_cannot_be_used_is_a_usage_error_before_the_body_runs() -> None:
    result = run("hello", "--max-step-tokens", "0")
    assert result.exit_code == 2
    assert result.output.startswith("Usage: command [OPTIONS] WORD")
    assert result.output.endswith("Error: max_step_tokens=0: must be at least 1\n")


def test_an_unknown_variable_is_a_usage_error() -> None:
    result = run("hello", MIXFLEET_LEASES="1")
    assert result.exit_code == 2
    assert "MIXFLEET_LEASES: no such setting; did you mean MIXFLEET_LEASE_S?" in result.output


def test_config_names_the_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("max_step_tokens = 6\n")
    assert run("x", "--config", str(file)).output.startswith("6 ")
    missing = run("x", "--config", str(tmp_path / "none.toml"))
    assert missing.exit_code == 2
    assert "no such file" in missing.output


def test_help_shows_each_flag_in_order_with_variable_and_default() -> None:
    output = " ".join(run("--help").output.split())
    assert (
        "--max-step-tokens N Most tokens in one step; a longer prompt goes in chunks. "
        "[env: MIXFLEET_MAX_STEP_TOKENS; default: 512]"
    ) in output
    assert "default: the server that `mixfleet up` runs]" in output
    flags = ["--max-step-tokens", "--redis", "--chat-format", "--config", "--loud"]
    assert sorted(flags, key=output.index) == flags


def test_a_setting_that_is_not_in_the_table_is_a_mistake_of_the_program() -> None:
    with pytest.raises(KeyError):
        setting_options("max_step")
