"""The client over a real Redis, with the smallest worker that keeps the broker's contract."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from redis import Redis

from mixfleet import Client, RunStarted, new_job_id
from mixfleet.errors import (
    BrokerUnavailableError,
    JobCancelledError,
    JobConflictError,
    MessageError,
    QueueFullError,
    StreamTimeoutError,
    UnknownJobError,
    UnknownModelError,
)
from mixfleet_broker.settings import Settings
from support.echo_worker import EchoWorker


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(settings=Settings(redis=redis_url), model="tiny") as client:
        yield client


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_chat_streams_its_answer(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url):
        stream = client.chat("Grüß dich")
        assert "".join(stream) == "Grüß dich"
    result = stream.result()
    assert result.usage.completion_tokens == 9
    assert result.worker_ids == ("echo",)
    assert result.ttft_s is not None
    assert result.total_s is not None
    assert 0 < result.ttft_s <= result.total_s


def test_text_is_seen_while_the_worker_still_writes(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url, hold_after=2) as worker:
        pieces = iter(client.chat("abcd"))
        assert [next(pieces), next(pieces)] == ["a", "b"]
        worker.go.set()
        assert list(pieces) == ["c", "d"]


def test_plain_text_is_completed(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url):
        assert client.complete("abc").result().text == "abc"


def test_leaving_the_block_cancels_the_job_at_the_worker(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        with client.chat("abc") as stream:
            for _ in stream:
                break
        assert client.status(stream.job_id).state == "canceled"
        eventually(lambda: worker.lost == [stream.job_id])


def test_a_detached_job_goes_on_and_is_read_by_another_client(
    client: Client, redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        with client.chat("abc") as stream:
            next(iter(stream))
            job_id = stream.detach()
        worker.go.set()
        with Client(redis_url) as other:
            assert other.attach(job_id, stream.last_event_id).result().text == "bc"
            assert other.attach(job_id).result().text == "abc"
            assert other.attach(job_id).model == "tiny"


def test_an_answer_is_read_from_every_point(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url):
        whole = client.chat("abcd")
        whole.result()
    ids = [None]
    reader = client.attach(whole.job_id)
    while reader.next_event() is not None:
        ids.append(reader.last_event_id)  # type: ignore[arg-type]
    texts = [client.attach(whole.job_id, after) for after in ids[:-1]]
    assert [stream.result().text for stream in texts] == ["abcd", "abcd", "bcd", "cd", "d", ""]


def test_an_answer_that_another_worker_continues_is_one_text(
    client: Client, redis_url: str
) -> None:
    stream = client.chat("abcdef")
    with EchoWorker(redis_url, worker_id="first", leave_after=3):
        pieces = iter(stream)
        assert [next(pieces) for _ in range(3)] == ["a", "b", "c"]
        eventually(lambda: client.status(stream.job_id).state == "queued")
    with EchoWorker(redis_url, worker_id="second"):
        assert list(pieces) == ["d", "e", "f"]
    result = stream.result()
    assert result.text == "abcdef"
    assert result.worker_ids == ("first", "second")


def test_a_queued_job_knows_its_position_and_can_be_cancelled(client: Client) -> None:
    streams = [client.chat(f"question {number}") for number in range(3)]
    assert [stream.position() for stream in streams] == [0, 1, 2]
    streams[0].cancel()
    assert [stream.position() for stream in streams] == [None, 0, 1]
    with pytest.raises(JobCancelledError):
        streams[0].result()
    client.cancel(streams[1].job_id)
    with pytest.raises(JobCancelledError):
        streams[1].result()


def test_cancelling_an_ended_job_changes_nothing(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url):
        stream = client.chat("abc")
        stream.result()
    stream.cancel()
    client.cancel(stream.job_id)
    assert client.status(stream.job_id).state == "finished"
    assert client.attach(stream.job_id).result().text == "abc"


def test_the_same_job_twice_is_one_and_another_under_its_id_is_refused(
    client: Client, redis_url: str
) -> None:
    job_id = new_job_id()
    first, second = (client.chat("abc", job_id=job_id) for _ in range(2))
    with pytest.raises(JobConflictError):
        client.chat("different", job_id=job_id)
    with EchoWorker(redis_url):
        assert first.result().text == second.result().text == "abc"
    assert client.status(job_id).attempt == 1


def test_a_full_queue_refuses_with_numbers(redis_url: str) -> None:
    settings = Settings(redis=redis_url, queue_limit=2, model="tiny")
    with Client(settings=settings) as client:
        client.chat("a")
        client.chat("b")
        with pytest.raises(QueueFullError) as raised:
            client.chat("c")
    assert (raised.value.depth, raised.value.limit) == (2, 2)


def test_a_value_outside_its_limits_is_refused_before_anything_is_queued(
    client: Client, redis: "Redis"
) -> None:
    with pytest.raises(MessageError, match="temperature"):
        client.chat("a", temperature=9)
    assert redis.keys("rq:job:*") == []


def test_the_model_is_the_one_that_is_served(redis_url: str) -> None:
    with Client(redis_url) as client:
        with pytest.raises(UnknownModelError, match="no model is served"):
            client.chat("a")
        with EchoWorker(redis_url, "one"):
            assert client.chat("abc").result().model == "one"
            assert client.num_workers("one") == 1
            with (
                EchoWorker(redis_url, "two", worker_id="other"),
                pytest.raises(UnknownModelError) as raised,
            ):
                client.chat("abc")
        assert sorted(raised.value.models) == ["one", "two"]
        assert sorted(client.models()) == ["one", "two"]
        assert client.num_workers("one") == 0


def test_no_first_token_in_time_raises_and_leaves_the_job(client: Client) -> None:
    stream = client.chat("a", first_token_timeout_s=0.1)
    with pytest.raises(StreamTimeoutError):
        stream.result()
    assert client.status(stream.job_id).state == "queued"


def test_a_job_that_nobody_knows_is_said_so_at_once(client: Client) -> None:
    for call in (client.attach, client.status, client.cancel):
        with pytest.raises(UnknownJobError):
            call(new_job_id())


@pytest.mark.slow
def test_a_job_lost_by_redis_is_unknown_after_two_leases(redis_url: str, redis: "Redis") -> None:
    with Client(settings=Settings(redis=redis_url, lease_s=1.0, model="tiny")) as client:
        stream = client.chat("a")
        redis.flushdb()
        with pytest.raises(UnknownJobError):
            stream.result()


@pytest.mark.slow
def test_a_wait_without_a_worker_is_warned_of_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(settings=Settings(redis=redis_url, lease_s=1.0, model="tiny")) as client:
        stream = client.chat("abc")
        with caplog.at_level(logging.WARNING, "mixfleet"):
            assert stream.next_event(timeout_s=4.5) is None
        assert [record.getMessage() for record in caplog.records] == [
            f"no worker job_id={stream.job_id} model=tiny state=queued"
        ]
        with EchoWorker(redis_url):
            assert stream.result().text == "abc"


def test_a_cut_connection_is_not_noticed_by_the_reader(
    client: Client, redis_url: str, redis: "Redis"
) -> None:
    with EchoWorker(redis_url, hold_after=2) as worker:
        pieces = iter(client.chat("abcd"))
        assert [next(pieces), next(pieces)] == ["a", "b"]
        redis.client_kill_filter(_type="normal", skipme=True)
        worker.go.set()
        assert list(pieces) == ["c", "d"]


def test_ctrl_c_in_a_wait_leaves_a_client_that_works(client: Client, redis_url: str) -> None:
    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        stream = client.chat("never answered")
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt), stream:
            stream.result()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert client.status(stream.job_id).state == "canceled"
    with EchoWorker(redis_url):
        assert client.chat("abc").result().text == "abc"


def test_events_name_each_run(client: Client, redis_url: str) -> None:
    with EchoWorker(redis_url, worker_id="gpu-7"):
        first, *_ = client.chat("abc").events()
    assert isinstance(first, RunStarted)
    assert (first.worker_id, first.num_tokens) == ("gpu-7", 0)


def test_closing_closes_the_connections(redis_url: str, redis: "Redis") -> None:
    def num_connections() -> int:
        return len(redis.client_list())

    before = num_connections()
    with Client(redis_url, model="tiny") as client:
        client.chat("a")
        assert num_connections() > before
    eventually(lambda: num_connections() == before)


def test_redis_is_found_in_the_environment(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXFLEET_REDIS", raising=False)
    monkeypatch.setenv("REDIS_URL", redis_url)
    with Client(model="tiny") as client:
        client.chat("a")


def test_a_url_wins_over_the_settings(redis_url: str) -> None:
    elsewhere = Settings(redis="redis://127.0.0.1:1/0", model="tiny")
    with Client(redis_url, settings=elsewhere) as client:
        client.chat("a")


def test_no_redis_at_all_says_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailableError, match="mixfleet up"):
        Client(settings=Settings(data_dir=tmp_path))


@pytest.mark.parametrize("text", ["\ud800", "", "\x00", "a\u2028b", "😀" * 1000])
def test_any_text_is_answered_as_it_is_or_refused(
    client: Client, redis_url: str, text: str
) -> None:
    with EchoWorker(redis_url):
        try:
            answer = client.chat(text).result().text
        except MessageError:
            assert text == "\ud800"
        else:
            assert answer == text
