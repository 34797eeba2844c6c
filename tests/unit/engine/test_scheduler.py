import math
import pickle

import pytest

from mixfleet_engine.errors import ConfigError, InvalidRequestError, PromptTooLongError
from mixfleet_engine.request import StepOutput
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import NO_TOKEN, StepPlan
from support.engine_requests import make_request
from support.schedulers import make_scheduler, tokens


def step(scheduler: Scheduler, token_id: int = 50) -> StepPlan:
    """Plan and commit one step that samples ``token_id`` everywhere."""
    plan = scheduler.plan()
    scheduler.commit(plan, tokens(*[token_id] * plan.num_samples))
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    """Request id, start and number of tokens of each chunk."""
    return [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks]


@pytest.mark.parametrize(
    "name",
    ["num_blocks", "block_size", "max_batch_size", "context_length", "vocab_size"],
)
def test_sizes_below_1_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=0: must be at least 1"):
        make_scheduler(**{name: 0})


def test_a_step_must_have_room_for_a_full_batch() -> None:
    make_scheduler(max_batch_size=4, max_step_tokens=4)
    with pytest.raises(ConfigError, match="max_step_tokens=3: must be at least max_batch_size=4"):
        make_scheduler(max_batch_size=4, max_step_tokens=3)


@pytest.mark.parametrize("target_s", [0.0, -1.0, math.nan])
def test_a_target_that_no_step_can_keep_is_refused(target_s: float) -> None:
    with pytest.raises(ConfigError, match=f"^itl_target_s={target_s}: must be above 0"):
        make_scheduler(itl_target_s=target_s)


def test_without_requests_the_plan_is_empty() -> None:
    scheduler = make_scheduler()
    plan = scheduler.plan()
    assert plan.chunks == ()
    assert scheduler.commit(plan, []) == []
    assert not scheduler.has_work


def test_a_prompt_goes_whole_into_a_step_that_has_room() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(8)))
    (chunk,) = step(scheduler).chunks
    assert chunk.token_ids == tuple(range(8))
    assert (chunk.start, chunk.samples, chunk.position) == (0, True, 0)
    assert len(chunk.block_table) == 2


def test_a_long_prompt_is_prefilled_in_chunks_and_only_the_last_one_samples() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(19)))
    plans = [step(scheduler) for _ in range(4)]
    chunks = [plan.chunks[0] for plan in plans]
    assert [chunk.start for chunk in chunks] == [0, 8, 16, 19]
    assert [len(chunk.block_table) for chunk in chunks] == [2, 4, 5, 5]
    assert [chunk.samples for chunk in chunks] == [False, False, True, True]
    assert [chunk.position for chunk in chunks] == [0, 0, 0, 1]
    assert chunks[3].token_ids == (50,)


def test_a_block_table_covers_the_chunk_and_nothing_behind_it() -> None:
    scheduler = make_scheduler(max_step_tokens=5)
    scheduler.submit(make_request("a", prompt=range(12)))
    tables = [step(scheduler).chunks[0].block_table for _ in range(3)]
    assert [len(table) for table in tables] == [2, 3, 3]
    assert tables[0] == tables[1][:2]


def test_decodes_come_before_prefills_and_take_their_tokens_first() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.submit(make_request(name, prompt=range(3), max_tokens=9))
    step(scheduler)
    scheduler.submit(make_request("long", prompt=range(20)))
    assert shape(step(scheduler)) == [("a", 3, 1), ("b", 3, 1), ("long", 0, 6)]
    assert shape(step(scheduler)) == [("a", 4, 1), ("b", 4, 1), ("long", 6, 6)]


def test_a_decode_comes_first_even_when_it_arrived_last() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.submit(make_request("long", prompt=range(20)))
    scheduler.submit(make_request("short", prompt=range(2), max_tokens=9))
    scheduler.submit(make_request("shorter", prompt=(1,)))
    for _ in range(3):
        step(scheduler)
    assert shape(scheduler.plan()) == [("long", 18, 2), ("short", 0, 2), ("shorter", 0, 1)]
    step(scheduler)
    scheduler.submit(make_request("late", prompt=range(20)))
    scheduler.submit(make_request("latest", prompt=(1,)))
    assert shape(step(scheduler))[-1] == ("late", 0, 3)
    assert shape(step(scheduler)) == [
        ("long", 21, 1),
        ("short", 3, 1),
        ("shorter", 2, 1),
        ("late", 3, 3),
    ]


