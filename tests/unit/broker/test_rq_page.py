from typing import Any

import click
import pytest

pytest.importorskip("rq_dashboard")

from mixfleet_broker.rq_page import check_options, escaped, is_loopback

OPEN: dict[str, Any] = {"bind": "127.0.0.1", "username": None, "password": None, "debug": False}
NAMED: dict[str, Any] = {"username": "ops", "password": "hush"}


@pytest.mark.parametrize(
    "options",
    [
        OPEN,
        OPEN | {"bind": "localhost"},
        OPEN | {"bind": "::1"},
        OPEN | NAMED,
        OPEN | NAMED | {"bind": "0.0.0.0"},
    ],
)
def test_this_machine_alone_or_a_password_is_accepted(options: dict[str, Any]) -> None:
    check_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OPEN | {"bind": "0.0.0.0"}, "--bind 0.0.0.0.*RQ_DASHBOARD_PASSWORD"),
        (OPEN | {"bind": "10.0.0.7"}, "--bind 10.0.0.7"),
        (OPEN | {"bind": "ops.example"}, "--bind ops.example"),
        (OPEN | {"bind": ""}, "--bind"),
        # rq-dashboard takes a password without a name for no password at all.
        (OPEN | {"password": "hush"}, "go together"),
        (OPEN | {"username": "ops"}, "go together"),
        (OPEN | NAMED | {"debug": True}, "--debug"),
    ],
)
def test_what_lets_strangers_in_is_refused_with_the_remedy(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(click.UsageError, match=message):
        check_options(options)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "localhost.example", "192.168.0.1"])
def test_anything_else_may_be_reached_by_others(host: str | None) -> None:
    assert not is_loopback(host)


def test_every_text_is_escaped_but_those_that_the_page_escapes() -> None:
    tag, safe = '<b a="1">', "&lt;b a=&quot;1&quot;&gt;"
    value = {"id": tag, "description": tag, "rows": [tag, 1, None, {"description": tag, tag: tag}]}
    assert escaped(value, frozenset({"description"})) == {
        "id": safe,
        "description": tag,
        "rows": [safe, 1, None, {"description": tag, safe: safe}],
    }


def test_only_a_text_is_left_to_the_page() -> None:
    assert escaped({"exc_info": ["<b>"]}, frozenset({"exc_info"})) == {"exc_info": ["&lt;b&gt;"]}
