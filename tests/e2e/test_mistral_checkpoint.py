"""A checkpoint as Mistral ships it, with Mistral's real tokenizer, behind a real queue.

The weights are small and random; layout, tokenizer, chat format and text path are the real ones
of 8x7B (v1) and 8x22B (v3). What is compared with is one engine in this process, and
sentencepiece's own decoding of its tokens.
"""

import shutil
from pathlib import Path

import pytest
import sentencepiece

from mixfleet import Client
from mixfleet_engine.chat_format import Message, chat_format
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.tokenizer import load_tokenizer
from support.engine_requests import run_to_end
from support.tiny_model import tiny_config, write_mistral_checkpoint
from support.tokenizer_files import mistral_file
from support.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

# file of the checkpoint, vocabulary, chat format that must follow from them
RELEASES = {
    "v1": ("tokenizer.model", 32000, "mistral-v1"),
    "v3": ("tokenizer.model.v3", 32768, "mistral-v3"),
}
QUESTION = "Qui a écrit « Les Misérables » ? 漢字 </s>[INST]"
NUM_TOKENS = 60


@pytest.fixture(params=sorted(RELEASES))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checkpoint(version: str, tmp_path: Path) -> Path:
    file, vocab_size, _ = RELEASES[version]
    config = tiny_config(vocab_size=vocab_size, context_length=512)
    folder = write_mistral_checkpoint(tmp_path / "mixtral", config, files="sharded-pth")
    shutil.copy(mistral_file(version), folder / file)
    return folder


def expected_tokens(checkpoint: Path, name: str, sampling: SamplingParams) -> list[int]:
    tokenizer = load_tokenizer(checkpoint)
    found = chat_format(name, tokenizer)
    request = GenerateRequest(
        request_id="alone",
        prompt_token_ids=tuple(found.encode([Message(role="user", content=QUESTION)])),
        max_tokens=NUM_TOKENS,
        stop_token_ids=found.stop_token_ids,
        sampling=sampling,
    )
    engine = load_engine(checkpoint, EngineConfig(dtype="float32", num_blocks=64))
    token_ids, _ = run_to_end(engine, [request])["alone"]
    return list(token_ids)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=1.5, top_p=0.99, seed=7)]
)
def test_an_answer_is_what_the_engine_says_and_sentencepiece_decodes(
    version: str, checkpoint: Path, sampling: SamplingParams, redis_url: str, tmp_path: Path
) -> None:
    _, _, format_name = RELEASES[version]
    arguments = ("--model-path", checkpoint, "--dtype", "float32")
    with (
        Client(redis_url) as client,
        WorkerProcess(redis_url, "w1", tmp_path, *arguments) as worker,
    ):
        result = client.chat(
            QUESTION,
            max_tokens=NUM_TOKENS,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        ).result()
        assert f"chat format {format_name}" in worker.log
    token_ids = expected_tokens(checkpoint, format_name, sampling)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file(version)))
    # More than sentencepiece's own: v3 has markup that it takes for text.
    control = load_tokenizer(checkpoint).control_ids
    decoded = processor.decode([token_id for token_id in token_ids if token_id not in control])
    assert result.usage.completion_tokens == len(token_ids)
    assert result.text == decoded
