import math
from collections.abc import Sequence
from typing import Any

import pytest

from mixfleet_broker.event_codec import MAX_LOGPROB, decode_event, encode_chunk
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from mixfleet_engine.detokenizer import AnswerText
from mixfleet_engine.request import FinishReason, GenerateRequest, StepOutput, TokenLogprobs
from mixfleet_worker.handoff import ChunkWrite, EndWrite, JobTimes, Write
from mixfleet_worker.intake import AdmittedJob, CompleteJob
from mixfleet_worker.publisher import Publisher, completion, rejection
from support.byte_tokenizer import ByteTokenizer
from support.worker_jobs import a_lease, a_taken_job

TOKENIZER = ByteTokenizer(adds_tool_tokens=True)
CALLS = TOKENIZER.control_id("[TOOL_CALLS]") or 0
EOS = TOKENIZER.eos_id


def a_job(
    job_id: str = "job1",
    *,
    stops: tuple[str, ...] = (),
    delivered: Sequence[int] = b"",
    tool_calls_id: int | None = None,
) -> AdmittedJob:
    text = AnswerText(TOKENIZER, stops, tool_calls_id=tool_calls_id)
    for token_id in delivered:
        text.push(token_id)
    request = GenerateRequest(
        request_id=job_id,
        prompt_token_ids=(1, 2, 3),
        output_token_ids=tuple(delivered),
        max_tokens=50,
    )
    return AdmittedJob(lease=a_lease(job_id), request=request, text=text, claimed_at=1.0)


def tokens(
    text: bytes | tuple[int, ...], reason: FinishReason | None = None, job_id: str = "job1"
) -> StepOutput:
    return StepOutput(request_id=job_id, token_ids=tuple(text), finish_reason=reason)


def publish_one(publisher: Publisher, output: StepOutput, now: float = 2.0) -> Write:
    (write,) = publisher.publish([output], now).writes
    return write


def chunk_of(write: Write) -> TokenChunk:
    assert write.chunk is not None
    return write.chunk


def test_a_token_becomes_a_chunk_under_the_jobs_lease() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    write = publish_one(publisher, tokens(b"a"))
    assert write == ChunkWrite(
        lease=a_lease(),
        chunk=TokenChunk(num_tokens=1, text="a", token_ids=(97,), num_prompt_tokens=3),
    )


def test_chunks_count_the_tokens_of_the_whole_answer() -> None:
    publisher = Publisher()
    publisher.open(a_job(delivered=b"abc"))
    counts = [chunk_of(publish_one(publisher, tokens(t))).num_tokens for t in (b"d", b"ef")]
    assert counts == [4, 6]


def test_an_incomplete_character_has_tokens_and_no_text_yet() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    first, second = "é".encode()
    early = chunk_of(publish_one(publisher, tokens((first,))))
    late = chunk_of(publish_one(publisher, tokens((second,))))
    assert (early.text, early.token_ids) == ("", (first,))
    assert (late.text, late.token_ids) == ("é", (second,))


def test_the_last_token_comes_with_the_end_and_its_usage() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    publish_one(publisher, tokens(b"a"), now=2.0)
    write = publish_one(publisher, tokens(b"b", "length"), now=5.0)
    assert write == EndWrite(
        lease=a_lease(),
        end=JobEnd(
            state="finished",
            finish_reason="length",
            usage=Usage(prompt_tokens=3, completion_tokens=2),
        ),
        chunk=TokenChunk(num_tokens=2, text="b", token_ids=(98,)),
        times=JobTimes(claimed_at=1.0, first_token_at=2.0, ended_at=5.0),
    )
    assert publisher.num_open == 0


def test_a_stop_token_ends_the_answer_and_shows_nothing() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    assert EOS is not None
    write = publish_one(publisher, tokens((EOS,), "stop"))
    assert isinstance(write, EndWrite)
    assert (write.end.finish_reason, chunk_of(write).text) == ("stop", "")
    assert chunk_of(write).token_ids == (EOS,)


def test_a_stop_string_ends_the_answer_and_the_engine_is_to_forget_it() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("XY",)))
    assert chunk_of(publish_one(publisher, tokens(b"aX"))).text == "a"
    published = publisher.publish([tokens(b"Yb")], 2.0)
    (write,) = published.writes
    assert isinstance(write, EndWrite)
    assert published.stopped == ("job1",)
    assert (write.end.finish_reason, chunk_of(write).text) == ("stop", "")
    # The token behind the stop string was never part of the answer.
    assert (chunk_of(write).token_ids, chunk_of(write).num_tokens) == ((ord("Y"),), 3)


