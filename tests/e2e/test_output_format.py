"""Answers in a given form: a real worker, a real model with random weights, a real Redis."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from redis import Redis

from mixfleet import Client
from mixfleet.errors import InvalidRequestError
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    OutputFormat,
    SamplingSettings,
    new_job_id,
)
from mixfleet_broker.queue import JobQueue
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog"]},
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 250,
            "maxItems": 250,
        },
    },
    "required": ["kind", "numbers"],
    "additionalProperties": False,
}
"""Whose answers are long enough to be interrupted."""


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


def submitted(redis: Redis, schema: object, model: str = "tiny", seed: int = 5) -> str:
    """Queue a job whose answer is to follow ``schema``, and return its id."""
    job = ChatJob(
        job_id=new_job_id(),
        model=model,
        messages=(ChatMessage(role="user", content="the quick brown fox"),),
        output_format=OutputFormat(kind="json_schema", schema=json.dumps(schema)),
        sampling=SamplingSettings(temperature=1.0, seed=seed, max_tokens=1900),
    )
    JobQueue(redis, model).submit(job)
    return job.job_id


def test_an_answer_follows_its_schema_through_the_death_of_its_worker(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path, checkpoint: Path
) -> None:
    arguments = ("--model-path", checkpoint, "--dtype", "float32")
    with (
        WorkerProcess(redis_url, "first", tmp_path, *arguments) as first,
        WorkerProcess(redis_url, "second", tmp_path, *arguments) as second,
    ):
        second.pause()  # so that the first one gets the job
        stream = client.attach(submitted(redis, SCHEMA))
        pieces = iter(stream)
        shown = "".join(next(pieces) for _ in range(20))
        first.kill()
        second.resume()
        result = stream.result()
        undisturbed = client.attach(submitted(redis, SCHEMA)).result()
    assert result.worker_ids == ("first", "second")
    assert result.finish_reason == "stop"
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(result.text))
    assert result.text.startswith(shown)
    assert len(shown) < len(result.text)
    assert result.text == undisturbed.text


def test_a_schema_that_cannot_be_followed_fails_its_job_alone(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    """Beside a simulated answer that follows its own."""
    small = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    with WorkerProcess(redis_url, "w", tmp_path, "--simulated", "--simulated-step-s", "0"):
        bad = client.attach(submitted(redis, {"not": {}}, "simulated"))
        good = client.attach(submitted(redis, small, "simulated"))
        with pytest.raises(InvalidRequestError, match="Unimplemented keys"):
            bad.result()
        assert len(json.loads(good.result().text)) == 3
