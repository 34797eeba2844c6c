"""One worker of two processes, a real Redis, and what a reader sees when one of them dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker.queue import JobQueue
from mixfleet_worker.group import LEAVE_S
from support.processes import alive, children_of, environment_of
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import LEASE_S, WorkerProcess, until

pytestmark = pytest.mark.slow

QUESTION = "the quick brown fox"
LONG = 1200
"""Tokens of an answer that is still being generated when a rank dies."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_hf_checkpoint(folder, tiny_config(vocab_size=512, context_length=2048))
    write_byte_level_json(folder)
    return folder


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, model="tiny") as client:
        yield client


def arguments(checkpoint: Path) -> tuple[str | Path, ...]:
    return ("--model-path", checkpoint, "--dtype", "float32", "--device", "cpu")


def ranks_of(worker: WorkerProcess) -> dict[int, int]:
    """Process ids of a worker's ranks, by rank."""
    found = {pid: environment_of(pid).get("RANK") for pid in children_of(worker.process.pid)}
    return {int(rank): pid for pid, rank in found.items() if rank is not None}


def test_two_ranks_answer_as_one_process_does_and_drain_at_a_signal(
    redis_url: str, client: Client, tmp_path: Path, checkpoint: Path
) -> None:
    settings: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7})
    with WorkerProcess(redis_url, "two", tmp_path, *arguments(checkpoint), "--tp", "2") as worker:
        ranks = ranks_of(worker)
        assert sorted(ranks) == [0, 1]
        streams = [client.chat(QUESTION, max_tokens=LONG, **chosen) for chosen in settings]
        for stream in streams:
            next(iter(stream))
        worker.terminate()
        shared = [stream.result() for stream in streams]
        assert worker.exit_status() == 0
        assert worker.record() is None
        assert not any(map(alive, ranks.values()))
        assert "Error" not in worker.log
        assert worker.log.count("worker ready") == 1, "only rank 0 talks"
    with WorkerProcess(redis_url, "one", tmp_path, *arguments(checkpoint)):
        alone = [client.chat(QUESTION, max_tokens=LONG, **s).result() for s in settings]
    assert [result.text for result in shared] == [result.text for result in alone]
    assert all(result.usage.completion_tokens > 50 for result in shared)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_its_worker_and_the_answer_goes_on_elsewhere(
    victim: int, redis_url: str, redis: Redis, client: Client, tmp_path: Path, checkpoint: Path
) -> None:
    with (
        WorkerProcess(redis_url, "pair", tmp_path, *arguments(checkpoint), "--tp", "2") as pair,
        WorkerProcess(redis_url, "other", tmp_path, *arguments(checkpoint)) as other,
    ):
        other.pause()  # so that the pair gets the job
        stream = client.chat(QUESTION, max_tokens=LONG, temperature=0.0)
        pieces = iter(stream)
        shown = "".join(next(pieces) for _ in range(5))
        ranks = ranks_of(pair)
        os.kill(ranks[victim], signal.SIGKILL)
        assert pair.process.wait(timeout=LEAVE_S + 5) == 1
        assert not any(map(alive, ranks.values()))
        if victim > 0:  # rank 0 gave the job back, and nobody is to blame
            info = JobQueue(redis, "tiny").info(stream.job_id)
            assert (info.state, info.num_losses) == ("queued", 0)
        other.resume()
        result = stream.result()
        full = client.chat(QUESTION, max_tokens=LONG, temperature=0.0).result()
    line = f"rank {victim} of 2 (process {ranks[victim]}) ended: signal 9; ending the others"
    assert [text for text in pair.log.splitlines() if "Error" in text] == [f"Error: {line}"]
    assert "Traceback" not in pair.log
    assert result.text == full.text
    assert result.text.startswith(shown)
    assert result.worker_ids == ("pair", "other")


def test_an_idle_worker_ends_when_a_rank_dies_and_no_process_stays(
    redis_url: str, tmp_path: Path, checkpoint: Path
) -> None:
    with WorkerProcess(redis_url, "pair", tmp_path, *arguments(checkpoint), "--tp", "2") as pair:
        ranks = ranks_of(pair)
        os.kill(ranks[1], signal.SIGKILL)
        assert pair.exit_status() == 1
        assert not any(map(alive, ranks.values()))


def test_ranks_end_when_the_process_that_started_them_is_killed(
    redis_url: str, tmp_path: Path, checkpoint: Path
) -> None:
    with WorkerProcess(redis_url, "pair", tmp_path, *arguments(checkpoint), "--tp", "2") as pair:
        ranks = ranks_of(pair)
        pair.kill()
        until(lambda: not any(map(alive, ranks.values())), "no rank is left")
        assert pair.record() is None


def test_torchrun_starts_a_worker_too(
    redis_url: str, client: Client, tmp_path: Path, checkpoint: Path
) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    worker = ("-m", "mixfleet_worker", "--redis", redis_url, "--lease-s", str(LEASE_S))
    command = [*torchrun, *worker, *map(str, arguments(checkpoint))]
    with (tmp_path / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        stream = client.chat(QUESTION, max_tokens=20, temperature=0.0)
        assert stream.result().usage.completion_tokens == 20
        ranks = children_of(process.pid)
        process.terminate()
        process.wait(timeout=30)
        until(lambda: not any(map(alive, ranks)), "no rank is left")
    finally:
        process.kill()
        process.wait()


def test_a_number_of_ranks_that_cannot_share_the_model_is_refused_before_any_starts(
    redis_url: str, checkpoint: Path
) -> None:
    command = [sys.executable, "-m", "mixfleet_worker", "--redis", redis_url, "--tp", "3"]
    done = subprocess.run(
        [*command, *map(str, arguments(checkpoint))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: tp=3: 3 ranks cannot share n_heads=4 equally; sizes that work: 1, 2"
    )