def test_what_is_left_of_a_step_goes_to_the_next_prompts_in_order() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 3), ("b", 4), ("c", 5), ("d", 1)):
        scheduler.submit(make_request(name, prompt=range(length)))
    assert shape(step(scheduler)) == [("a", 0, 3), ("b", 0, 4), ("c", 0, 1)]


def test_no_more_requests_run_than_the_batch_holds() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for name in "abc":
        scheduler.submit(make_request(name, prompt=(1,), max_tokens=2))
    assert [name for name, _, _ in shape(step(scheduler))] == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    step(scheduler)
    assert shape(step(scheduler)) == [("c", 0, 1)]


def test_requests_that_wait_are_served_in_order_even_if_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(num_blocks=4, max_step_tokens=16)
    scheduler.submit(make_request("a", prompt=range(8), max_tokens=3))
    scheduler.submit(make_request("big", prompt=range(12), max_tokens=2))
    scheduler.submit(make_request("small", prompt=(1,), max_tokens=2))
    for _ in range(3):
        assert [name for name, _, _ in shape(step(scheduler))] == ["a"]
    assert shape(step(scheduler))[0] == ("big", 0, 12)


def test_a_newcomer_leaves_each_running_request_one_block_to_grow_into() -> None:
    scheduler = make_scheduler(num_blocks=4, max_step_tokens=32)
    scheduler.submit(make_request("a", prompt=range(4), max_tokens=8))
    scheduler.submit(make_request("b", prompt=range(8), max_tokens=8))
    scheduler.submit(make_request("c", prompt=range(4), max_tokens=8))
    step(scheduler)
    assert (scheduler.num_running, scheduler.free_tokens) == (2, 4)


def test_the_number_of_free_slots_is_never_negative() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    slots = [scheduler.free_slots]
    for name in "abc":
        scheduler.submit(make_request(name))
        slots.append(scheduler.free_slots)
    assert slots == [2, 1, 0, 0]


def test_free_tokens_are_the_blocks_that_nobody_holds() -> None:
    scheduler = make_scheduler()
    assert scheduler.free_tokens == 64
    scheduler.submit(make_request("a", prompt=range(5)))
    assert scheduler.free_tokens == 64
    step(scheduler)
    assert scheduler.free_tokens == 56
    scheduler.abort("a")
    assert scheduler.free_tokens == 64


def test_a_live_request_id_cannot_be_used_again_until_its_end() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=1))
    with pytest.raises(InvalidRequestError, match="request_id='a'"):
        scheduler.submit(make_request("a"))
    step(scheduler)
    scheduler.submit(make_request("a"))
    assert scheduler.num_waiting == 1


def test_a_refused_request_leaves_nothing_behind() -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match="prompt_token_ids holds 100"):
        scheduler.submit(make_request("a", prompt=(100,)))
    assert (scheduler.has_work, scheduler.free_slots) == (False, 4)
    assert not scheduler.abort("a")


def test_what_never_fits_the_model_context_is_refused() -> None:
    scheduler = make_scheduler(context_length=10)
    assert scheduler.context_length == 10
    scheduler.submit(make_request("fits", prompt=range(6), max_tokens=4))
    with pytest.raises(PromptTooLongError, match=r"prompt of 7 tokens .* context of 10"):
        scheduler.submit(make_request("long", prompt=range(7), max_tokens=4))


def test_what_never_fits_the_whole_cache_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2)
    assert scheduler.context_length == 8
    scheduler.submit(make_request("fits", prompt=range(4), max_tokens=4))
    with pytest.raises(PromptTooLongError) as caught:
        scheduler.submit(make_request("long", prompt=range(5), max_tokens=4))
    error = caught.value
    assert (error.prompt_tokens, error.max_tokens, error.context_length) == (5, 4, 8)


