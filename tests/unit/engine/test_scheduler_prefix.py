"""What the prefix cache changes about plans."""

from functools import partial

from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import NO_TOKEN, SampledToken, StepPlan
from support import schedulers
from support.engine_requests import make_request

make_scheduler = partial(schedulers.make_scheduler, max_step_tokens=32, prefix_cache=True)


def step(scheduler: Scheduler, *, token_id: int = 50) -> StepPlan:
    plan = scheduler.plan()
    scheduler.commit(plan, [SampledToken(token_id)] * plan.num_samples)
    return plan


def starts(plan: StepPlan) -> dict[str, int]:
    return {chunk.request_id: chunk.start for chunk in plan.chunks}


def test_a_second_request_computes_only_what_the_first_has_not() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=[*range(10), 1]))
    (first,) = step(scheduler).chunks
    scheduler.submit(make_request("b", prompt=[*range(10), 2]))
    second = step(scheduler).chunks[1]
    assert (second.start, second.token_ids) == (8, (8, 9, 2))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert (scheduler.prefix_queried_tokens, scheduler.prefix_hit_tokens) == (22, 8)


def test_two_equal_prompts_in_one_step_are_both_computed() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.submit(make_request(name, prompt=range(9)))
    plan = step(scheduler)
    assert starts(plan) == {"a": 0, "b": 0}
    assert not set(plan.chunks[0].block_table) & set(plan.chunks[1].block_table)
    # Afterwards they share, so 2 of their 6 blocks are free again.
    assert scheduler.free_tokens == (16 - 4) * 4


def test_blocks_of_a_prompt_that_is_still_prefilled_are_shared_already() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.submit(make_request("a", prompt=range(20)))
    step(scheduler)
    scheduler.submit(make_request("b", prompt=range(9), priority=-1))
    assert starts(step(scheduler)) == {"b": 8, "a": 8}


def test_a_prompt_that_is_known_but_for_its_last_token_is_a_decode() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(9), max_tokens=1))
    step(scheduler)
    scheduler.submit(make_request("b", prompt=range(9), max_tokens=1))
    (chunk,) = step(scheduler).chunks
    assert (chunk.start, len(chunk.token_ids), chunk.samples) == (8, 1, True)
    assert not scheduler.has_work


def test_free_tokens_count_what_is_only_remembered() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", prompt=range(12), max_tokens=1))
    step(scheduler)
    assert scheduler.free_tokens == 64


def test_remembered_blocks_give_way_to_new_requests() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("old", prompt=range(12), max_tokens=1))
    step(scheduler)
    scheduler.submit(make_request("new", prompt=range(50, 65), max_tokens=1))
    assert starts(step(scheduler)) == {"new": 0}
    scheduler.submit(make_request("old", prompt=range(12), max_tokens=1))
    assert starts(step(scheduler)) == {"old": 0}


def test_after_a_preemption_only_what_was_lost_is_computed_again() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.submit(make_request("worse", prompt=range(10), max_tokens=9, priority=1))
    step(scheduler)
    scheduler.submit(make_request("better", prompt=(70,), max_tokens=1))
    assert starts(step(scheduler)) == {"better": 0}
    assert starts(step(scheduler)) == {"worse": 8}


def test_nobody_is_preempted_for_blocks_that_another_one_shares() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.submit(make_request("best", prompt=[*range(12), 1], priority=-1))
    step(scheduler)
    scheduler.submit(make_request("worse", prompt=[*range(12), 2], priority=1))
    step(scheduler)
    assert scheduler.free_tokens == 3 * 4
    # It needs 4 blocks and one to spare; without "worse" only 4 would be free.
    scheduler.submit(make_request("newcomer", prompt=range(50, 65), max_tokens=1))
    assert set(starts(step(scheduler))) == {"best", "worse"}
    assert scheduler.num_preemptions == 0


def test_blocks_of_a_request_without_finite_logits_are_not_shared() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.submit(make_request("broken", prompt=range(9)))
    step(scheduler)
    step(scheduler, token_id=NO_TOKEN)
    assert not scheduler.has_work
    scheduler.submit(make_request("again", prompt=range(9)))
    assert starts(step(scheduler)) == {"again": 0}


def test_a_plan_names_the_blocks_to_clear_until_a_step_has_done_so() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("broken", prompt=range(9)))
    table = step(scheduler, token_id=NO_TOKEN).chunks[0].block_table
    scheduler.submit(make_request("next", prompt=range(15), max_tokens=1))
    first, second = scheduler.plan(), scheduler.plan()
    assert first.clear_blocks == second.clear_blocks == tuple(sorted(table))
    scheduler.commit(second, [SampledToken(50)])
    scheduler.submit(make_request("later", prompt=range(30, 45), max_tokens=1))
    assert scheduler.plan().clear_blocks == ()