def test_a_stop_string_in_the_last_token_needs_no_abort() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("X",)))
    published = publisher.publish([tokens(b"X", "length")], 2.0)
    (write,) = published.writes
    assert isinstance(write, EndWrite)
    assert write.end.finish_reason == "stop"
    assert published.stopped == ()


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("XYZ",)))
    assert chunk_of(publish_one(publisher, tokens(b"aX"))).text == "a"
    assert chunk_of(publish_one(publisher, tokens(b"Y", "length"))).text == "XY"


def test_the_stop_string_that_ended_the_answer_is_named() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("no", "XY", "Y")))
    write = publish_one(publisher, tokens(b"aXY"))
    assert isinstance(write, EndWrite)
    assert write.end.stop_string == "XY"


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_no_stop_string_is_named_where_none_ended_the_answer(reason: FinishReason) -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("XY",)))
    write = publish_one(publisher, tokens(b"aX", reason))
    assert isinstance(write, EndWrite)
    assert write.end.stop_string is None


def test_the_first_chunk_of_a_run_tells_the_length_of_the_prompt_and_no_other_does() -> None:
    publisher = Publisher()
    publisher.open(a_job(delivered=b"abc"))
    chunks = [chunk_of(publish_one(publisher, tokens(t))) for t in (b"d", b"e", b"f")]
    assert [chunk.num_prompt_tokens for chunk in chunks] == [3, None, None]


def with_logprobs(*token_ids: int, reason: FinishReason | None = None) -> StepOutput:
    """New tokens, each as likely as its id says; the most likely ones are it and EOS."""
    found = tuple(
        TokenLogprobs(logprob=-i / 10, top=((i, -i / 10), (EOS or 0, -90.0))) for i in token_ids
    )
    return StepOutput(request_id="job1", token_ids=token_ids, finish_reason=reason, logprobs=found)


def test_each_token_has_its_logprob_also_where_its_text_is_held_back() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("bcd",)))
    chunk = chunk_of(publish_one(publisher, with_logprobs(*b"abc")))
    assert chunk.text == "a"
    assert chunk.logprobs == (
        TokenLogprob(token=b"a", logprob=-9.7, top=((b"a", -9.7), (b"</s>", -90.0))),
        TokenLogprob(token=b"b", logprob=-9.8, top=((b"b", -9.8), (b"</s>", -90.0))),
        TokenLogprob(token=b"c", logprob=-9.9, top=((b"c", -9.9), (b"</s>", -90.0))),
    )


def test_tokens_behind_a_stop_string_have_no_logprob() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("b",)))
    chunk = chunk_of(publish_one(publisher, with_logprobs(*b"abc")))
    assert [one.token for one in chunk.logprobs] == [b"a", b"b"]


def test_a_part_of_a_character_is_told_as_its_bytes() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    (one,) = chunk_of(publish_one(publisher, with_logprobs("é".encode()[0]))).logprobs
    assert one.token == b"\xc3"


def test_the_token_that_ends_an_answer_is_told_by_its_name() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    assert EOS is not None
    chunk = chunk_of(publish_one(publisher, with_logprobs(ord("a"), EOS, reason="stop")))
    assert (chunk.text, [one.token for one in chunk.logprobs]) == ("a", [b"a", b"</s>"])
    assert [one.is_control for one in chunk.logprobs] == [False, True]


def test_a_padding_row_of_the_model_has_no_name() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    (one,) = chunk_of(publish_one(publisher, with_logprobs(TOKENIZER.vocab_size + 1))).logprobs
    assert one.token == b""


@pytest.mark.parametrize(
    ("computed", "told"),
    [
        (-math.inf, -MAX_LOGPROB),
        (-3e38, -MAX_LOGPROB),
        (-MAX_LOGPROB, -MAX_LOGPROB),
        (-12.5, -12.5),
        (0.0, 0.0),
        (1e-7, 0.0),
    ],
)
def test_a_logprob_is_told_within_what_the_wire_carries(computed: float, told: float) -> None:
    publisher = Publisher()
    publisher.open(a_job())
    found = TokenLogprobs(logprob=computed, top=((98, computed),))
    output = StepOutput(request_id="job1", token_ids=(97,), logprobs=(found,))
    chunk = chunk_of(publish_one(publisher, output))
    assert chunk.logprobs == (TokenLogprob(token=b"a", logprob=told, top=((b"b", told),)),)
    assert decode_event("t", 1, 1, encode_chunk(chunk)) == chunk


