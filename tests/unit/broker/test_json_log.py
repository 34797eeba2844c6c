import json
import logging
from typing import Any

import pytest

from mixfleet_broker.json_log import JsonFormatter


def line(message: object, *args: object, exc_info: Any = None) -> dict[str, Any]:
    record = logging.LogRecord("mixfleet.x", logging.INFO, "x.py", 1, message, args, exc_info)
    record.created = 1_700_000_000.25
    text = JsonFormatter().format(record)
    assert "\n" not in text
    read: dict[str, Any] = json.loads(text)
    return read


def test_named_parts_of_the_template_become_fields_with_their_types() -> None:
    found = line("job_served job_id=%s tokens=%d rate=%.2f error=%s", "0012", 7, 0.12345, "a b=c")
    assert found == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "info",
        "logger": "mixfleet.x",
        "event": "job_served",
        "job_id": "0012",
        "tokens": 7,
        "rate": 0.12,
        "error": "a b=c",
    }


@pytest.mark.parametrize(("shown", "value"), [("12", 12.0), ("0.250", 0.25), ("-", None)])
def test_times_that_were_formatted_before_are_numbers(shown: str, value: float | None) -> None:
    assert line("x queue_ms=%s", shown)["queue_ms"] == value


def test_what_has_no_name_stays_in_the_event() -> None:
    found = line("rank %d of %s: 100%% done run=%d: gone", 2, "w", 3)
    assert found["event"] == "rank 2 of w: 100% done: gone"
    assert found["run"] == 3


def test_no_field_can_take_the_place_of_the_lines_own() -> None:
    found = line("x level=%s time=%s", "up", "now")
    assert (found["level"], found["event"]) == ("info", "x level=up time=now")


def test_a_line_without_arguments_is_its_event() -> None:
    assert line("50% of a=b")["event"] == "50% of a=b"


def test_an_error_keeps_its_trace_on_the_one_line() -> None:
    try:
        raise ValueError("bad\nnews")
    except ValueError as error:
        found = line("failed", exc_info=(type(error), error, error.__traceback__))
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("bad\nnews")
