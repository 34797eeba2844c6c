"""AWQ and GPTQ checkpoints that contradict themselves, or are of a form that nobody here reads."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.loading import load_runner
from support.packed_checkpoints import PACKABLE, Packing, write_packed_checkpoint
from support.tiny_model import hf_config_json

AWQ = Packing(method="awq")
SYMMETRIC = Packing(method="gptq", symmetric=True)
ONE_LAYER = replace(PACKABLE, n_layers=1)


def settings() -> EngineConfig:
    return EngineConfig(dtype="float32", device="cpu", num_blocks=32, backend="reference")


def rewritten(folder: Path, name: str, change: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    stored[name] = change(stored[name])
    save_file(stored, folder / "model.safetensors")


def test_zero_points_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, SYMMETRIC, ONE_LAYER)
    name = "model.layers.0.self_attn.o_proj.qzeros"
    rewritten(tmp_path, name, lambda words: words + 1)
    with pytest.raises(CheckpointError, match=r"wo\.weight: zero points differ from 8"):
        load_runner(tmp_path, settings())


def test_groups_out_of_range_are_refused(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, SYMMETRIC, ONE_LAYER)
    name = "model.layers.0.self_attn.o_proj.g_idx"
    rewritten(tmp_path, name, lambda groups: groups + 1)
    with pytest.raises(CheckpointError, match=r"o_proj\.g_idx: names groups 1 to 2 of 2"):
        load_runner(tmp_path, settings())


def test_a_bias_may_be_there_as_long_as_it_is_zero(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, SYMMETRIC, ONE_LAYER)
    stored = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.0.self_attn.o_proj.bias"
    save_file(stored | {bias: torch.zeros(128)}, tmp_path / "model.safetensors")
    load_runner(tmp_path, settings())
    save_file(stored | {bias: torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{bias}: is not zero")):
        load_runner(tmp_path, settings())


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, ONE_LAYER)
    stored = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    save_file({n: t for n, t in stored.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} is missing")):
        load_runner(tmp_path, settings())


def test_a_number_of_bits_that_the_tensors_deny_is_found_at_their_shape(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, Packing(method="gptq", bits=8), ONE_LAYER)
    said = {"quantization_config": SYMMETRIC.quantization_config}
    (tmp_path / "config.json").write_text(json.dumps(hf_config_json(ONE_LAYER) | said))
    with pytest.raises(
        CheckpointError, match=r"qweight has shape \[32, 256\], expected \[16, 256\]"
    ):
        load_runner(tmp_path, settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': must be awq or gptq"),
        ({"version": "gemv"}, "version='gemv': must be gemm"),
        ({"bits": 3}, "bits=3: must be 4, for AWQ"),
        ({"group_size": 0}, "group_size=0: must be"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin': must be gptq or"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "'marlin': must be gptq or"),
    ],
)
def test_forms_that_nobody_reads_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_packed_checkpoint(tmp_path, AWQ, ONE_LAYER)
    said = {"quantization_config": AWQ.quantization_config | change}
    (tmp_path / "config.json").write_text(json.dumps(hf_config_json(ONE_LAYER) | said))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_checkpoint(tmp_path)


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, ONE_LAYER)
    for broken in (b"", b"\xff" * 64, b"\x04" + b"\0" * 7 + b"oops"):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(CheckpointError, match="no readable list of tensors"):
            ModelConfig.from_checkpoint(tmp_path)
