from benchmarks.chaos import summary
from benchmarks.chaos_clients import Outcome


def an_outcome(job_id: str, **seen: object) -> Outcome:
    outcome = Outcome(job_id=job_id, expected="text", ended=True)
    for name, value in seen.items():
        setattr(outcome, name, value)
    return outcome


def test_what_became_of_the_jobs_is_counted_where_it_belongs() -> None:
    outcomes = [
        an_outcome("a", recovery_s=[1.0, 3.0]),
        an_outcome("b", recovery_s=[2.0]),
        an_outcome("c", was_cancelled=True, is_canceled=True),
        an_outcome("d", was_cancelled=True),
        an_outcome("e", code="worker_lost"),
        an_outcome("f", code="engine_failed"),
        an_outcome("g", ended=False),
        an_outcome("h", is_wrong=True),
        an_outcome("i", is_torn=True),
    ]
    broken = ["job a: 2 ends, last of all JobEnd", "job z: is gone, lost 0 times"]
    found = summary(outcomes, broken, elapsed_s=90.0)
    assert (found.jobs_submitted, found.minutes, found.jobs_per_s) == (9, 1.5, 0.1)
    assert (found.finished_once, found.cancelled) == (5, 1)
    assert (found.lost, found.duplicated, found.wrong_text) == (2, 2, 1)
    assert (found.called_poison, found.other_failures, found.broken_promises) == (1, 1, 2)
    assert (found.runs_lost, found.recovery_p50_s, found.recovery_max_s) == (3, 2.0, 3.0)


def test_without_a_lost_run_there_is_no_recovery_to_tell_of() -> None:
    found = summary([an_outcome("a")], [], elapsed_s=60.0)
    assert (found.runs_lost, found.recovery_p50_s) == (0, None)
