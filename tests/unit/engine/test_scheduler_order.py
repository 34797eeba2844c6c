"""Priorities, deadlines and who gives way to whom."""

from functools import partial

import pytest

from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.request import StepOutput
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import SampledToken, StepPlan
from support import schedulers
from support.engine_requests import make_request

make_scheduler = partial(schedulers.make_scheduler, max_batch_size=2)


def step(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now)
    scheduler.commit(plan, [SampledToken(50)] * plan.num_samples)
    return plan


def ids(plan: StepPlan) -> list[str]:
    return [chunk.request_id for chunk in plan.chunks]


def end_of(request_id: str) -> StepOutput:
    return StepOutput(request_id=request_id, token_ids=(), finish_reason="deadline")


def test_a_lower_number_goes_first_and_equals_by_arrival() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    for name, priority in (("low", 5), ("b", 0), ("c", 0), ("high", -1)):
        scheduler.submit(make_request(name, max_tokens=1, priority=priority))
    assert [ids(step(scheduler)) for _ in range(4)] == [["high"], ["b"], ["c"], ["low"]]


def test_a_better_newcomer_prefills_before_a_worse_one_that_has_begun() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("worse", prompt=range(20), priority=1))
    step(scheduler)
    scheduler.submit(make_request("better", prompt=range(5), priority=0))
    plan = scheduler.plan()
    assert [(chunk.request_id, len(chunk.token_ids)) for chunk in plan.chunks] == [
        ("better", 5),
        ("worse", 3),
    ]
    assert scheduler.num_preemptions == 0


def test_a_better_request_takes_the_slot_of_the_last_of_the_worst() -> None:
    scheduler = make_scheduler()
    for name, priority in (("first", 1), ("second", 1)):
        scheduler.submit(make_request(name, max_tokens=9, priority=priority))
    step(scheduler)
    scheduler.submit(make_request("better", max_tokens=9))
    assert ids(step(scheduler)) == ["first", "better"]
    assert (scheduler.num_preemptions, scheduler.num_waiting) == (1, 1)


def test_a_request_of_the_same_priority_takes_no_place() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.submit(make_request("first", max_tokens=9, priority=1))
    step(scheduler)
    for name, priority in (("equal", 1), ("worse", 2)):
        scheduler.submit(make_request(name, max_tokens=9, priority=priority))
    assert ids(step(scheduler)) == ["first"]
    assert scheduler.num_preemptions == 0


def test_a_better_request_takes_as_many_blocks_as_it_needs_and_no_more() -> None:
    scheduler = make_scheduler(max_batch_size=8, num_blocks=8, max_step_tokens=32)
    for name, priority in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.submit(make_request(name, prompt=range(7), max_tokens=2, priority=priority))
    step(scheduler)
    assert (scheduler.num_running, scheduler.free_tokens) == (3, 8)
    scheduler.submit(make_request("better", prompt=range(8), max_tokens=2))
    assert ids(step(scheduler)) == ["a", "b", "better"]
    assert (scheduler.num_preemptions, scheduler.num_waiting) == (1, 1)


def test_nobody_is_preempted_when_all_the_worse_ones_are_not_enough() -> None:
    scheduler = make_scheduler(max_batch_size=8, num_blocks=8, max_step_tokens=32)
    scheduler.submit(make_request("best", prompt=range(20), max_tokens=4, priority=-1))
    scheduler.submit(make_request("worse", prompt=range(4), max_tokens=4, priority=1))
    step(scheduler)
    scheduler.submit(make_request("large", prompt=range(15), max_tokens=2, priority=0))
    assert ids(step(scheduler)) == ["best", "worse"]
    assert scheduler.num_preemptions == 0


def test_a_preempted_request_comes_back_to_its_place_among_those_of_its_priority() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.submit(make_request("early", max_tokens=3, priority=1))
    scheduler.submit(make_request("late", max_tokens=1, priority=1))
    step(scheduler)
    scheduler.submit(make_request("better", max_tokens=1))
    assert [ids(step(scheduler))[0] for _ in range(4)] == ["better", "early", "early", "late"]


def test_whoever_lacks_a_block_takes_it_from_the_worst_even_if_that_came_first() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(make_request("worse", prompt=range(4), max_tokens=10, priority=1))
    step(scheduler)
    scheduler.submit(make_request("better", prompt=range(4), max_tokens=10))
    plans = [step(scheduler) for _ in range(6)]
    assert ids(plans[0]) == ["worse", "better"]
    assert ids(plans[-1]) == ["better"]
    assert scheduler.num_preemptions == 1


@pytest.mark.parametrize("waits", [False, True])
def test_an_overdue_request_ends_wherever_it_is_and_frees_all_it_holds(*, waits: bool) -> None:
    scheduler = make_scheduler(max_batch_size=1)
    if waits:
        scheduler.submit(make_request("other", max_tokens=9, priority=-1))
    scheduler.submit(make_request("late", max_tokens=9, deadline=10.0))
    step(scheduler, 9.9)
    plan = scheduler.plan(10.0)
    assert ids(plan) == (["other"] if waits else [])
    assert scheduler.free_tokens == (60 if waits else 64)
    outputs = scheduler.commit(plan, [SampledToken(50)] * plan.num_samples)
    assert outputs[0] == end_of("late")
    assert scheduler.has_work == waits


def test_a_request_that_comes_after_its_deadline_ends_with_the_next_step() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("late", deadline=10.0))
    assert scheduler.has_work
    plan = scheduler.plan(11.0)
    assert plan.chunks == ()
    assert scheduler.commit(plan, []) == [end_of("late")]
    assert not scheduler.has_work


def test_the_room_of_an_overdue_request_is_used_in_the_same_step() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.submit(make_request("late", max_tokens=9, deadline=10.0))
    step(scheduler)
    scheduler.submit(make_request("next"))
    assert ids(step(scheduler, 10.0)) == ["next"]


def test_a_token_that_was_computed_in_time_is_delivered_before_the_end() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", max_tokens=9, deadline=10.0))
    plan = scheduler.plan(9.0)
    (output,) = scheduler.commit(plan, [SampledToken(50)])
    assert (output.token_ids, output.finish_reason) == ((50,), None)
    assert scheduler.commit(scheduler.plan(12.0), []) == [end_of("a")]


def test_the_news_of_an_end_survives_a_step_that_failed() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("late", deadline=10.0))
    scheduler.submit(make_request("other"))
    scheduler.plan(11.0)  # and the run fails
    with pytest.raises(InvalidRequestError, match="is in the engine already"):
        scheduler.submit(make_request("late"))
    plan = scheduler.plan(11.0)
    outputs = scheduler.commit(plan, [SampledToken(50)])
    assert [output.request_id for output in outputs] == ["late", "other"]


def test_an_end_that_nobody_was_told_of_can_still_be_aborted() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("late", deadline=10.0))
    plan = scheduler.plan(11.0)
    assert scheduler.abort("late")
    assert not scheduler.abort("late")
    assert scheduler.commit(plan, []) == []
    assert not scheduler.has_work


def test_a_deadline_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="deadline=nan"):
        make_scheduler().submit(make_request(deadline=float("nan")))


def test_a_request_that_was_refused_room_is_tried_again_when_there_is_more() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_size=4, max_step_tokens=16)
    scheduler.submit(make_request("small", prompt=range(3), max_tokens=4))
    scheduler.submit(make_request("large", prompt=range(12), max_tokens=2))
    seen = [ids(step(scheduler)) for _ in range(5)]
    assert seen == [["small"]] * 4 + [["large"]]
