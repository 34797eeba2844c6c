import logging

import pytest

from mixfleet_worker.outage import FIRST_BACKOFF_S, LAST_BACKOFF_S, Outage

LEASE_S = 15.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def an_outage(clock: Clock) -> Outage:
    return Outage(worker_id="w1", lease_s=LEASE_S, clock=clock)


def test_each_failure_leaves_redis_alone_for_longer_up_to_a_limit() -> None:
    clock = Clock()
    outage = an_outage(clock)
    assert outage.pause_s <= 0
    longest = FIRST_BACKOFF_S
    for _ in range(12):
        outage.fail(OSError("away"))
        assert longest / 2 <= outage.pause_s <= longest
        clock.now += outage.pause_s
        longest = min(LAST_BACKOFF_S, 2 * longest)
    outage.end_turn()
    outage.fail(OSError("away"))
    assert outage.pause_s <= FIRST_BACKOFF_S


def test_an_outage_is_said_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outage = an_outage(clock)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            outage.fail(OSError("away"))
        for _ in range(3):
            outage.end_turn()
    said = [record.getMessage().partition(" worker_id")[0] for record in caplog.records]
    assert said == ["broker away, decoding goes on", "broker is back"]


def test_after_an_outage_in_which_leases_ended_those_of_others_are_spared_for_a_lease() -> None:
    clock = Clock()
    outage = an_outage(clock)
    outage.begin_turn()
    assert outage.may_reap
    outage.end_turn()
    clock.now += 11.0
    outage.begin_turn()
    assert not outage.may_reap
    outage.end_turn()
    clock.now += LEASE_S - 0.1
    assert not outage.may_reap
    clock.now += 0.1
    assert outage.may_reap


def test_a_quiet_moment_is_no_outage() -> None:
    clock = Clock()
    outage = an_outage(clock)
    for _ in range(10):
        outage.begin_turn()
        outage.end_turn()
        clock.now += LEASE_S / 3
        assert outage.may_reap
