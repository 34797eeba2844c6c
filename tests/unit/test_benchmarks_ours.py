"""This project's own side of the engine benchmark, on a tiny random model."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import models
from benchmarks.engine_ours import (
    Ours,
    Stopwatch,
    context_rows,
    engine_config,
    load,
    overhead,
)
from benchmarks.measuring import Job, measure

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import ConfigError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "vocab_size": 400,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in TINY.items():
            patch.setitem(models.RANDOM_CONFIG, name, size)
        models.make_random(folder, lambda _: None)
    return folder


def a_job(model_path: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "variant": "auto:fp32",
        "model_path": str(model_path),
        "vocab_size": TINY["vocab_size"],
        "threads": 1,
        "started_at": 0.0,
        "batches": (1, 3),
        "decode_steps": 3,
        "repeats": 1,
        "prefill_tokens": 40,
        "ttft_tokens": 20,
        **changes,
    }
    return Job(**fields)


def config_of(model_path: Path, variant: str, **changes: Any) -> EngineConfig:
    job = a_job(model_path, variant=variant, **changes)
    return engine_config(job, ModelConfig.from_checkpoint(model_path))


def test_a_variant_names_back_end_and_weights(model_path: Path) -> None:
    plain = config_of(model_path, "cpu:bf16")
    assert (plain.backend, plain.dtype, plain.threads) == ("cpu", "bfloat16", 1)
    assert config_of(model_path, "auto:fp32").dtype == "float32"
    assert config_of(model_path, "auto:int8").weight_dtype == "int8"


@pytest.mark.parametrize("variant", ["auto:int3", "abacus:bf16"])
def test_a_variant_that_the_engine_does_not_know_is_refused(model_path: Path, variant: str) -> None:
    with pytest.raises(ConfigError):
        config_of(model_path, variant)


@pytest.mark.parametrize("contexts", [(), (64, 300)])
def test_the_cache_holds_the_largest_batch_and_the_longest_context(
    model_path: Path, contexts: tuple[int, ...]
) -> None:
    found = config_of(model_path, "cpu:bf16", contexts=contexts, batches=(1, 32))
    assert found.num_blocks is not None
    tokens = found.num_blocks * found.block_size
    assert tokens >= 32 * (16 + 3)
    assert tokens >= 8 * max(contexts, default=0)
    assert found.max_batch_size == 32


def test_every_figure_is_measured_through_the_real_engine(model_path: Path) -> None:
    job = a_job(model_path)
    figures, ours = measure(job, lambda: load(job))
    assert isinstance(ours, Ours)
    assert not ours.engine.has_work
    assert set(figures["decode"]) == {"1", "3"}
    assert figures["prefill_tokens_per_s"] > 0


def test_start_gives_every_prompt_its_first_token_and_finish_frees_all(model_path: Path) -> None:
    job = a_job(model_path)
    ours = load(job)
    free = ours.engine.free_tokens
    ours.start(job.prompts(0, 3, 16))
    assert ours.engine.free_tokens < free
    ours.step()
    ours.step()
    assert len(ours.tokens) == 2 * 3
    ours.finish()
    assert ours.engine.free_slots == 8
    assert not ours.engine.has_work


def test_a_step_that_leaves_a_request_out_is_an_error(model_path: Path) -> None:
    job = a_job(model_path)
    ours = load(job)
    ours.start(job.prompts(0, 2, 16))
    ours.engine.abort("row-1")
    with pytest.raises(RuntimeError, match="1 of 2 requests"):
        ours.step()


def test_the_shares_outside_the_model_add_up(model_path: Path) -> None:
    job = a_job(model_path, batches=(8,))
    found = overhead(job, load(job))
    parts = ("scheduler_share", "sampler_share", "detokenizer_share")
    assert all(0 < found[part] < 1 for part in parts)
    assert sum(found[part] for part in parts) == pytest.approx(found["outside_model_share"])


def test_context_rows_count_the_bytes_of_keys_and_values(model_path: Path) -> None:
    job = a_job(model_path, contexts=(16, 64))
    model = ModelConfig.from_checkpoint(model_path)
    rows = context_rows(job, load(job), model)
    per_token = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, head size, bytes
    assert [(row["batch"], row["context"], row["kv_bytes"]) for row in rows] == [
        (batch, context, batch * context * per_token) for batch in (1, 8) for context in (16, 64)
    ]
    assert all(row["step_s"] > 0 for row in rows)


def test_a_stopwatch_adds_up_only_what_it_stands_in_for() -> None:
    class Thing:
        def work(self, number: int) -> int:
            return number + 1

        def idle(self) -> None: ...

    thing = Thing()
    watch = Stopwatch(thing, "work")
    thing.idle()
    assert watch.seconds == 0
    assert thing.work(1) == 2
    assert watch.seconds > 0
