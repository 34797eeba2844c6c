"""Plans made while the step before runs: what is in them, when there is none, what ends undo."""

from functools import partial

import pytest

from mixfleet_engine.grammar import Grammars
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import NO_TOKEN, UNREAD, StepPlan
from support import schedulers
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import make_request
from support.schedulers import tokens

make_scheduler = partial(schedulers.make_scheduler, vocab_size=300)


def ahead(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan_ahead(now)
    assert plan is not None
    return plan


def ids(plan: StepPlan) -> list[str]:
    return [chunk.request_id for chunk in plan.chunks]


def test_a_decode_goes_on_with_the_token_that_is_being_sampled() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(4)))
    first = scheduler.plan()
    (chunk,) = ahead(scheduler).chunks
    assert (chunk.token_ids, chunk.unread_row) == ((UNREAD,), 0)
    assert (chunk.start, chunk.position, chunk.samples) == (4, 1, True)
    assert len(chunk.block_table) == 2
    (output,) = scheduler.commit(first, tokens(50))
    assert output.token_ids == (50,)


def test_after_the_commit_the_plan_ahead_is_the_one_to_go_on_from() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(3), max_tokens=3))
    first = scheduler.plan()
    second = ahead(scheduler)
    scheduler.commit(first, tokens(50))
    (chunk,) = ahead(scheduler).chunks
    assert (chunk.start, chunk.position) == (4, 2)
    scheduler.commit(second, tokens(51))
    assert chunk.history.token_ids == [0, 1, 2, 50, 51]


def test_an_unread_token_is_named_by_its_row_among_the_samples_of_the_step_before() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("ends", prompt=(1,), max_tokens=1))
    scheduler.submit(make_request("goes on", prompt=(1, 2)))
    scheduler.submit(make_request("long", prompt=range(12)))
    assert [chunk.samples for chunk in scheduler.plan().chunks] == [True, True, False]
    second = ahead(scheduler)
    assert [(c.request_id, c.unread_row) for c in second.chunks] == [("goes on", 1), ("long", None)]


def test_the_next_chunk_of_a_prompt_is_planned_ahead_with_its_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(12)))
    first = scheduler.plan()
    second = ahead(scheduler)
    (chunk,) = second.chunks
    assert (chunk.start, chunk.token_ids, chunk.samples) == (8, (8, 9, 10, 11), True)
    assert scheduler.commit(first, []) == []
    (output,) = scheduler.commit(second, tokens(7))
    assert output.token_ids == (7,)


def test_who_ends_for_sure_is_not_planned_again() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=1))
    first = scheduler.plan()
    assert scheduler.plan_ahead() is None
    (output,) = scheduler.commit(first, tokens(50))
    assert output.finish_reason == "length"
    assert (scheduler.has_work, scheduler.free_tokens) == (False, 64)


def test_a_newcomer_joins_a_plan_ahead() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"))
    scheduler.plan()
    scheduler.submit(make_request("b"))
    assert ids(ahead(scheduler)) == ["a", "b"]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(repetition_penalty=0.5),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=-0.5),
    ],
)
def test_a_token_that_a_penalty_counts_is_waited_for(sampling: SamplingParams) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("free"))
    scheduler.submit(make_request("counts", sampling=sampling, max_tokens=2))
    first = scheduler.plan()
    assert scheduler.plan_ahead() is None
    scheduler.commit(first, tokens(5, 6))
    second = scheduler.plan()
    # Its last token is being sampled, and none comes after it.
    assert ids(ahead(scheduler)) == ["free"]
    scheduler.commit(second, tokens(5, 6))


def test_a_token_that_a_grammar_must_see_is_waited_for_but_not_within_the_prompt() -> None:
    scheduler = make_scheduler(grammars=Grammars(ByteTokenizer(), 300))
    scheduler.submit(make_request("a", prompt=range(12), max_tokens=9, grammar='start: "abc"'))
    first = scheduler.plan()
    second = ahead(scheduler)
    scheduler.commit(first, [])
    assert scheduler.plan_ahead() is None
    scheduler.commit(second, tokens(ord("a")))
    (chunk,) = scheduler.plan().chunks
    assert (chunk.token_ids, chunk.unread_row) == ((ord("a"),), None)


