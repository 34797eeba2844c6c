import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.plan_codec import decode_plan, encode_plan
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import UNREAD, PlannedChunk, StepPlan
from support.plans import chunk, plan

WORD = st.integers(0, 2**62)
WORDS = st.lists(WORD, min_size=1, max_size=5).map(tuple)


@st.composite
def chunks(draw: st.DrawFn) -> PlannedChunk:
    return PlannedChunk(
        request_id=draw(st.text(max_size=3)),
        token_ids=draw(WORDS),
        start=draw(WORD),
        block_table=draw(WORDS),
        samples=draw(st.booleans()),
        sampling=SamplingParams(seed=draw(WORD), temperature=0.5),
        history=TokenHistory(draw(WORDS)),
        position=draw(WORD),
    )


PLANS = st.builds(
    StepPlan,
    chunks=st.lists(chunks(), max_size=4).map(tuple),
    clear_blocks=st.lists(WORD, max_size=4).map(tuple),
)


@given(PLANS)
def test_a_plan_comes_back_with_all_that_the_model_needs(sent: StepPlan) -> None:
    words = encode_plan(sent)
    assert all(type(word) in (int, bool) and 0 <= word < 2**63 for word in words)
    received = decode_plan(words)
    assert received.clear_blocks == sent.clear_blocks
    assert received.num_samples == sent.num_samples
    for ours, theirs in zip(received.chunks, sent.chunks, strict=True):
        assert (ours.token_ids, ours.start) == (theirs.token_ids, theirs.start)
        assert (ours.block_table, ours.samples) == (theirs.block_table, theirs.samples)


@given(PLANS, st.data())
def test_words_that_are_no_whole_plan_are_refused(sent: StepPlan, data: st.DataObject) -> None:
    words = encode_plan(sent)
    cut = data.draw(st.integers(0, len(words) - 1))
    for broken in (words[:cut], [*words, 0], [-1, *words[1:]]):
        with pytest.raises(ValueError, match="a plan"):
            decode_plan(broken)


def test_a_plan_with_unread_tokens_stays_where_they_are_sampled() -> None:
    unread = replace(chunk([UNREAD], block_table=[0], start=3), unread_row=0)
    with pytest.raises(ValueError, match="a plan with unread tokens"):
        encode_plan(plan(chunk([1], block_table=[1]), unread))


def test_even_an_empty_plan_has_words_as_none_mean_the_end() -> None:
    assert encode_plan(StepPlan(chunks=())) == [0, 0]


def test_what_only_the_sampler_needs_stays_at_home() -> None:
    short = chunk([7, 8], block_table=[3])
    secret = replace(short, request_id="secret", sampling=SamplingParams(seed=99), position=77)
    assert encode_plan(plan(secret)) == encode_plan(plan(short)) == [0, 1, 0, 1, 2, 1, 7, 8, 3]


def test_reading_and_writing_plans_needs_no_torch() -> None:
    code = "import sys, mixfleet_engine.plan_codec; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
