import json
import math
from pathlib import Path
from typing import Any

import pytest

from mixfleet_engine.config import EngineConfig, ModelConfig, Shard, checkpoint_layout
from mixfleet_engine.errors import CheckpointError, ConfigError
from support.tiny_model import hf_config_json, params_json, tiny_config

MIXTRAL_8X7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


def write(folder: Path, file: str, content: Any) -> Path:
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"shared_experts": True}])
def test_config_json_gives_back_what_was_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    write(tmp_path, "config.json", hf_config_json(config))
    assert ModelConfig.from_checkpoint(tmp_path) == config


def test_params_json_gives_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, "params.json", params_json(tiny_config()))
    assert ModelConfig.from_checkpoint(tmp_path) == tiny_config()


def test_published_params_json_of_8x7b_gets_the_published_rope_theta_and_context(
    tmp_path: Path,
) -> None:
    config = ModelConfig.from_checkpoint(write(tmp_path, "params.json", MIXTRAL_8X7B))
    assert (config.rope_theta, config.context_length) == (1e6, 32768)
    assert (config.dim, config.num_experts, config.experts_per_token) == (4096, 8, 2)
    assert config.kv_values_per_token * 2 == 128 * 1024, "facts: 128 KiB of bf16 per token"


def test_8x22b_shape_has_the_64k_context_it_was_trained_with(tmp_path: Path) -> None:
    params = MIXTRAL_8X7B | {"dim": 6144, "n_layers": 56, "n_heads": 48}
    config = ModelConfig.from_checkpoint(write(tmp_path, "params.json", params))
    assert config.context_length == 65536


def test_unknown_shape_without_a_stated_context_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = MIXTRAL_8X7B | {"n_layers": 3}
    config = ModelConfig.from_checkpoint(write(tmp_path, "params.json", params))
    assert config.context_length == 32768
    assert "max_seq_len" in caplog.text


def test_rope_theta_is_found_where_transformers_5_writes_it(tmp_path: Path) -> None:
    found = hf_config_json(tiny_config())
    del found["rope_theta"]
    found["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    write(tmp_path, "config.json", found)
    assert ModelConfig.from_checkpoint(tmp_path).rope_theta == 12345.0


def test_missing_head_dim_is_the_width_over_the_heads(tmp_path: Path) -> None:
    found = hf_config_json(tiny_config()) | {"head_dim": None}
    write(tmp_path, "config.json", found)
    assert ModelConfig.from_checkpoint(tmp_path).head_dim == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"num_hidden_layers": 0}, "n_layers=0"),
    ],
)
def test_models_that_this_engine_does_not_run_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    write(tmp_path, "config.json", hf_config_json(tiny_config()) | change)
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_checkpoint(tmp_path)


def test_dense_params_json_is_refused(tmp_path: Path) -> None:
    params = {name: value for name, value in MIXTRAL_8X7B.items() if name != "moe"}
    with pytest.raises(ConfigError, match="moe"):
        ModelConfig.from_checkpoint(write(tmp_path, "params.json", params))


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_broken_json_is_a_checkpoint_error_that_names_the_file(
    tmp_path: Path, content: str
) -> None:
    write(tmp_path, "params.json", content)
    with pytest.raises(CheckpointError, match=r"params\.json"):
        ModelConfig.from_checkpoint(tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        checkpoint_layout(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_layout(tmp_path / "absent")


def test_a_hub_snapshot_with_both_layouts_is_read_as_hugging_faces(tmp_path: Path) -> None:
    for file in ("config.json", "params.json", "model-00001-of-00002.safetensors"):
        (tmp_path / file).touch()
    assert checkpoint_layout(tmp_path) == "hf"


def test_a_config_json_beside_consolidated_files_does_not_make_it_hugging_faces(
    tmp_path: Path,
) -> None:
    for file in ("config.json", "params.json", "consolidated.safetensors"):
        (tmp_path / file).touch()
    assert checkpoint_layout(tmp_path) == "mistral"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"threads": -1}, "threads=-1"),
        ({"threads": 100_000}, "threads=100000: must be at most 1024"),
        ({"itl_target_s": math.inf}, "itl_target_s=inf"),
        ({"weight_dtype": "int2"}, "weight_dtype='int2'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"backend": "tpu"}, "backend='tpu'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"num_blocks": 1, "kv_cache_bytes": 1}, "set one"),
        ({"max_batch_size": 8, "max_step_tokens": 7}, "max_step_tokens=7"),
    ],
)
def test_impossible_settings_name_themselves(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig(**settings)


@pytest.mark.parametrize("value", [math.inf, 32000.5, 0, "32000"])
def test_sizes_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"vocab_size={value!r}: must be a whole number"):
        tiny_config(vocab_size=value)


def test_context_may_be_shorter_than_the_models_but_not_longer() -> None:
    model = tiny_config(context_length=512)
    assert EngineConfig().context_of(model) == 512
    assert EngineConfig(context_length=100).context_of(model) == 100
    with pytest.raises(ConfigError, match="context_length=513: the model has 512"):
        EngineConfig(context_length=513).context_of(model)


def test_a_process_alone_holds_all() -> None:
    assert Shard() == Shard(rank=0, world=1)


@pytest.mark.parametrize(
    ("rank", "world", "named"),
    [(0, 0, "world=0"), (1, 1, "rank=1: must be 0 to 0"), (-1, 2, "rank=-1"), (2, 2, "rank=2")],
)
def test_a_rank_that_cannot_be_is_refused(rank: int, world: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Shard(rank=rank, world=world)