def test_biases_and_logprobs_are_no_reason_to_wait() -> None:
    scheduler = make_scheduler()
    sampling = SamplingParams(temperature=1.0, logit_bias=((3, 1.0),), logprobs=2, top_p=0.5)
    scheduler.submit(make_request("a", sampling=sampling))
    scheduler.plan()
    assert ids(ahead(scheduler)) == ["a"]


def test_nobody_loses_a_place_to_a_plan_ahead() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.submit(make_request("worse", priority=1, max_tokens=9))
    first = scheduler.plan()
    scheduler.submit(make_request("better"))
    assert scheduler.plan_ahead() is None
    scheduler.commit(first, tokens(5))
    assert scheduler.num_preemptions == 0
    assert ids(scheduler.plan()) == ["better"]
    assert scheduler.num_preemptions == 1


def test_nobody_loses_blocks_to_a_plan_ahead_and_the_last_one_pauses() -> None:
    scheduler = make_scheduler(num_blocks=5, max_step_tokens=16)
    scheduler.submit(make_request("old", prompt=range(7), max_tokens=6))
    scheduler.submit(make_request("young", prompt=range(4), max_tokens=8))
    first = scheduler.plan()
    second = ahead(scheduler)
    assert ids(second) == ["old", "young"]
    scheduler.commit(first, tokens(5, 5))
    third = ahead(scheduler)
    scheduler.commit(second, tokens(5, 5))
    assert scheduler.free_tokens == 0
    for _ in range(2):
        fourth = ahead(scheduler)
        scheduler.commit(third, tokens(5, 5))
        third = fourth
    assert ids(ahead(scheduler)) == ["old"], "the other one lacks a block"
    assert scheduler.num_preemptions == 0


def test_who_lacks_a_block_that_a_later_one_holds_is_waited_for_and_not_left_out() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("old", prompt=range(3), max_tokens=12))
    scheduler.submit(make_request("young", prompt=(1,), max_tokens=12))
    plan = scheduler.plan()
    while (second := scheduler.plan_ahead()) is not None:
        assert ids(second) == ["old", "young"]
        scheduler.commit(plan, tokens(5, 5))
        plan = second
    assert plan.chunks[0].start + 1 == 8, "the old one is about to need its third block"
    assert plan.chunks[1].start + 1 == 6, "the young one has room for two tokens more"
    scheduler.commit(plan, tokens(5, 5))
    assert (ids(scheduler.plan()), scheduler.num_preemptions) == (["old"], 1)


def test_what_comes_after_a_stop_token_is_ignored() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("stops", stops=(9,)))
    scheduler.submit(make_request("other"))
    first = scheduler.plan()
    second = ahead(scheduler)
    outputs = scheduler.commit(first, tokens(9, 8))
    assert [output.finish_reason for output in outputs] == ["stop", None]
    (output,) = scheduler.commit(second, tokens(7, 7))
    assert (output.request_id, output.token_ids) == ("other", (7,))


@pytest.mark.parametrize("how", ["stop", "abort", "deadline", "no token"])
def test_a_block_that_a_surplus_step_writes_to_is_cleared_for_its_next_owner(how: str) -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.submit(make_request("a", prompt=range(3), stops=(9,), deadline=5.0))
    first = scheduler.plan()
    second = ahead(scheduler)
    (written,) = second.chunks[0].block_table
    sampled = {"stop": 9, "no token": NO_TOKEN}.get(how, 8)
    if how == "abort":
        assert scheduler.abort("a")
    scheduler.submit(make_request("next", prompt=range(7), max_tokens=1))
    scheduler.commit(first, tokens(sampled))
    third = ahead(scheduler, 6.0 if how == "deadline" else 0.0)
    assert ids(third) == ["next"]
    assert written in third.chunks[0].block_table
    assert third.clear_blocks == (written,), "after the surplus write, and not before"
    outputs = scheduler.commit(second, tokens(7))
    assert [output.finish_reason for output in outputs] == ["deadline"] * (how == "deadline")
    (output,) = scheduler.commit(third, tokens(7))
    assert output.finish_reason == "length"


def with_a_dirty_block() -> Scheduler:
    """Return a scheduler whose only block must be cleared before it serves anybody."""
    scheduler = make_scheduler(num_blocks=1)
    scheduler.submit(make_request("broken", prompt=range(3), max_tokens=1))
    scheduler.commit(scheduler.plan(), tokens(NO_TOKEN))
    return scheduler


