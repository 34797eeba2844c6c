"""What a worker makes of its settings before it takes the first job."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from mixfleet_broker.settings import Settings
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.request import GenerateRequest
from mixfleet_worker.config import WorkerConfig, worker_config
from mixfleet_worker.serve import load_model
from support.engine_requests import run_to_end
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json

ENGINE = EngineConfig(dtype="float32", device="cpu", num_blocks=16, context_length=128)
SIMULATED = worker_config(Settings(), simulated=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_hf_checkpoint(tmp_path_factory.mktemp("m") / "tiny", tiny_config(vocab_size=512))
    write_byte_level_json(folder)
    return folder


@pytest.fixture
def config(checkpoint: Path) -> WorkerConfig:
    return worker_config(Settings(model_path=checkpoint))


def test_a_simulated_model_speaks_words_without_any_checkpoint() -> None:
    model = load_model(SIMULATED, ENGINE)
    assert model.engine.context_length == ENGINE.context_length
    assert model.engine.free_slots == ENGINE.max_batch_size
    assert model.defaults == SamplingDefaults()
    request = GenerateRequest(
        request_id="r", prompt_token_ids=tuple(model.tokenizer.encode("hello")), max_tokens=5
    )
    token_ids, reason = run_to_end(model.engine, [request])["r"]
    assert reason == "length"
    text = b"".join(map(model.tokenizer.token_bytes, token_ids)).decode()
    assert len(text.split()) == 5


def test_a_simulated_engine_without_a_batch_size_fits_its_step() -> None:
    small = EngineConfig(max_batch_size=None, max_step_tokens=4, context_length=100)
    assert load_model(SIMULATED, small).engine.free_slots == 4


def test_a_simulated_model_says_so_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    load_model(SIMULATED, ENGINE)
    assert "simulated engine: answers are random words, no model is loaded" in caplog.messages


def test_each_stage_of_a_load_is_one_line(
    config: WorkerConfig, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mixfleet_worker.serve"):
        load_model(config, ENGINE)
    tokenizer, chat_format, weights = (
        record.message for record in caplog.records if record.name == "mixfleet_worker.serve"
    )
    assert tokenizer.startswith(f"tokenizer {checkpoint}: ready in ")
    assert chat_format == "chat format chatml"
    assert weights.startswith("weights: ready in ")


def test_the_chat_format_asked_for_wins_over_the_checkpoints(config: WorkerConfig) -> None:
    assert load_model(config, ENGINE).chat_format.name == "chatml"
    plain = replace(config, chat_format="plain")
    assert load_model(plain, ENGINE).chat_format.name == "plain"


def test_a_chat_format_that_the_tokenizer_cannot_write_is_refused(config: WorkerConfig) -> None:
    with pytest.raises(ConfigError, match="mistral-v3"):
        load_model(replace(config, chat_format="mistral-v3"), ENGINE)


def test_the_makers_sampling_settings_are_the_defaults(
    config: WorkerConfig, checkpoint: Path
) -> None:
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.2, "top_p": 0.9}))
    try:
        assert load_model(config, ENGINE).defaults == SamplingDefaults(temperature=0.2, top_p=0.9)
        file.write_text(json.dumps({"temperature": 5}))
        with pytest.raises(CheckpointError, match="temperature=5"):
            load_model(config, ENGINE)
    finally:
        file.unlink()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=str(empty)):
        load_model(worker_config(Settings(model_path=empty)), ENGINE)
