import re
from typing import Any, cast

import pytest
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

from mixfleet_broker.lua import (
    SCRIPT_NAMES,
    ScriptName,
    Scripts,
    script_digest,
    script_text,
)


class FakeServer:
    """A server that knows no script, and no flags either if it is old."""

    def __init__(self, *, knows_flags: bool, broken: bool = False) -> None:
        self._knows_flags = knows_flags
        self._broken = broken
        self._known: set[str] = set()
        self.calls: list[str] = []

    def evalsha(self, digest: str, *arguments: Any) -> tuple[Any, ...]:
        self.calls.append("evalsha")
        if digest not in self._known:
            raise NoScriptError("No matching script")
        return arguments

    def script_load(self, text: str) -> None:
        self.calls.append("load")
        if self._broken or (text.startswith("#!") and not self._knows_flags):
            raise ResponseError("Error compiling script")
        flagged = text.startswith("#!")
        self._known |= {
            script_digest(name, with_flags=flagged)
            for name in SCRIPT_NAMES
            if script_text(name, with_flags=flagged) == text
        }


def own_text(name: ScriptName) -> str:
    """The script without what is put before it."""
    whole = script_text(name, with_flags=False)
    return whole[whole.rindex("\n-- KEYS[1]  ") :]


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_a_script_says_what_goes_in_what_comes_out_and_what_holds(name: ScriptName) -> None:
    text = own_text(name)
    for heading in ("-- KEYS[1]", "-- ARGV", "-- Result", "-- Keeps"):
        assert heading in text


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_a_script_names_every_argument_that_it_reads(name: ScriptName) -> None:
    header, body = own_text(name).split("-- Keeps", 1)
    named = {int(number) for number in re.findall(r"(?:ARGV +|, |\n-- +)(\d+) [a-z]", header)}
    read = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", body)}
    assert read <= named


def test_only_what_adds_to_it_is_refused_by_a_full_server() -> None:
    adding = {"submit", "requeue", "ask", "admit", "key_create"}
    adding |= {"file_add", "batch_open", "batch_append"}
    for name in SCRIPT_NAMES:
        first_line = script_text(name, with_flags=True).splitlines()[0]
        adds = name in adding
        assert first_line == ("#!lua" if adds else "#!lua flags=allow-oom")


def test_a_prefix_stands_before_every_key() -> None:
    for name in SCRIPT_NAMES:
        plain = script_text(name, with_flags=True)
        prefixed = script_text(name, with_flags=True, prefix="{a}:")
        expected = plain.replace("return 'rq:", "return '{a}:rq:")
        assert prefixed == expected.replace("return 'mixfleet:", "return '{a}:mixfleet:")
        digests = {script_digest(name, with_flags=True, prefix=prefix) for prefix in ("", "{a}:")}
        assert len(digests) == 2


def test_an_old_server_gets_no_flags() -> None:
    for name in SCRIPT_NAMES:
        assert "#!" not in script_text(name, with_flags=False)


def test_no_script_asks_for_a_clock_of_its_own() -> None:
    for name in SCRIPT_NAMES:
        whole = script_text(name, with_flags=True)
        assert whole.count("redis.call('TIME')") == 1
        assert "os." not in whole


def test_a_script_is_loaded_once_and_then_called_by_its_digest() -> None:
    server = FakeServer(knows_flags=True)
    scripts = Scripts(cast(Redis, server))
    assert scripts.run("cancel", "tiny", "job1") == (1, "rq:queue:tiny", "tiny", "job1")
    scripts.run("cancel", "tiny", "job2")
    assert server.calls == ["evalsha", "load", "evalsha", "evalsha"]


def test_a_server_before_version_7_gets_the_scripts_without_flags() -> None:
    server = FakeServer(knows_flags=False)
    scripts = Scripts(cast(Redis, server))
    scripts.run("cancel", "tiny", "job1")
    assert server.calls == ["evalsha", "load", "load", "evalsha"]
    scripts.run("cancel", "tiny", "job2")
    scripts.run("submit", "tiny")
    assert server.calls[4:] == ["evalsha", "evalsha", "load", "evalsha"]


def test_a_server_that_takes_no_script_at_all_is_an_error() -> None:
    server = FakeServer(knows_flags=False, broken=True)
    with pytest.raises(ResponseError, match="compiling"):
        Scripts(cast(Redis, server)).run("cancel", "tiny", "job1")
