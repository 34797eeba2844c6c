"""What `mixfleet rq` starts, seen at the moment at which it would become the tool."""

import os
import sys

import pytest
from click.testing import CliRunner, Result

from mixfleet_broker import rq_cli
from mixfleet_broker.rq_cli import TOOLS

SECRET = "redis://:hush@127.0.0.1:6379/0"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the tools that would have been started."""
    lines: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        lines.append(arguments)

    def asked(url: str) -> str:
        assert url.startswith("redis://")
        return url

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(rq_cli, "plain_redis_url", asked)
    monkeypatch.setattr(rq_cli, "find_spec", lambda name: name)
    for name in ("RQ_REDIS_URL", "RQ_DASHBOARD_REDIS_URL", "RQ_KEY_PREFIX"):
        monkeypatch.setenv(name, "of the user")
    return lines


def run(*arguments: str) -> Result:
    return CliRunner().invoke(rq_cli.rq, [*arguments], prog_name="mixfleet rq")


@pytest.mark.parametrize("tool", [tool.name for tool in TOOLS])
def test_the_url_goes_to_the_tool_by_its_environment_alone(
    started: list[list[str]], tool: str
) -> None:
    result = run(tool, "--redis", SECRET)
    assert result.exit_code == 0, result.output
    [line] = started
    assert line[1:] == ["-P", "-m", "mixfleet_broker.rq_tools", tool]
    variable = "RQ_DASHBOARD_REDIS_URL" if tool == "dashboard" else "RQ_REDIS_URL"
    assert os.environ[variable] == SECRET
    assert os.environ["RQ_KEY_PREFIX"] == "rq"  # a prefix of the user's would hide our keys


def test_our_key_prefix_is_rqs_too_where_rq_knows_one(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("info", "--redis", SECRET, "--key-prefix", "{team}:")
    monkeypatch.setattr(rq_cli, "version", lambda _: "3.0.0")
    assert run(*arguments).exit_code == 0
    assert os.environ["RQ_KEY_PREFIX"] == "{team}:rq"
    monkeypatch.setattr(rq_cli, "version", lambda _: "2.12.0")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "install rq 3" in str(result.exception)
    assert len(started) == 1


def test_unknown_options_and_all_behind_two_dashes_go_to_the_tool(
    started: list[list[str]],
) -> None:
    run("info", "--raw", "-Q", "--redis", SECRET, "tiny", "--", "--config", "x", "--help")
    assert started[0][5:] == ["--raw", "-Q", "tiny", "--config", "x", "--help"]


def test_white_space_in_a_url_does_not_make_it_two(started: list[list[str]]) -> None:
    run("dashboard", "--redis", "redis://h/0?client_name=a b")
    assert os.environ["RQ_DASHBOARD_REDIS_URL"] == "redis://h/0?client_name=a%20b"
    assert len(started) == 1


@pytest.mark.parametrize(
    ("tool", "remedy"),
    [
        ("dashboard", "pip install 'mixfleet[rq-tools]'"),
        ("exporter", "in a venv of its own, pip install mixfleet rq-exporter"),
    ],
)
def test_a_tool_that_is_not_installed_is_named_with_its_remedy(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, tool: str, remedy: str
) -> None:
    monkeypatch.setattr(rq_cli, "find_spec", lambda _name: None)
    result = run(tool, "--redis", SECRET)
    assert result.exit_code == 1
    assert remedy in (result.stderr or str(result.exception))
    assert started == []


def test_what_runs_jobs_is_no_command(started: list[list[str]]) -> None:
    for name in ("worker", "worker-pool", "enqueue", "cron"):
        assert run(name).exit_code == 2
    assert started == []