def test_a_continued_answer_is_prefilled_with_its_prompt_and_keeps_counting() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=(1, 2), output=(3, 4, 5), max_tokens=5))
    (chunk,) = step(scheduler).chunks
    assert chunk.token_ids == (1, 2, 3, 4, 5)
    assert (chunk.samples, chunk.position) == (True, 3)
    plan = scheduler.plan()
    assert plan.chunks[0].position == 4
    assert scheduler.commit(plan, tokens(9)) == [
        StepOutput(request_id="a", token_ids=(9,), finish_reason="length")
    ]


@pytest.mark.parametrize(("token_id", "reason"), [(7, "stop"), (8, "length")])
def test_a_stop_token_wins_on_the_last_allowed_place(token_id: int, reason: str) -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=1, stops=(7,)))
    (output,) = scheduler.commit(scheduler.plan(), tokens(token_id))
    assert (output.token_ids, output.finish_reason) == ((token_id,), reason)
    assert (scheduler.has_work, scheduler.free_tokens) == (False, 64)


def test_each_request_ends_by_its_own_rules_whoever_is_in_the_batch() -> None:
    scheduler = make_scheduler(max_step_tokens=32)
    for name, max_tokens in (("ten", 10), ("three", 3), ("stops", 10)):
        scheduler.submit(make_request(name, prompt=(1,), max_tokens=max_tokens, stops=(99,)))
    lengths = dict.fromkeys(("ten", "three", "stops"), 0)
    reasons = {}
    for number in range(10):
        plan = scheduler.plan()
        ids = [chunk.request_id for chunk in plan.chunks]
        sampled = [99 if (name, number) == ("stops", 4) else 50 for name in ids]
        for output in scheduler.commit(plan, tokens(*sampled)):
            lengths[output.request_id] += 1
            reasons[output.request_id] = output.finish_reason
    assert lengths == {"ten": 10, "three": 3, "stops": 5}
    assert reasons == {"ten": "length", "three": "length", "stops": "stop"}


def crowded() -> Scheduler:
    """Two sequences hold all 4 blocks, and both need another one now."""
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("old", prompt=range(4), max_tokens=8))
    step(scheduler)
    scheduler.submit(make_request("young", prompt=range(4), max_tokens=8))
    for _ in range(4):
        step(scheduler)
    assert (scheduler.num_running, scheduler.free_tokens) == (2, 0)
    return scheduler


def test_the_youngest_pauses_when_it_is_the_one_that_lacks_a_block() -> None:
    scheduler = make_scheduler(num_blocks=5, max_step_tokens=16)
    scheduler.submit(make_request("old", prompt=range(7), max_tokens=6))
    scheduler.submit(make_request("young", prompt=range(5), max_tokens=8))
    plans = [dict(zip(("old", "young"), shape(step(scheduler)), strict=False)) for _ in range(6)]
    assert [len(plan) for plan in plans] == [2, 2, 2, 2, 1, 1]
    # It held its blocks all the time, so it goes on where it was when the old one is done.
    assert shape(step(scheduler)) == [("young", 8, 1)]
    assert scheduler.num_preemptions == 0


def test_the_oldest_takes_the_blocks_of_the_youngest() -> None:
    scheduler = crowded()
    while not scheduler.num_preemptions:
        plan = step(scheduler)
    assert [name for name, _, _ in shape(plan)] == ["old"]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_a_preempted_answer_is_prefilled_again_with_its_tokens_so_far() -> None:
    scheduler = crowded()
    plans = []
    while scheduler.has_work:
        plans.append(step(scheduler))
    chunks = [chunk for plan in plans for chunk in plan.chunks if chunk.request_id == "young"]
    assert scheduler.num_preemptions == 1
    assert (chunks[0].start, chunks[0].position) == (0, 4)
    assert chunks[0].token_ids == (0, 1, 2, 3, 50, 50, 50, 50)
    assert [(chunk.start, chunk.position) for chunk in chunks[1:]] == [(8, 5), (9, 6), (10, 7)]


