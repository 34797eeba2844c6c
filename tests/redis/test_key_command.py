"""`mixfleet key` against a real server."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from redis import Redis

from mixfleet.cli import main
from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.key_records import KeyRecord, KeyTerms
from mixfleet_broker.limits import KeyLimits

Run = Callable[..., Result]


@pytest.fixture
def run(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mixfleet key ...` on the test's server, without the settings of the user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXFLEET_REDIS", redis_url)
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *arguments: runner.invoke(main, ["key", *arguments])


def made(run: Run, *options: str) -> dict[str, Any]:
    """A key that was made, as JSON, with its secret."""
    result = run("create", "--name", "app1", *options, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_create_prints_the_secret_alone_on_stdout_and_once(run: Run, redis: Redis) -> None:
    result = run("create", "--name", "app1", "--rpm", "60")
    assert result.exit_code == 0, result.output
    secret = result.stdout.strip()
    record = ApiKeys(redis).find(secret)
    assert record is not None
    assert record.limits.requests_per_min == 60
    assert f"{record.key_id}: keep this secret" in result.stderr
    for arguments in (("ls",), ("ls", "--json"), ("show", record.key_id)):
        assert secret not in run(*arguments).output


def test_every_option_of_create_is_in_the_key(run: Run, redis: Redis) -> None:
    key = made(
        run, "--rpm", "60", "--tpm", "200000", "--tpd", "1000000", "--parallel", "8",
        "--queued", "16", "--queued-tokens", "50000", "--priority", "interactive",
        "--tenant", "team-a", "--scope", "chat", "--scope", "ops", "--model", "mixtral-8x7b",
        "--expires", "30d",
    )  # fmt: skip
    assert key["limits"] == {
        "requests_per_min": 60,
        "tokens_per_min": 200_000,
        "tokens_per_day": 1_000_000,
        "max_parallel_jobs": 8,
        "max_queued_jobs": 16,
        "max_queued_tokens": 50_000,
    }
    assert (key["name"], key["tenant"], key["priority"]) == ("app1", "team-a", "interactive")
    assert (key["scopes"], key["models"]) == (["chat", "ops"], ["mixtral-8x7b"])
    assert abs(key["expires_at"] - key["created_at"] - 30 * 86_400) < 1
    found = ApiKeys(redis).find(key["secret"])
    assert found is not None
    assert found.key_id == key["key_id"]


def test_a_key_without_options_has_no_limits_and_may_chat(run: Run) -> None:
    key = made(run)
    assert set(key["limits"].values()) == {None}
    assert (key["scopes"], key["models"], key["priority"]) == (["chat"], [], "default")
    assert (key["tenant"], key["expires_at"]) == (key["key_id"], None)


def test_ls_shows_every_key_with_its_state(run: Run) -> None:
    assert run("ls").output == "no API keys: the gateway asks for none\n"
    first, second = made(run, "--rpm", "5"), made(run, "--model", "tiny", "--tenant", "team-a")
    run("revoke", second["key_id"])
    heading, *rows = (line.split() for line in run("ls").output.splitlines())
    assert heading == [
        *("key", "state", "priority", "rpm", "tpm", "tpd", "jobs"),
        *("scopes", "name", "models", "tenant"),
    ]
    numbers = ["5", "-", "-", "-"]
    assert rows[0] == [
        *(first["key_id"], "valid", "default", *numbers, "chat", "app1", "all", "own")
    ]
    assert rows[1][1] == "revoked"
    assert rows[1][-2:] == ["tiny", "team-a"]
    listed = json.loads(run("ls", "--json").output)
    assert [key["key_id"] for key in listed] == [first["key_id"], second["key_id"]]
    assert listed[0] == {name: value for name, value in first.items() if name != "secret"}


def test_show_says_what_a_key_may_do_and_what_is_left(run: Run, redis: Redis) -> None:
    key = made(run, "--tpd", "1000", "--expires", "1h")
    record = ApiKeys(redis).get(key["key_id"])
    KeyLimits(redis).admit(record, ["job1"], 300)
    output = run("show", record.key_id).output
    assert re.search(r"^tokens_day left +700 of 1000 *$", output, re.MULTILINE)
    assert re.search(r"^state +valid *$", output, re.MULTILINE)
    assert re.search(r"^expires_at +\d{4}-\d\d-\d\d \d\d:\d\d UTC *$", output, re.MULTILINE)
    assert json.loads(run("show", record.key_id, "--json").output)["used"][0]["remaining"] == 700


def test_set_changes_what_is_named_and_nothing_else(run: Run, redis: Redis) -> None:
    key = made(run, "--rpm", "5", "--tpm", "10", "--model", "tiny", "--expires", "1h")
    arguments = ("--rpm", "none", "--tpd", "7", "--all-models", "--name", "app2")
    result = run("set", key["key_id"], *arguments, "--expires", "never")
    assert result.exit_code == 0, result.output
    record = ApiKeys(redis).get(key["key_id"])
    limits = record.limits
    assert (limits.requests_per_min, limits.tokens_per_min, limits.tokens_per_day) == (None, 10, 7)
    assert (record.name, record.models, record.expires_at) == ("app2", frozenset(), None)
    assert record.tenant == key["key_id"]
    changed = json.loads(run("set", key["key_id"], "--scope", "ops", "--json").output)
    assert (changed["scopes"], changed["name"]) == (["ops"], "app2")


def test_rotate_prints_a_new_secret_and_the_old_one_has_its_grace(run: Run, redis: Redis) -> None:
    keys, key = ApiKeys(redis), made(run)
    second = run("rotate", key["key_id"], "--grace", "1h").stdout.strip()
    assert keys.find(second) == keys.find(key["secret"]) is not None
    third = json.loads(run("rotate", key["key_id"], "--json").output)["secret"]
    assert [keys.find(secret) is not None for secret in (key["secret"], second, third)] == [
        False,
        False,
        True,
    ]


def test_revoke_ends_keys_and_forget_removes_them(run: Run, redis: Redis) -> None:
    first, second = made(run), made(run)
    result = run("revoke", first["key_id"], second["key_id"])
    assert result.output == f"{first['key_id']}: revoked\n{second['key_id']}: revoked\n"
    assert ApiKeys(redis).find(first["secret"]) is None
    assert len(ApiKeys(redis).all()) == 2
    assert "revoked and forgotten" in run("revoke", first["key_id"], "--forget").output
    assert len(ApiKeys(redis).all()) == 1


def test_a_key_prefix_keeps_keys_apart(run: Run) -> None:
    made(run, "--key-prefix", "team:")
    assert run("ls").output.startswith("no API keys")
    assert "app1" in run("ls", "--key-prefix", "team:").output


@pytest.mark.parametrize("command", ["show", "revoke", "rotate", "set"])
def test_an_unknown_key_is_one_line_that_says_where_to_look(run: Run, command: str) -> None:
    result = run(command, "k_nobody")
    assert result.exit_code == 1
    assert result.stderr == "Error: API key k_nobody is unknown; `mixfleet key ls` lists them\n"


@pytest.mark.parametrize("command", ["rotate", "set"])
def test_a_revoked_key_stays_so(run: Run, command: str) -> None:
    key = made(run)
    run("revoke", key["key_id"])
    result = run(command, key["key_id"])
    assert result.exit_code == 1
    assert "is revoked: make a new one" in result.stderr


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--rpm", "0"), 2, "must be 'none' or a number from 1 to 1000000"),
        (("--tpm", "many"), 2, "must be 'none' or a number"),
        (("--parallel", "10001"), 2, "from 1 to 10000"),
        (("--priority", "first"), 2, "is not one of"),
        (("--scope", "root"), 2, "is not one of"),
        (("--expires", "tomorrow"), 2, "must be like 90s, 15m, 12h, 30d or 2w, or 'never'"),
        (("--expires", "0s"), 1, "must be above 0"),
        (("--expires", "99w", "--tenant", "a b"), 1, "tenant='a b'"),
        (("--model", "a b"), 1, "model='a b'"),
        (("--model", "tiny", "--all-models"), 2, "not both"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(
    run: Run, redis: Redis, options: tuple[str, ...], status: int, text: str
) -> None:
    result = run("create", "--name", "app1", *options)
    assert result.exit_code == status
    assert text in result.stderr
    assert ApiKeys(redis).all() == []


def test_a_grace_time_is_never_for_ever(run: Run) -> None:
    key = made(run)
    result = run("rotate", key["key_id"], "--grace", "never")
    assert result.exit_code == 2
    assert "never'" not in result.stderr.partition("must be")[2]


def test_a_record_is_shown_with_times_of_all_kinds(run: Run, redis: Redis) -> None:
    record, _ = ApiKeys(redis).create(KeyTerms(name="x"))
    assert isinstance(record, KeyRecord)
    run("rotate", record.key_id, "--grace", "1h")
    assert "old_secret_until" in run("show", record.key_id).output
    run("revoke", record.key_id)
    assert re.search(r"revoked_at +\d{4}-", run("show", record.key_id).output)