def test_answers_of_one_step_do_not_touch_each_other() -> None:
    publisher = Publisher()
    for job_id in ("a", "b", "c"):
        publisher.open(a_job(job_id))
    outputs = [tokens(b"1", job_id="a"), tokens(b"2", "stop", "b"), tokens(b"3", job_id="c")]
    published = publisher.publish(outputs, 2.0)
    assert [write.lease.job_id for write in published.writes] == ["a", "b", "c"]
    assert [chunk_of(write).text for write in published.writes] == ["1", "2", "3"]
    assert publisher.num_open == 2
    assert publisher.lease_of("b") is None


def test_a_dropped_answer_is_forgotten_in_silence() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    publisher.drop("job1")
    publisher.drop("job1")
    assert publisher.num_open == 0


def test_fail_all_ends_every_answer_with_the_code_and_what_it_had() -> None:
    publisher = Publisher()
    publisher.open(a_job("a"))
    publisher.open(a_job("b", delivered=b"xy"))
    ends = publisher.fail_all("engine_failed", "boom", 4.0)
    assert [(write.lease.job_id, write.end.code, write.end.message) for write in ends] == [
        ("a", "engine_failed", "boom"),
        ("b", "engine_failed", "boom"),
    ]
    assert ends[1].end.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert publisher.num_open == 0


def test_a_rejection_carries_the_code_and_the_reason() -> None:
    write = rejection(a_taken_job(), "prompt_too_long", "too long", 3.0)
    assert write.end == JobEnd(state="failed", code="prompt_too_long", message="too long")
    assert write.chunk is None


def test_a_completion_says_what_the_earlier_runs_delivered() -> None:
    job = CompleteJob(
        lease=a_lease(),
        finish_reason="stop",
        num_prompt_tokens=4,
        num_tokens=9,
        chunk=None,
        stop_string="END",
        claimed_at=1.0,
    )
    write = completion(job, 3.0)
    assert (write.end.finish_reason, write.end.stop_string) == ("stop", "END")
    assert write.end.usage == Usage(prompt_tokens=4, completion_tokens=9)


@pytest.mark.parametrize(
    ("reason", "code", "why"),
    [
        ("error", "engine_failed", "the model's numbers are not finite"),
        ("deadline", "deadline_exceeded", "the job's time was over"),
        ("grammar", "invalid_request", "the output format led where nothing can follow"),
    ],
)
def test_an_answer_that_cannot_go_on_fails_with_what_was_said_so_far(
    reason: FinishReason, code: str, why: str
) -> None:
    publisher = Publisher()
    publisher.open(a_job())
    publish_one(publisher, tokens(b"ab"))
    write = publish_one(publisher, tokens((), reason))
    assert isinstance(write, EndWrite)
    assert (write.chunk, write.end.state, write.end.code) == (None, "failed", code)
    assert write.end.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert write.end.message == f"{why} after 2 tokens"
    assert publisher.num_open == 0


def test_an_answer_that_was_whole_already_ends_without_a_chunk() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    write = publish_one(publisher, tokens((), "stop"))
    assert isinstance(write, EndWrite)
    assert (write.chunk, write.end.state, write.end.finish_reason) == (None, "finished", "stop")


# --- tool calls ---------------------------------------------------------------------------------