def test_a_preempted_request_comes_back_before_those_that_arrived_later() -> None:
    scheduler = crowded()
    scheduler.submit(make_request("later", prompt=(1,), max_tokens=1))
    order: list[str] = []
    while scheduler.has_work:
        order += [chunk.request_id for chunk in step(scheduler).chunks if chunk.start == 0]
    assert order == ["young", "later"]


def test_an_aborted_request_is_forgotten_wherever_it_is() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    for name in ("running", "waiting"):
        scheduler.submit(make_request(name))
    step(scheduler)
    assert scheduler.abort("waiting")
    assert scheduler.abort("running")
    assert not scheduler.abort("running")
    assert (scheduler.has_work, scheduler.free_slots, scheduler.free_tokens) == (False, 1, 64)
    assert scheduler.plan().chunks == ()


def test_what_a_plan_computed_for_an_aborted_request_is_ignored() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.submit(make_request(name, prompt=(1, 2)))
    plan = scheduler.plan()
    scheduler.abort("b")
    assert scheduler.free_tokens == 56
    outputs = scheduler.commit(plan, tokens(10, 11, 12))
    assert [(output.request_id, output.token_ids) for output in outputs] == [
        ("a", (10,)),
        ("c", (12,)),
    ]


def test_a_request_resubmitted_between_plan_and_commit_gets_nothing_of_the_old_one() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=(1, 2)))
    plan = scheduler.plan()
    scheduler.abort("a")
    scheduler.submit(make_request("a", prompt=(3, 4, 5)))
    assert scheduler.commit(plan, tokens(10)) == []
    assert scheduler.plan().chunks[0].token_ids == (3, 4, 5)


def test_a_plan_that_was_not_run_changes_nothing_about_the_next() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(12)))
    first, second = scheduler.plan(), scheduler.plan()
    assert first == second
    with pytest.raises(ValueError, match="only in its turn"):
        scheduler.commit(first, [])
    assert scheduler.commit(second, []) == []


def test_a_plan_cannot_be_committed_twice() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a"))
    plan = scheduler.plan()
    scheduler.commit(plan, tokens(1))
    with pytest.raises(ValueError, match="only once"):
        scheduler.commit(plan, tokens(1))


@pytest.mark.parametrize("sampled", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_tokens_is_refused_and_nothing_is_booked(sampled: list[int]) -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.submit(make_request(name))
    with pytest.raises(ValueError, match=f"{len(sampled)} tokens for 2 chunks"):
        scheduler.commit(scheduler.plan(), tokens(*sampled))
    assert [chunk.start for chunk in scheduler.plan().chunks] == [0, 0]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_requests_leave_nothing_behind_in_memory(*, prefix_cache: bool) -> None:
    scheduler = make_scheduler(prefix_cache=prefix_cache)
    sizes = []
    for number in range(300):
        prompt = [number % 100, number // 100, 3, 4, 5]
        scheduler.submit(make_request(f"finishes {number}", prompt=prompt, max_tokens=2))
        scheduler.submit(make_request(f"is aborted {number}", prompt=prompt[1:]))
        step(scheduler)
        scheduler.abort(f"is aborted {number}")
        scheduler.submit(make_request(f"is late {number}", deadline=-1.0))
        step(scheduler)
        sizes.append(len(pickle.dumps(scheduler)))
    assert not scheduler.has_work
    # The counters alone grow, by a byte or two.
    assert sizes[-1] <= max(sizes[30:60]) + 16


def test_a_request_without_a_token_ends_with_an_error_and_frees_what_it_held() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("broken", prompt=[1, 2]))
    scheduler.submit(make_request("sound", prompt=[3]))
    plan = scheduler.plan()
    assert scheduler.commit(plan, tokens(NO_TOKEN, 50)) == [
        StepOutput(request_id="broken", token_ids=(), finish_reason="error"),
        StepOutput(request_id="sound", token_ids=(50,)),
    ]
    assert scheduler.num_running == 1
    assert scheduler.abort("sound")
    assert scheduler.free_tokens == scheduler.num_blocks * scheduler.block_size
