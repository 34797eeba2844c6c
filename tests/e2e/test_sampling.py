"""Sampling settings and log-probabilities through a real fleet, against the engine alone."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mixfleet import ChatStream, Client, RunStarted, TokenChunk, TokenLogprob
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest, SamplingParams, TokenLogprobs
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

CONTEXT_LENGTH = 2048
NUM_TOKENS = 24
TOLERANCE = 1e-4
"""A token that is prefilled and one that is decoded differ in the last bits."""
BASE: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_hf_checkpoint(folder, tiny_config(vocab_size=512, context_length=CONTEXT_LENGTH))
    write_byte_level_json(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> GenerationEngine:
    config = EngineConfig(dtype="float32", device="cpu", threads=1, num_blocks=256)
    return load_engine(checkpoint, config)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode("the quick brown fox"))


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, model="tiny") as client:
        yield client


def worker(redis_url: str, name: str, folder: Path, checkpoint: Path) -> WorkerProcess:
    arguments = ("--model-path", checkpoint, "--dtype", "float32")
    return WorkerProcess(redis_url, name, folder, *arguments)


def alone(
    engine: GenerationEngine, prompt: tuple[int, ...], **sampling: Any
) -> tuple[tuple[int, ...], list[TokenLogprobs]]:
    """What the engine says when nothing is between it and the caller."""
    params = SamplingParams(**{**BASE, **sampling})
    engine.submit(
        GenerateRequest(
            request_id="r", prompt_token_ids=prompt, max_tokens=NUM_TOKENS, sampling=params
        )
    )
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    token_ids = tuple(i for output in outputs for i in output.token_ids)
    return token_ids, [found for output in outputs for found in output.logprobs]


def token_ids_of(stream: ChatStream) -> tuple[int, ...]:
    chunks = [event for event in stream.events() if isinstance(event, TokenChunk)]
    return tuple(token_id for chunk in chunks for token_id in chunk.token_ids)


def values(one: TokenLogprob | TokenLogprobs) -> list[float]:
    return [one.logprob, *(value for _, value in one.top)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_over_the_wire_are_the_engines_own(
    temperature: float,
    redis_url: str,
    client: Client,
    tmp_path: Path,
    checkpoint: Path,
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    prompt: tuple[int, ...],
) -> None:
    sampling = {**BASE, "temperature": temperature, "logprobs": 3}
    token_ids, expected = alone(engine, prompt, **sampling)
    with worker(redis_url, "w1", tmp_path, checkpoint):
        stream = client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)
        assert token_ids_of(stream) == token_ids
    assert len(stream.logprobs) == len(expected) == NUM_TOKENS
    assert stream.num_prompt_tokens == len(prompt)
    for token_id, told, found in zip(token_ids, stream.logprobs, expected, strict=True):
        assert told.token == tokenizer.token_bytes(token_id)
        assert [token for token, _ in told.top] == [tokenizer.token_bytes(i) for i, _ in found.top]
        assert values(told) == pytest.approx(values(found), abs=TOLERANCE)


def test_every_setting_changes_the_answer_exactly_as_in_the_engine_alone(
    redis_url: str,
    client: Client,
    tmp_path: Path,
    checkpoint: Path,
    engine: GenerationEngine,
    prompt: tuple[int, ...],
) -> None:
    plain, _ = alone(engine, prompt)
    changes: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"min_p": 0.9},
        {"logit_bias": {plain[0]: -100.0, plain[1]: 5.0}},
    ]
    with worker(redis_url, "w1", tmp_path, checkpoint):
        streams = [
            client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **{**BASE, **change})
            for change in changes
        ]
        answers = [token_ids_of(stream) for stream in streams]
    assert answers[0] == plain
    for change, answer in zip(changes[1:], answers[1:], strict=True):
        bias = tuple(change.get("logit_bias", {}).items())
        expected, _ = alone(engine, prompt, **{**change, "logit_bias": bias})
        assert answer == expected, change
        assert answer != plain, change


def test_a_killed_workers_answer_goes_on_with_a_logprob_for_each_token(
    redis_url: str, client: Client, tmp_path: Path, checkpoint: Path
) -> None:
    num_tokens = 1200
    asked: dict[str, Any] = {**BASE, "logprobs": 2, "max_tokens": num_tokens, "ignore_eos": True}
    with (
        worker(redis_url, "first", tmp_path, checkpoint) as first,
        worker(redis_url, "second", tmp_path, checkpoint) as second,
    ):
        second.pause()  # so that the first one gets the job
        stream = client.chat("the quick brown fox", **asked)
        events = [stream.next_event() for _ in range(6)]
        first.kill()
        second.resume()
        events += stream.events()
        full = client.chat("the quick brown fox", **asked).result()
    result = stream.result()
    assert result.worker_ids == ("first", "second")
    assert result.text == full.text
    assert len(result.logprobs) == num_tokens
    assert [one.token for one in result.logprobs] == [one.token for one in full.logprobs]
    for one, other in zip(result.logprobs, full.logprobs, strict=True):
        assert values(one) == pytest.approx(values(other), abs=TOLERANCE)
    after = [later for event, later in pairwise(events) if is_run(event)]
    prompts = [chunk.num_prompt_tokens for chunk in after if isinstance(chunk, TokenChunk)]
    assert prompts == [result.usage.prompt_tokens] * 2


def is_run(event: object) -> bool:
    return isinstance(event, RunStarted)