def parts_of(*outputs: StepOutput, **job: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return part, text and tokens of each chunk that a job with tools gives, in order."""
    publisher = Publisher()
    publisher.open(a_job(tool_calls_id=CALLS, **job))
    chunks = [
        chunk_of(write) for output in outputs for write in publisher.publish([output], 2.0).writes
    ]
    counts = [chunk.num_tokens for chunk in chunks]
    assert counts == sorted(set(counts)), "each chunk has an id of its own"
    return [(chunk.part, chunk.text, chunk.token_ids) for chunk in chunks]


def test_text_after_the_token_of_tool_calls_is_a_part_of_its_own() -> None:
    found = parts_of(tokens(b"a"), tokens((CALLS,)), tokens(b"["), tokens(b"]", "stop"))
    assert found == [
        ("text", "a", (97,)),
        ("text", "", (CALLS,)),
        ("tool_calls", "[", (91,)),
        ("tool_calls", "]", (93,)),
    ]


def test_a_step_with_tokens_on_both_sides_gives_two_chunks() -> None:
    found = parts_of(tokens((97, CALLS, 91)), tokens(b"]", "stop"))
    assert found == [
        ("text", "a", (97, CALLS)),
        ("tool_calls", "[", (91,)),
        ("tool_calls", "]", (93,)),
    ]


def test_a_last_step_with_tokens_on_both_sides_ends_with_the_second_chunk() -> None:
    publisher = Publisher()
    publisher.open(a_job(tool_calls_id=CALLS))
    first, last = publisher.publish([tokens((97, CALLS, 91), "length")], 2.0).writes
    assert isinstance(first, ChunkWrite)
    assert isinstance(last, EndWrite)
    assert (chunk_of(last).part, chunk_of(last).num_tokens) == ("tool_calls", 3)
    assert last.end.usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert publisher.num_open == 0


def test_without_tools_the_token_is_dropped_like_any_control_token() -> None:
    publisher = Publisher()
    publisher.open(a_job())
    write = publish_one(publisher, tokens((97, CALLS, 91), "stop"))
    assert (chunk_of(write).part, chunk_of(write).text) == ("text", "a[")


def test_stop_strings_are_of_the_text_alone() -> None:
    found = parts_of(tokens(b"aX"), tokens((CALLS,)), tokens(b"XYZ"), stops=("XYZ",))
    # What was held back comes with the token that ends the text, and can be no stop string then.
    assert found == [
        ("text", "a", (97, 88)),
        ("text", "X", (CALLS,)),
        ("tool_calls", "XYZ", (88, 89, 90)),
    ]


def test_a_stop_string_before_the_token_ends_the_answer() -> None:
    publisher = Publisher()
    publisher.open(a_job(stops=("X",), tool_calls_id=CALLS))
    published = publisher.publish([tokens((97, 88, CALLS, 91))], 2.0)
    (write,) = published.writes
    assert isinstance(write, EndWrite)
    assert (chunk_of(write).text, chunk_of(write).token_ids) == ("a", (97, 88))
    assert published.stopped == ("job1",)


def test_a_stop_string_that_an_incomplete_character_completes_keeps_the_answer_text() -> None:
    found = parts_of(tokens((97, 0xC3, CALLS)), stops=("\ufffd",))
    assert found == [("text", "a", (97, 0xC3, CALLS))]


def test_an_incomplete_character_ends_with_its_part() -> None:
    found = parts_of(tokens((0xC3,)), tokens((CALLS,)), tokens((0xC3,), "length"))
    assert found == [
        ("text", "", (0xC3,)),
        ("text", "\ufffd", (CALLS,)),
        ("tool_calls", "\ufffd", (0xC3,)),
    ]


def test_calls_that_are_continued_in_mid_character_go_on_as_calls() -> None:
    first, second = "é".encode()
    delivered = (97, CALLS, ord("["), first)
    found = parts_of(tokens((second,)), tokens(b"X", "stop"), delivered=delivered, stops=("X",))
    assert found == [("tool_calls", "é", (second,)), ("tool_calls", "X", (88,))]


def test_each_part_of_one_output_has_the_logprobs_of_its_own_tokens() -> None:
    publisher = Publisher()
    publisher.open(a_job(tool_calls_id=CALLS))
    published = publisher.publish([with_logprobs(ord("a"), CALLS, *b"[{")], 2.0)
    told = [[one.logprob for one in chunk_of(write).logprobs] for write in published.writes]
    assert told == [[-9.7, -CALLS / 10], [-9.1, -12.3]]


def test_an_end_without_new_tokens_shows_the_rest_of_its_own_part() -> None:
    publisher = Publisher()
    publisher.open(a_job(tool_calls_id=CALLS, delivered=(CALLS, 0xC3)))
    write = publish_one(publisher, tokens((), "stop"))
    assert isinstance(write, EndWrite)
    assert write.chunk == TokenChunk(
        num_tokens=2, text="\ufffd", token_ids=(), part="tool_calls", num_prompt_tokens=3
    )
