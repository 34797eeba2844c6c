import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError

from mixfleet_broker.errors import (
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    MessageError,
)
from mixfleet_broker.finishing import finish_args
from mixfleet_broker.flush import Flush
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.queue import JobQueue, Lease
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.terms import QueueRules
from mixfleet_broker.write_outcome import Behind, WriteOutcome, write_outcome
from support.queue_jobs import chunk

LEASE = Lease(job_id="job1", token="t-7", run=7)


def test_a_write_is_done_lost_or_behind() -> None:
    assert write_outcome(-1) is WriteOutcome.DONE
    assert write_outcome(-2) is WriteOutcome.LOST
    assert [write_outcome(n) for n in (0, 7)] == [Behind(0), Behind(7)]


@pytest.mark.parametrize("reply", [-3, b"7-1", None, 1.0])
def test_another_reply_to_a_write_is_an_error(reply: object) -> None:
    with pytest.raises(BrokerError, match="unexpected reply"):
        write_outcome(reply)


@pytest.mark.parametrize(
    ("raised", "ours"),
    [
        (RedisConnectionError("refused"), BrokerUnavailableError),
        (OutOfMemoryError("used memory > 'maxmemory'."), BrokerFullError),
        (ResponseError("ERR Error running script: -OOM command not allowed"), BrokerFullError),
        (ResponseError("READONLY You can't write against a read only replica."), BrokerError),
    ],
)
def test_redis_errors_become_ours(raised: Exception, ours: type[BrokerError]) -> None:
    with pytest.raises(BrokerError) as caught, redis_errors():
        raise raised
    assert type(caught.value) is ours


def test_a_chunk_without_tokens_cannot_be_appended() -> None:
    # No command is sent, so the address does not matter.
    with (
        Redis(host="nowhere.invalid") as redis,
        pytest.raises(MessageError, match="without tokens"),
    ):
        Flush(JobQueue(redis, "tiny")).append(LEASE, chunk(3, text="!"))


def test_a_worker_cannot_cancel_by_finishing() -> None:
    with pytest.raises(MessageError, match="use cancel"):
        finish_args(LEASE, JobEnd(state="canceled"), None, QueueRules())
