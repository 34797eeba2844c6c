"""Real workers, a real Redis, and what a reader sees when something dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from mixfleet import ChatStream, Client, RunStarted, TokenChunk
from mixfleet.errors import JobCancelledError, PromptTooLongError, WorkerLostError
from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.queue import JobQueue
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

MODEL = "simulated"
SLOW_STEP = ("--simulated", "--simulated-step-s", "0.05")
"""An answer takes a second and more, long enough to be interrupted."""
NUM_TOKENS = 20
"""The simulated engine's shortest answers are as long as that."""
FAST_STEP = ("--simulated", "--simulated-step-s", "0")


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, model=MODEL) as client:
        yield client


def ask(client: Client, question: str) -> ChatStream:
    return client.chat(question, max_tokens=NUM_TOKENS, temperature=0.0, seed=1)


def test_many_jobs_are_answered_side_by_side(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST_STEP, "--max-batch-size", "4"):
        streams = [client.chat(f"question {i}", max_tokens=15, seed=1) for i in range(12)]
        results = [stream.result() for stream in streams]
    assert all(result.finish_reason == "length" for result in results)
    assert [result.usage.completion_tokens for result in results] == [15] * 12
    assert len({result.text for result in results}) == 12


def test_a_killed_workers_answer_goes_on_elsewhere_unbroken(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "first", tmp_path, *SLOW_STEP) as first,
        WorkerProcess(redis_url, "second", tmp_path, *FAST_STEP) as second,
    ):
        second.pause()  # so that the first one gets the job
        stream = ask(client, "a story")
        pieces = iter(stream)
        shown = "".join(next(pieces) for _ in range(8))
        first.kill()
        second.resume()
        result = stream.result()
        full = ask(client, "a story").result().text
    assert result.text == full
    assert full.startswith(shown)
    assert result.worker_ids == ("first", "second")
    assert result.usage.completion_tokens == NUM_TOKENS


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 7}])
def test_a_killed_workers_answer_of_a_real_model_goes_on_unbroken(
    settings: dict[str, Any], redis_url: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "tiny"
    write_hf_checkpoint(checkpoint, tiny_config(vocab_size=512, context_length=2048))
    write_byte_level_json(checkpoint)
    arguments = ("--model-path", checkpoint, "--dtype", "float32")
    with (
        Client(redis_url, model="tiny") as client,
        WorkerProcess(redis_url, "first", tmp_path, *arguments) as first,
        WorkerProcess(redis_url, "second", tmp_path, *arguments) as second,
    ):
        second.pause()  # so that the first one gets the job
        stream = client.chat("the quick brown fox", max_tokens=1200, **settings)
        pieces = iter(stream)
        for _ in range(5):
            next(pieces)
        first.kill()
        second.resume()
        result = stream.result()
        full = client.chat("the quick brown fox", max_tokens=1200, **settings).result()
    assert result.text == full.text
    assert result.usage == full.usage
    assert result.worker_ids == ("first", "second")


def test_a_term_signal_lets_a_worker_finish_and_takes_nothing_new(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    arguments = (*SLOW_STEP, "--max-batch-size", "1")
    with WorkerProcess(redis_url, "w1", tmp_path, *arguments) as worker:
        running = ask(client, "one")
        next(iter(running))
        waiting = client.chat("two", max_tokens=5, seed=1)
        worker.terminate()
        assert running.result().usage.completion_tokens == NUM_TOKENS
        assert worker.exit_status() == 0
        assert worker.record() is None
        queue = JobQueue(redis, MODEL)
        assert (queue.depth(), queue.num_started()) == (1, 0)
    with WorkerProcess(redis_url, "w2", tmp_path, *FAST_STEP):
        assert waiting.result().worker_ids == ("w2",)


def test_what_the_drain_time_does_not_suffice_for_goes_back_without_blame(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP, "--drain-s", "0.1") as worker:
        stream = ask(client, "long")
        next(iter(stream))
        worker.terminate()
        assert worker.exit_status() == 0
    info = JobQueue(redis, MODEL).info(stream.job_id)
    assert (info.state, info.num_losses) == ("queued", 0)
    with WorkerProcess(redis_url, "w2", tmp_path, *FAST_STEP):
        result = stream.result()
        assert result.text == ask(client, "long").result().text
        assert result.worker_ids == ("w1", "w2")


def test_a_bad_job_gets_a_typed_error_while_its_neighbours_go_on(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP, "--context-length", "200"):
        good = ask(client, "good")
        next(iter(good))
        bad = client.chat("bad", max_tokens=500)
        with pytest.raises(PromptTooLongError, match=r"500.*200"):
            bad.result()
        assert good.result().usage.completion_tokens == NUM_TOKENS


def test_a_cancelled_job_frees_its_slot_at_the_next_step(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP, "--max-batch-size", "1"):
        stream = ask(client, "long")
        next(iter(stream))
        stream.cancel()
        with pytest.raises(JobCancelledError):
            stream.result()
        assert client.chat("next", max_tokens=2, seed=1).result().usage.completion_tokens == 2
        assert JobQueue(redis, MODEL).num_started() == 0


def test_an_answer_goes_on_through_a_restart_of_redis(tmp_path: Path) -> None:
    with (
        EmbeddedRedis(tmp_path / "data") as server,
        Client(server.url, model=MODEL) as client,
        WorkerProcess(server.url, "w1", tmp_path, *SLOW_STEP, "--lease-s", "15") as worker,
    ):
        stream = ask(client, "a story")
        next(iter(stream))
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.is_alive, "the server is gone")
        server.start()
        result = stream.result()
        assert result.text == ask(client, "a story").result().text
        assert result.worker_ids == ("w1",)
        assert worker.process.poll() is None


def test_a_stop_string_holds_across_the_death_of_a_worker(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "first", tmp_path, *SLOW_STEP) as first,
        WorkerProcess(redis_url, "second", tmp_path, *FAST_STEP) as second,
    ):
        full = ask(client, "a story").result().text
        stop = " ".join(full.split()[14:16])  # two tokens: the first alone must be held back
        second.pause()  # so that the first one gets the job
        stream = client.chat("a story", max_tokens=NUM_TOKENS, temperature=0.0, seed=1, stop=stop)
        pieces = iter(stream)
        for _ in range(8):
            next(pieces)
        first.kill()
        second.resume()
        result = stream.result()
    assert result.finish_reason == "stop"
    assert result.text == full[: full.index(stop)]
    assert result.worker_ids == ("first", "second")


