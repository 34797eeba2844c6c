"""The registry on a real server, and what rq's own tools make of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import rq
from click.testing import CliRunner
from redis import Redis
from rq.cli.cli import main as rq_main

from mixfleet_broker import keys
from mixfleet_broker.errors import BrokerError, MessageError
from mixfleet_broker.registry import (
    LEASES_PER_LIFE,
    Registration,
    WorkerRecord,
    models,
    workers,
)

LEASE_S = 15.0
LONG_AGO = 1_700_000_000.25


def record(worker_id: str = "gpu-1", model: str = "mixtral-8x7b") -> WorkerRecord:
    return WorkerRecord.of_this_process(
        worker_id=worker_id,
        model=model,
        max_batch_size=16,
        context_length=32_768,
        started_at=LONG_AGO,
    )


def register(
    redis: Redis,
    worker_id: str = "gpu-1",
    model: str = "mixtral-8x7b",
    *,
    in_flight: int = 0,
    lease_s: float = LEASE_S,
) -> Registration:
    registration = Registration(redis, record(worker_id, model), lease_s=lease_s)
    registration.beat(state="busy" if in_flight else "idle", in_flight=in_flight)
    return registration


def all_keys(redis: Redis) -> set[Any]:
    return set(redis.scan_iter())


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_a_record_is_read_as_it_was_last_said(redis: Redis) -> None:
    registration = register(redis)
    registration.beat(state="busy", in_flight=3)
    expected = dataclasses.replace(record(), state="busy", in_flight=3)
    assert workers(redis) == [expected]
    assert registration.record == expected


def test_an_empty_registry_has_no_workers_and_no_models(redis: Redis) -> None:
    assert workers(redis) == []
    assert models(redis) == []


def test_workers_come_by_model_and_name(redis: Redis) -> None:
    for worker_id, model in (("b", "zeta"), ("c", "alpha"), ("a", "zeta")):
        register(redis, worker_id, model)
    found = [(worker.model, worker.worker_id) for worker in workers(redis)]
    assert found == [("alpha", "c"), ("zeta", "a"), ("zeta", "b")]


def test_a_beat_makes_both_records_last_three_leases(redis: Redis) -> None:
    register(redis)
    for key in (keys.WORKER("gpu-1"), keys.RQ_WORKER("gpu-1")):
        remaining_ms = redis.pttl(key)
        assert remaining_ms > LEASES_PER_LIFE * LEASE_S * 1000 - 2000
        assert remaining_ms <= LEASES_PER_LIFE * LEASE_S * 1000


def test_a_silent_worker_is_gone_and_its_model_is_remembered(redis: Redis) -> None:
    register(redis, lease_s=0.01)
    wait_until(lambda: not workers(redis))
    assert models(redis) == ["mixtral-8x7b"]


def test_the_next_beat_takes_a_dead_worker_out_of_all_lists(redis: Redis) -> None:
    register(redis, "dead", "other-model", lease_s=0.01)
    wait_until(lambda: not workers(redis))
    # The dead worker's silence must have lasted for the life of the one that looks.
    register(redis, "alive", lease_s=0.01)
    assert redis.zrange(keys.WORKERS(), 0, -1) == [b"alive"]
    assert redis.smembers(keys.RQ_WORKERS()) == {b"rq:worker:alive"}
    assert redis.smembers(keys.RQ_QUEUE_WORKERS("other-model")) == set()


def test_a_worker_of_a_longer_lease_is_left_alone(redis: Redis) -> None:
    register(redis, "slow", lease_s=60)
    time_of_beat = redis.zscore(keys.WORKERS(), "slow")
    assert time_of_beat is not None
    redis.zadd(keys.WORKERS(), {"slow": time_of_beat - 10_000})
    register(redis, "quick", lease_s=1)
    assert [worker.worker_id for worker in workers(redis)] == ["quick", "slow"]


def test_deregistering_leaves_nothing_but_the_name_of_the_model(redis: Redis) -> None:
    register(redis).deregister()
    assert workers(redis) == []
    assert all_keys(redis) == {keys.MODELS().encode()}
    assert models(redis) == ["mixtral-8x7b"]


def test_models_come_with_the_latest_first(redis: Redis) -> None:
    first = register(redis, "a", "first")
    register(redis, "b", "second")
    redis.zincrby(keys.MODELS(), -1000, "first")
    assert models(redis) == ["second", "first"]
    first.beat(state="idle", in_flight=0)
    redis.zincrby(keys.MODELS(), -1000, "second")
    assert models(redis) == ["first", "second"]


def test_a_model_that_nobody_served_for_long_is_forgotten(redis: Redis) -> None:
    redis.zadd(keys.MODELS(), {"ancient": 1})
    register(redis)
    assert models(redis) == ["mixtral-8x7b"]


def test_the_time_of_a_beat_is_the_time_of_redis(redis: Redis) -> None:
    before = redis.time()[0]
    register(redis)
    score = redis.zscore(keys.MODELS(), "mixtral-8x7b")
    assert score is not None
    assert before * 1000 <= score < (before + 5) * 1000


def test_looking_changes_nothing(redis: Redis) -> None:
    register(redis)
    register(redis, "dead", lease_s=0.01)
    wait_until(lambda: len(workers(redis)) == 1)
    before = {key: redis.dump(key) for key in all_keys(redis)}
    workers(redis)
    models(redis)
    assert {key: redis.dump(key) for key in all_keys(redis)} == before


@pytest.mark.parametrize(
    "change", [{"in_flight": "many"}, {"started_at": ""}, {"pid": b"\xff"}], ids=str
)
def test_a_record_of_another_version_is_logged_and_left_out(
    change: dict[Any, Any], redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    register(redis, "good")
    register(redis, "strange")
    redis.hset(keys.WORKER("strange"), mapping=change)
    assert [worker.worker_id for worker in workers(redis)] == ["good"]
    assert "worker_record_not_legible worker_id=strange" in caplog.text


def test_a_record_with_more_fields_than_we_know_is_read(redis: Redis) -> None:
    register(redis)
    redis.hset(keys.WORKER("gpu-1"), "tokens_per_s", "12")
    assert len(workers(redis)) == 1


def test_a_name_that_cannot_be_part_of_a_key_is_refused() -> None:
    with pytest.raises(MessageError, match="worker_id"):
        record(worker_id="a:b")
    with pytest.raises(MessageError, match="model"):
        record(model="a/b")


def test_a_key_of_the_wrong_type_is_our_error(redis: Redis) -> None:
    redis.set(keys.WORKERS(), "x")
    with pytest.raises(BrokerError):
        workers(redis)
    with pytest.raises(BrokerError):
        register(redis)


def test_a_worker_can_beat_while_redis_is_full_and_after_it_lost_its_scripts(
    redis: Redis,
) -> None:
    registration = register(redis)
    redis.script_flush()
    redis.config_set("maxmemory", 1)
    try:
        registration.beat(state="busy", in_flight=1)
    finally:
        redis.config_set("maxmemory", 0)
    assert workers(redis)[0].state == "busy"


def test_rq_reads_the_worker_as_one_of_its_own(redis: Redis) -> None:
    register(redis, in_flight=2)
    (worker,) = rq.Worker.all(connection=redis)
    assert worker.name == "gpu-1"
    assert worker.get_state() == "busy"
    assert worker.queue_names() == ["mixtral-8x7b"]
    ours = record()
    assert (worker.hostname, worker.pid) == (ours.host, ours.pid)
    assert (worker.version, worker.python_version) == (ours.version, ours.python_version)
    assert (worker.successful_job_count, worker.failed_job_count) == (0, 0)
    assert worker.total_working_time == 0
    assert worker.birth_date is not None
    assert worker.birth_date.timestamp() == LONG_AGO
    assert worker.last_heartbeat is not None
    assert abs(worker.last_heartbeat.timestamp() - redis.time()[0]) < 5
    queue = rq.Queue("mixtral-8x7b", connection=redis)
    assert rq.Worker.count(queue=queue) == 1


def test_rq_info_lists_the_worker_as_idle_busy_and_gone(redis: Redis, redis_url: str) -> None:
    def info() -> str:
        result = CliRunner().invoke(rq_main, ["info", "--raw", "--only-workers", "-u", redis_url])
        assert result.exit_code == 0, result.output
        return result.output

    registration = register(redis)
    ours = f"worker gpu-1 ({record().host} unknown {record().pid})"
    counts = "mixtral-8x7b. jobs: 0 finished, 0 failed"
    assert info() == f"{ours} idle {counts}\n"
    registration.beat(state="draining", in_flight=1)
    assert info() == f"{ours} busy {counts}\n"
    registration.deregister()
    assert info() == ""


def test_counters_survive_a_beat_and_start_anew_with_a_new_worker(redis: Redis) -> None:
    registration = register(redis)
    redis.hincrby(keys.RQ_WORKER("gpu-1"), "successful_job_count", 7)
    registration.beat(state="idle", in_flight=0)
    assert redis.hget(keys.RQ_WORKER("gpu-1"), "successful_job_count") == b"7"
    reborn = dataclasses.replace(record(), started_at=LONG_AGO + 60)
    Registration(redis, reborn, lease_s=LEASE_S).beat(state="idle", in_flight=0)
    assert redis.hget(keys.RQ_WORKER("gpu-1"), "successful_job_count") == b"0"
