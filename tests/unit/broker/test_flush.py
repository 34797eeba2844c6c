import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError

from mixfleet_broker.channel import append_chunk
from mixfleet_broker.errors import (
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    MessageError,
)
from mixfleet_broker.finishing import finish_args, finish_outcome
from mixfleet_broker.flush import WriteOutcome, append_outcome
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.queue import Lease
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.terms import QueueRules
from support.queue_jobs import chunk

REFUSAL = "The ID specified in XADD is equal or smaller than the target stream top item"
LEASE = Lease(job_id="job1", token="t-7", run=7)


def test_replies_to_an_append_are_done_refused_or_lost() -> None:
    assert append_outcome(b"7-1") is WriteOutcome.DONE
    assert append_outcome(None) is WriteOutcome.LOST
    assert append_outcome(ResponseError(REFUSAL)) is WriteOutcome.REFUSED


def test_other_errors_of_an_append_are_raised() -> None:
    with pytest.raises(BrokerError, match="READONLY"):
        append_outcome(ResponseError("READONLY You can't write against a read only replica."))
    with pytest.raises(BrokerFullError):
        append_outcome(OutOfMemoryError("command not allowed when used memory > 'maxmemory'."))


def test_replies_to_a_finish_are_done_or_not() -> None:
    assert finish_outcome(1)
    assert not finish_outcome(0)
    assert not finish_outcome(-1)
    with pytest.raises(BrokerError, match="unexpected reply"):
        finish_outcome(b"OK")


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
        append_chunk(redis, LEASE, chunk(3, text="!"))


def test_a_worker_cannot_cancel_by_finishing() -> None:
    with pytest.raises(MessageError, match="use cancel"):
        finish_args(LEASE, JobEnd(state="canceled"), None, QueueRules())
