from dataclasses import FrozenInstanceError

import pytest

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import PlannedChunk, StepPlan


def chunk(num_tokens: int, *, samples: bool) -> PlannedChunk:
    return PlannedChunk(
        request_id="r",
        token_ids=tuple(range(num_tokens)),
        start=0,
        block_table=(7,),
        samples=samples,
        sampling=SamplingParams(seed=5),
        history=TokenHistory(()),
        position=0,
    )


def test_an_empty_plan_has_no_tokens_and_no_samples() -> None:
    plan = StepPlan(chunks=())
    assert (plan.num_tokens, plan.num_samples) == (0, 0)


def test_a_plan_counts_all_tokens_but_only_the_chunks_that_sample() -> None:
    plan = StepPlan(chunks=(chunk(1, samples=True), chunk(5, samples=False)))
    assert (plan.num_tokens, plan.num_samples) == (6, 1)


def test_a_plan_cannot_be_changed() -> None:
    plan = StepPlan(chunks=())
    with pytest.raises(FrozenInstanceError):
        plan.chunks = (chunk(1, samples=True),)  # type: ignore[misc]