def test_a_job_whose_workers_die_three_times_fails_and_says_so(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    stream = client.chat("a story", max_tokens=60, temperature=0.0, seed=1)
    events = stream.events()
    for name in ("first", "second", "third"):
        with WorkerProcess(redis_url, name, tmp_path, *SLOW_STEP) as worker:
            run = next(event for event in events if isinstance(event, RunStarted))
            assert run.worker_id == name
            assert isinstance(next(events), TokenChunk)
            worker.kill()
    with WorkerProcess(redis_url, "fourth", tmp_path, *FAST_STEP):
        with pytest.raises(WorkerLostError, match="3 workers that ran it died"):
            stream.result()
        assert ask(client, "something else").result().finish_reason == "length"
    assert stream.text


def test_an_rq_producer_gets_an_answer_and_rqs_tools_see_the_worker(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    queue = Queue(MODEL, connection=redis, serializer=JSONSerializer)
    chat = {"messages": [{"role": "user", "content": "a story"}], "max_tokens": NUM_TOKENS}
    job = queue.enqueue("mixfleet.chat", {**chat, "temperature": 0, "seed": 1})
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW_STEP) as worker:
        until(lambda: job.get_status(refresh=True) == "started", "the job has started")
        info = subprocess.run(
            [Path(sys.executable).with_name("rq"), "info", "--raw", "-u", redis_url],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        until(lambda: job.get_status(refresh=True) == "finished", "the job has finished")
        expected = ask(client, "a story").result().text
    assert f"queue {MODEL} 0, 1 executing, 0 finished, 0 failed" in info
    assert f"worker {worker.worker_id} (" in info
    assert "busy" in info
    answer = job.return_value()
    assert answer is not None
    assert answer["text"] == expected
