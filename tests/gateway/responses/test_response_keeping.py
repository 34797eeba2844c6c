"""A stored response is kept from the end of its job on, however long that waits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from redis import Redis

from mixfleet_broker.keys import CHANNEL, JOB, RESPONSE
from mixfleet_broker.messages import JobEnd
from support.gateway import GatewayProcess
from support.hand_worker import HandWorker
from support.openai_client import ended, has_final, job_id_of, openai_client

pytestmark = pytest.mark.slow  # a gateway process starts in a second or two

TTL_S = 5000
RESULT_TTL_S = 900


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path, "--response-ttl-s", str(TTL_S)) as process:
        yield process


def is_left(redis: Redis, key: str) -> int:
    """Seconds."""
    seconds: Any = redis.ttl(key)
    return int(seconds)


def test_an_end_that_no_gateway_saw_is_kept_as_long_as_one_that_it_saw(
    gateway: GatewayProcess,
    client: OpenAI,
    hand: HandWorker,
    redis: Redis,
    redis_url: str,
    tmp_path: Path,
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    job_id = job_id_of(made.id)
    claimed = hand.take()
    hand.say(claimed, "unseen")
    gateway.process.kill()
    gateway.process.wait()
    hand.finish(claimed)
    assert not has_final(redis, made.id)
    for key in (JOB(job_id), CHANNEL(job_id), RESPONSE(job_id)):
        assert RESULT_TTL_S < is_left(redis, key) <= TTL_S
    (tmp_path / "other").mkdir()
    with (
        GatewayProcess(redis_url, tmp_path / "other") as other,
        openai_client(other) as reader,
    ):
        assert reader.responses.retrieve(made.id).output_text == "unseen"
        assert has_final(redis, made.id)
    # What the record has is not kept twice.
    assert 0 < is_left(redis, CHANNEL(job_id)) <= RESULT_TTL_S


def test_the_time_of_a_response_begins_with_its_end(
    client: OpenAI, hand: HandWorker, redis: Redis
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    key = RESPONSE(job_id_of(made.id))
    assert is_left(redis, key) > 30 * 86_400  # it waits, maybe for long
    hand.finish(hand.take())
    assert ended(client, made.id).status == "completed"
    assert 0 < is_left(redis, key) <= TTL_S


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_response_without_an_answer_is_kept_no_longer(
    gateway: GatewayProcess, client: OpenAI, hand: HandWorker, redis: Redis, how: str
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    claimed = hand.take()
    gateway.process.kill()
    gateway.process.wait()
    if how == "failed":
        hand.finish(claimed, JobEnd(state="failed", code="engine_failed", message="as told"))
    else:
        hand.cancel(claimed)
    assert RESULT_TTL_S < is_left(redis, RESPONSE(job_id_of(made.id))) <= TTL_S


def test_a_deleted_response_leaves_no_answer_for_long(
    client: OpenAI, hand: HandWorker, redis: Redis
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    claimed = hand.take()
    hand.say(claimed, "forget me")
    hand.finish(claimed)
    client.responses.delete(made.id)
    assert is_left(redis, CHANNEL(job_id_of(made.id))) <= RESULT_TTL_S
    assert redis.exists(RESPONSE(job_id_of(made.id))) == 0
