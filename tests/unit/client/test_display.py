import io
import logging
from dataclasses import replace
from typing import Any

import pytest

from mixfleet import ChatResult, Client, Usage
from mixfleet.display import Display, NoteHandler, stats_line, waiting_line
from mixfleet.errors import EngineFailedError
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.settings import Settings
from support.fake_transport import FakeClock, FakeTransport, answer, fleet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def show(
    transport: FakeTransport, clock: FakeClock, out: io.StringIO, err: io.StringIO
) -> ChatResult:
    client = Client(settings=Settings(), transport=transport, clock=clock)
    with client.chat("x", model="tiny") as stream:
        return Display(out, err).answer(stream, num_workers=client.num_workers("tiny"))


def test_a_pipe_gets_the_answer_and_one_newline() -> None:
    out, err = io.StringIO(), io.StringIO()
    result = show(*fleet(answer("Hel", "lo")), out, err)
    assert (out.getvalue(), err.getvalue()) == ("Hello\n", "")
    assert result.text == "Hello"


def test_a_last_newline_of_the_answer_is_not_doubled() -> None:
    out = io.StringIO()
    show(*fleet(answer("Hello\n")), out, io.StringIO())
    assert out.getvalue() == "Hello\n"


def test_a_terminal_shows_the_place_in_the_queue_until_the_first_token() -> None:
    out, err = Terminal(), Terminal()
    show(*fleet(answer("Hello", delay_s=1.0)), out, err)
    assert out.getvalue() == "Hello\n"
    assert err.getvalue().startswith("\rqueued, position 1")
    assert err.getvalue().endswith("\r")
    assert "\x1b" not in err.getvalue()


def test_the_status_line_is_wiped_by_as_many_spaces() -> None:
    err = Terminal()
    show(*fleet(answer("Hello")), Terminal(), err)
    *_, last_status, wipe, end = err.getvalue().split("\r")
    assert (wipe, end) == (" " * len(last_status), "")


def test_a_job_that_runs_but_has_no_token_yet_reads_its_prompt() -> None:
    transport, clock = fleet(answer("Hello", delay_s=2.0))
    err = Terminal()
    client = Client(settings=Settings(), transport=transport, clock=clock)
    stream = client.chat("x")
    transport.jobs[stream.job_id].state = "started"
    Display(Terminal(), err).answer(stream, num_workers=1)
    assert "reading the prompt" in err.getvalue()
    assert "queued" not in err.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_no_status_line(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    err = Terminal()
    show(*fleet(answer("Hello")), Terminal(), err)
    assert err.getvalue() == ""


def test_a_terminal_is_not_commanded_by_the_model() -> None:
    out = Terminal()
    show(*fleet(answer("a\x1b[2J", "\x07\x9b\x90\x9d\tb\n")), out, io.StringIO())
    assert out.getvalue() == "a␛[2J␇���\tb\n"


def test_a_pipe_gets_the_answer_unchanged() -> None:
    out = io.StringIO()
    show(*fleet(answer("a\x1b[2J")), out, io.StringIO())
    assert out.getvalue() == "a\x1b[2J\n"


def test_no_worker_is_said_before_the_wait() -> None:
    transport, clock = fleet(answer("Hello"))
    transport.workers = 0
    err = io.StringIO()
    show(transport, clock, io.StringIO(), err)
    assert err.getvalue() == "no worker serves 'tiny' yet; the question waits in the queue\n"


def test_an_answer_that_was_cut_is_said_to_be() -> None:
    out, err = io.StringIO(), io.StringIO()
    show(*fleet(answer("Hel", finish_reason="length")), out, err)
    assert out.getvalue() == "Hel\n"
    assert "cut" in err.getvalue()


def test_a_failure_after_some_text_ends_the_line_and_passes() -> None:
    out = io.StringIO()
    events = [*answer("so far")[:-1], (0.0, JobEnd(state="failed", code="engine_failed"))]
    with pytest.raises(EngineFailedError):
        show(*fleet(events), out, io.StringIO())
    assert out.getvalue() == "so far\n"


def test_a_failure_before_any_text_writes_nothing() -> None:
    out = io.StringIO()
    with pytest.raises(EngineFailedError):
        show(*fleet([(0.0, JobEnd(state="failed", code="engine_failed"))]), out, io.StringIO())
    assert out.getvalue() == ""


def test_stats_give_tokens_times_and_job() -> None:
    result = ChatResult(
        job_id="j",
        model="tiny",
        text="x",
        finish_reason="stop",
        usage=Usage(prompt_tokens=12, completion_tokens=21),
        worker_ids=("a", "b"),
        ttft_s=0.25,
        total_s=2.25,
    )
    assert stats_line(result) == (
        "[12 + 21 tokens · first token 250 ms · 10.0 tokens/s · total 2.2 s · worker a, b · job j]"
    )


def test_a_log_line_does_not_run_into_the_status_line() -> None:
    out, err = Terminal(), Terminal()
    display = Display(out, err)
    transport, clock = fleet(answer("Hello", delay_s=100.0))
    transport.workers = 0
    logger = logging.getLogger("mixfleet.events")
    handler = NoteHandler(display)
    logger.addHandler(handler)
    try:
        client = Client(settings=Settings(), transport=transport, clock=clock)
        display.answer(client.chat("x", model="tiny"), num_workers=0)
    finally:
        logger.removeHandler(handler)
    (line,) = [line for line in err.getvalue().split("\n") if "no worker job_id" in line]
    assert line.rpartition("\r")[2].startswith("warning: no worker job_id=")


def test_stats_leave_out_what_was_not_measured() -> None:
    result = ChatResult(
        job_id="j",
        model="tiny",
        text="x",
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, completion_tokens=1),
        worker_ids=("a",),
        ttft_s=None,
        total_s=None,
    )
    assert stats_line(result) == "[1 + 1 tokens · worker a · job j]"


def a_standing(**changes: Any) -> JobInfo:
    info = JobInfo(job_id="j", state="queued", position=2, worker_id=None, attempt=0, num_losses=0)
    return replace(info, **changes)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "queued, position 3"),
        ({"eta_s": 12.3}, "queued, position 3, about 12 s"),
        ({"eta_s": 0.0}, "queued, position 3, about 0.0 s"),
        ({"outlook": "no_worker"}, "queued, position 3, no worker yet"),
        ({"outlook": "paused"}, "queued, position 3, the workers are paused"),
        (
            {"outlook": "suspect", "position": None},
            "queued, to be run alone: workers that ran it died",
        ),
        ({"outlook": "started", "state": "started", "position": None}, "reading the prompt"),
    ],
)
def test_a_wait_is_said_as_it_is(changes: dict[str, Any], shown: str) -> None:
    assert waiting_line(a_standing(**changes)) == shown