def test_a_block_is_cleared_by_one_of_two_plans() -> None:
    scheduler = with_a_dirty_block()
    scheduler.submit(make_request("a", prompt=(1,), max_tokens=3))
    assert scheduler.plan().clear_blocks == (0,)
    assert ahead(scheduler).clear_blocks == (), "it would lose what the first has written"
    assert scheduler.plan().clear_blocks == (0,), "both are void"


def test_a_block_that_the_first_plan_clears_is_cleared_again_if_it_changes_hands_meanwhile() -> (
    None
):
    scheduler = with_a_dirty_block()
    scheduler.submit(make_request("a", prompt=(1,), max_tokens=3))
    first = scheduler.plan()
    scheduler.abort("a")
    scheduler.submit(make_request("b", prompt=(1,), max_tokens=1))
    second = ahead(scheduler)
    assert first.clear_blocks == second.clear_blocks == (0,)
    assert scheduler.commit(first, tokens(5)) == []
    scheduler.commit(second, tokens(5))
    scheduler.submit(make_request("c", prompt=(1,), max_tokens=1))
    assert scheduler.plan().clear_blocks == ()


def test_plans_are_committed_in_order() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"))
    first = scheduler.plan()
    second = ahead(scheduler)
    with pytest.raises(ValueError, match="only in its turn"):
        scheduler.commit(second, tokens(5))
    scheduler.commit(first, tokens(5))
    scheduler.commit(second, tokens(5))
    with pytest.raises(ValueError, match="only once"):
        scheduler.commit(second, tokens(5))


def test_a_new_plan_makes_both_void_and_begins_where_the_last_commit_was() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(12), max_tokens=9))
    scheduler.submit(make_request("b", prompt=range(3), max_tokens=9))
    first, second = scheduler.plan(), ahead(scheduler)
    scheduler.commit(first, [])
    scheduler.commit(second, tokens(5, 6))
    third, fourth = scheduler.plan(), ahead(scheduler)
    again = scheduler.plan()
    for void in (third, fourth):
        with pytest.raises(ValueError, match="only in its turn"):
            scheduler.commit(void, tokens(5, 6))
    # From the start of their prompts: what the fourth wrote would stand behind what is repeated.
    assert {chunk.request_id: chunk.start for chunk in again.chunks} == {"a": 0}
    assert set(again.clear_blocks) <= set(again.chunks[0].block_table)
    assert all(chunk.unread_row is None for chunk in again.chunks)
    assert (scheduler.num_preemptions, scheduler.free_slots) == (0, 2)


def test_who_has_ended_while_two_steps_ran_does_not_begin_again() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.submit(make_request(name))
    scheduler.plan()
    ahead(scheduler)
    scheduler.abort("a")
    assert ids(scheduler.plan()) == ["b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)


def test_the_prefix_cache_learns_a_block_only_when_its_tokens_are_booked() -> None:
    scheduler = make_scheduler(prefix_cache=True, max_step_tokens=32, max_batch_size=8)
    scheduler.submit(make_request("a", prompt=range(3), max_tokens=9))
    first = scheduler.plan()
    second = ahead(scheduler)
    scheduler.commit(first, tokens(3))
    # "a" has 0 1 2 3 by now, and its fourth token is being written.
    scheduler.submit(make_request("early", prompt=range(6)))
    third = ahead(scheduler)
    assert {c.request_id: c.start for c in third.chunks} == {"a": 4, "early": 0}
    scheduler.commit(second, tokens(4))
    scheduler.submit(make_request("late", prompt=range(6)))
    assert {c.request_id: c.start for c in ahead(scheduler).chunks}["late"] == 4


def test_who_is_overdue_when_a_plan_is_made_ahead_loses_the_token_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("late", deadline=5.0))
    first = scheduler.plan(4.0)
    assert scheduler.plan_ahead(5.0) is None
    (output,) = scheduler.commit(first, tokens(7))
    assert (output.token_ids, output.finish_reason) == ((), "deadline")
    assert not scheduler.has_work


def test_a_request_resubmitted_while_two_steps_run_gets_nothing_of_the_old_one() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=(1, 2)))
    first, second = scheduler.plan(), ahead(scheduler)
    scheduler.abort("a")
    scheduler.submit(make_request("a", prompt=(3, 4, 5)))
    assert scheduler.commit(first, tokens(10)) == []
    (chunk,) = ahead(scheduler).chunks
    assert (chunk.token_ids, chunk.unread_row) == ((3, 4, 5), None)
    assert scheduler.commit(second, tokens(10)) == []
