from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.event_codec import (
    MAX_LOGPROB,
    decode_event,
    encode_chunk,
    encode_end,
    encode_run_start,
)
from mixfleet_broker.messages import (
    AnswerPart,
    JobEnd,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    Usage,
)

ENDS = [
    JobEnd(state="finished", finish_reason="stop"),
    JobEnd(
        state="finished",
        finish_reason="length",
        usage=Usage(prompt_tokens=7, completion_tokens=0),
    ),
    JobEnd(state="failed", code="prompt_too_long", message="prompt of 9 tokens"),
    JobEnd(state="failed", code="worker_lost"),
    JobEnd(state="canceled"),
]


values = st.floats(-MAX_LOGPROB, 0.0)
logprobs = st.builds(
    TokenLogprob,
    token=st.binary(max_size=8),
    logprob=values,
    top=st.lists(st.tuples(st.binary(max_size=8), values), max_size=20).map(tuple),
    is_control=st.booleans(),
)


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    token_ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=8))
    num = len(token_ids)
    has_logprobs = draw(st.booleans())
    return TokenChunk(
        num_tokens=draw(st.integers(0, 1000)) + num,
        text=draw(st.text()),
        token_ids=tuple(token_ids),
        part=draw(st.sampled_from(get_args(AnswerPart))),
        logprobs=tuple(draw(st.lists(logprobs, min_size=num, max_size=num)))
        if has_logprobs
        else (),
        num_prompt_tokens=draw(st.none() | st.integers(0, 2**31 - 1)),
    )


@given(chunks())
def test_a_chunk_survives_the_wire(chunk: TokenChunk) -> None:
    assert decode_event("t", 5, chunk.num_tokens, encode_chunk(chunk)) == chunk


@given(st.text())
def test_a_stop_string_survives_the_wire(stop_string: str) -> None:
    end = JobEnd(state="finished", finish_reason="stop", stop_string=stop_string)
    assert decode_event("e", 5, 2, encode_end(end)) == end


@pytest.mark.parametrize("end", ENDS)
def test_an_end_survives_the_wire(end: JobEnd) -> None:
    assert decode_event("e", 5, 2, encode_end(end)) == end


def test_the_start_of_a_run_survives_the_wire() -> None:
    event = decode_event("a", 1764000000000, 12, encode_run_start("gpu-1"))
    assert event == RunStarted(run=1764000000000, worker_id="gpu-1", num_tokens=12)


def test_a_chunk_of_one_token_takes_few_bytes() -> None:
    chunk = TokenChunk(num_tokens=1000, text=" answer", token_ids=(31999,))
    assert len(encode_chunk(chunk)) <= 20


@pytest.mark.parametrize(
    "end",
    [
        JobEnd(state="finished"),
        JobEnd(state="finished", finish_reason="stop", code="x"),
        JobEnd(state="failed"),
        JobEnd(state="failed", code="x", finish_reason="stop"),
        JobEnd(state="canceled", finish_reason="stop"),
        JobEnd(state="canceled", code="x"),
        JobEnd(state="failed", code="x", stop_string="END"),
        JobEnd(state="canceled", stop_string="END"),
    ],
)
def test_an_end_that_contradicts_itself_is_refused(end: JobEnd) -> None:
    with pytest.raises(MessageError, match=f"state '{end.state}'"):
        encode_end(end)


def test_a_chunk_cannot_hold_more_tokens_than_the_answer() -> None:
    chunk = TokenChunk(num_tokens=1, text="", token_ids=(1, 2))
    with pytest.raises(MessageError, match="2 new tokens in an answer of 1"):
        encode_chunk(chunk)
    body = msgpack.packb({"t": "", "i": [1, 2]})
    with pytest.raises(MessageError, match="2 new tokens in an answer of 1"):
        decode_event("t", 5, 1, body)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("x", {}),
        ("", {}),
        ("a", {}),
        ("a", {"w": 7}),
        ("a", {"w": "gpu", "more": 1}),
        ("t", {"t": "x", "more": 1}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", 0.5, []]]}),
        ("t", {"t": "x", "i": [1], "l": [["x", -0.5, []]]}),
        ("t", {"t": "x", "i": [1, 2], "l": [[b"x", -0.5, []]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", -0.5]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", -2e6, []]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", float("-inf"), []]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", float("nan"), []]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", "-1", []]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", -0.5, [[b"y"]]]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", -0.5, [["y", -0.5]]]]}),
        ("t", {"t": "x", "i": [1], "l": [[b"x", -0.5, [[b"y", float("-inf")]]]]}),
        ("t", {"t": "x", "i": [1], "n": -1}),
        ("t", {"t": "x", "i": [1], "n": 1.5}),
        ("e", {"s": "finished", "r": "stop", "x": 5}),
        ("t", {"i": [1]}),
        ("t", {"t": "x", "i": ["1"]}),
        ("t", {"t": "x", "i": [-1]}),
        ("t", {"t": b"x", "i": [1]}),
        ("e", {"s": "lost"}),
        ("e", {"s": "finished", "r": "bored"}),
        ("e", {"s": "finished", "r": "stop", "u": [1]}),
        ("e", {"s": "finished", "r": "stop", "u": 5}),
        ("e", []),
    ],
)
def test_events_that_are_not_of_the_schema_are_refused(kind: str, value: object) -> None:
    with pytest.raises(MessageError):
        decode_event(kind, 5, 3, msgpack.packb(value))
