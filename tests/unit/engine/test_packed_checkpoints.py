"""AWQ and GPTQ checkpoints run as the float model that their numbers stand for."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixfleet_engine.checkpoint_names import hf_name
from mixfleet_engine.config import Backend, EngineConfig, ModelConfig, Shard, WeightDtype
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.loading import load_engine, load_runner
from mixfleet_engine.plan import weight_bytes
from mixfleet_engine.quantise import Int4Weight, Int8Weight, dequantise, quantise
from mixfleet_engine.sharding import WHOLE, WeightCuts, working_sizes
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import open_checkpoint, weight_shapes
from support.dense_mixtral import dense_greedy, dense_logits
from support.engine_requests import make_request, run_to_end
from support.native_cases import native_library
from support.packed_checkpoints import PACKABLE, Packing, write_packed_checkpoint
from support.plans import chunk, plan
from support.tiny_model import tiny_config, write_hf_checkpoint

CPU = torch.device("cpu")
AWQ = Packing(method="awq")
SYMMETRIC = Packing(method="gptq", symmetric=True)
RUN_AS_THEY_ARE = [
    AWQ,
    Packing(method="awq", symmetric=True),
    Packing(method="awq", group_size=256),
    SYMMETRIC,
    Packing(method="gptq"),
    Packing(method="gptq", checkpoint_format="gptq_v2"),
    Packing(method="gptq", group_size=-1, writes_g_idx=False),
]
CONVERTED = [
    Packing(method="awq", group_size=32),
    Packing(method="gptq", bits=8, symmetric=True),
    Packing(method="gptq", bits=8, group_size=32),
    Packing(method="gptq", desc_act=True),
]
PROMPT = [7, 3, 250, 96, 11]
ONE_LAYER = replace(PACKABLE, n_layers=1)


def settings(backend: Backend = "reference", **changes: Any) -> EngineConfig:
    return EngineConfig(
        **{"dtype": "float32", "device": "cpu", "num_blocks": 32, "backend": backend, **changes}
    )


def loader_of(
    folder: Path, shard: Shard | None = None, weight_dtype: WeightDtype = "auto"
) -> tuple[WeightLoader, ModelConfig]:
    model = ModelConfig.from_checkpoint(folder)
    loader = WeightLoader(
        open_checkpoint(folder, model),
        model,
        dtype=torch.float32,
        device=CPU,
        weight_dtype=weight_dtype,
        shard=shard,
    )
    return loader, model


def matrices(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in weight_shapes(model).items():
        if is_matrix(name):
            yield name, shape


def is_matrix(name: str) -> bool:
    return re.search(r"\.w[qkvo123]\.weight$", name) is not None


@pytest.mark.parametrize("packing", RUN_AS_THEY_ARE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_answers_are_those_of_the_float_model(
    packing: Packing, backend: Backend, tmp_path: Path
) -> None:
    tensors = write_packed_checkpoint(tmp_path, packing)
    engine = load_engine(tmp_path, settings(backend))
    answers = run_to_end(engine, [make_request("r", prompt=PROMPT, max_tokens=16)])
    output = list(answers["r"][0])
    assert len(set(output)) > 4
    assert dense_greedy(PACKABLE, tensors, PROMPT, output) == output


@pytest.mark.parametrize("packing", RUN_AS_THEY_ARE, ids=str)
def test_every_number_is_the_one_that_was_packed(packing: Packing, tmp_path: Path) -> None:
    tensors = write_packed_checkpoint(tmp_path, packing, ONE_LAYER)
    loader, model = loader_of(tmp_path)
    for name, _ in matrices(model):
        weight = loader.matrix(name)
        assert isinstance(weight, Int4Weight)
        assert (weight.zeros is None) == packing.symmetric
        assert torch.equal(dequantise(weight, torch.float32), tensors[hf_name(name)]), name


@pytest.mark.parametrize("packing", RUN_AS_THEY_ARE, ids=str)
def test_two_ranks_have_both_halves_of_every_matrix(packing: Packing, tmp_path: Path) -> None:
    tensors = write_packed_checkpoint(tmp_path, packing, ONE_LAYER)
    for rank in range(2):
        shard = Shard(rank=rank, world=2)
        loader, model = loader_of(tmp_path, shard)
        cuts = WeightCuts(model, shard)
        for name, shape in matrices(model):
            found = dequantise(loader.matrix(name), torch.float32)
            assert torch.equal(found, tensors[hf_name(name)][cuts.of(name, shape)]), name


@pytest.mark.parametrize("packing", CONVERTED + RUN_AS_THEY_ARE, ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_another_weight_dtype_is_made_of_the_numbers_meant(
    packing: Packing, world: int, tmp_path: Path
) -> None:
    tensors = write_packed_checkpoint(tmp_path, packing, ONE_LAYER)
    shard = Shard(rank=world - 1, world=world)
    loader, model = loader_of(tmp_path, shard, "int8")
    cuts = WeightCuts(model, shard)
    for name, shape in matrices(model):
        found = loader.matrix(name)
        expected = quantise(tensors[hf_name(name)][cuts.of(name, shape)], "int8", name)
        assert isinstance(found, Int8Weight)
        assert isinstance(expected, Int8Weight)
        assert torch.equal(found.values, expected.values), name
        assert torch.equal(found.scales, expected.scales), name


def test_a_cut_may_go_through_a_word(tmp_path: Path) -> None:
    for packing in (AWQ, Packing(method="gptq")):
        tensors = write_packed_checkpoint(tmp_path / str(packing), packing, ONE_LAYER)
        model = ModelConfig.from_checkpoint(tmp_path / str(packing))
        checkpoint = open_checkpoint(tmp_path / str(packing), model)
        name = "layers.0.feed_forward.experts.1.w2.weight"
        for rows, columns in [(slice(3, 21), WHOLE), (WHOLE, slice(5, 141)), (slice(1, 2),) * 2]:
            found = checkpoint.read(name, rows, columns)
            assert not isinstance(found, Tensor)
            expected = tensors[hf_name(name)][rows, columns]
            assert torch.equal(found.dequantised(torch.float32), expected), (packing, rows)


def test_int4_keeps_symmetric_numbers_and_makes_asymmetric_ones_symmetric(tmp_path: Path) -> None:
    name = "layers.0.attention.wo.weight"
    for packing in (SYMMETRIC, AWQ):
        tensors = write_packed_checkpoint(tmp_path / str(packing), packing, ONE_LAYER)
        weight = loader_of(tmp_path / str(packing), None, "int4")[0].matrix(name)
        assert isinstance(weight, Int4Weight)
        assert weight.zeros is None
        is_exact = torch.equal(dequantise(weight, torch.float32), tensors[hf_name(name)])
        assert is_exact == packing.symmetric


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (CONVERTED[0], "awq checkpoint with group_size=32: only multiples of 128"),
        (CONVERTED[1], "gptq checkpoint with bits=8: only 4 bits"),
        (CONVERTED[3], "not 128 neighbouring inputs each share a scale"),
    ],
    ids=str,
)
def test_what_cannot_be_run_as_it_is_says_what_to_set(
    packing: Packing, message: str, tmp_path: Path
) -> None:
    write_packed_checkpoint(tmp_path, packing, replace(ONE_LAYER, hidden_dim=384))
    with pytest.raises(ConfigError, match=f"{message}.*weight_dtype=int8"):
        load_runner(tmp_path, settings())
    load_runner(tmp_path, settings(weight_dtype="int8"))


def test_what_is_packed_is_read_from_the_files_tensor_by_tensor(tmp_path: Path) -> None:
    plain = ("layers.0.block_sparse_moe.experts.2.", "layers.1.self_attn")
    tensors = write_packed_checkpoint(tmp_path, AWQ, plain=plain)
    loader, model = loader_of(tmp_path)
    for name, _ in matrices(model):
        weight = loader.matrix(name)
        is_plain = any(part in hf_name(name) for part in plain)
        assert isinstance(weight, Tensor) == is_plain, name
        assert torch.equal(dequantise(weight, torch.float32), tensors[hf_name(name)]), name


def test_a_packed_router_is_unpacked(tmp_path: Path) -> None:
    tensors = write_packed_checkpoint(tmp_path, AWQ, replace(ONE_LAYER, num_experts=8))
    w1 = "model.layers.0.block_sparse_moe.experts.0.w1"
    gate = "model.layers.0.block_sparse_moe.gate"
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{gate}.weight"]
    for part, rows in (("qweight", 1), ("qzeros", 1), ("scales", 8)):
        stored[f"{gate}.{part}"] = stored[f"{w1}.{part}"][:, :rows].clone()
    save_file(stored, tmp_path / "model.safetensors")
    loader, _ = loader_of(tmp_path)
    found = loader.tensor("layers.0.feed_forward.gate.weight")
    assert torch.equal(found, tensors[f"{w1}.weight"][:8])


def test_matrices_that_run_as_one_must_have_one_form(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, ONE_LAYER, plain=["v_proj"])
    message = (
        r"wk\.weight Int4Weight with zero points, layers\.0\.attention\.wv\.weight plain float32"
    )
    with pytest.raises(ConfigError, match=message):
        load_runner(tmp_path, settings())
    load_runner(tmp_path, settings(weight_dtype="int8"))


@pytest.mark.parametrize("packing", [AWQ, SYMMETRIC], ids=str)
@pytest.mark.parametrize("plain", [(), ("layers.0.self_attn", "experts.1.")], ids=len)
def test_the_plan_counts_what_the_weights_take(
    packing: Packing, plain: tuple[str, ...], tmp_path: Path
) -> None:
    write_packed_checkpoint(tmp_path, packing, plain=plain)
    loader, model = loader_of(tmp_path)
    taken = 0
    for name in weight_shapes(model):
        weight = loader.matrix(name) if is_matrix(name) else loader.tensor(name)
        if isinstance(weight, Int4Weight):
            parts = (weight.values, weight.scales, weight.zeros)
            taken += sum(part.nbytes for part in parts if part is not None)
        else:
            assert isinstance(weight, Tensor)
            taken += 2 * weight.numel()
    assert weight_bytes(model, packing.method) == taken


def test_sizes_that_cut_a_group_are_refused_before_loading(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, SYMMETRIC, replace(ONE_LAYER, n_heads=4, n_kv_heads=4))
    model = ModelConfig.from_checkpoint(tmp_path)
    assert working_sizes(model) == [1]
    assert working_sizes(model, weight_dtype="int8") == [1, 2, 4]


def test_native_runs_symmetric_numbers_and_auto_leaves_it_for_others(tmp_path: Path) -> None:
    native = {"dtype": "bfloat16", "block_size": 16}
    tensors = write_packed_checkpoint(tmp_path / "sym", SYMMETRIC)
    native_library()
    runner = load_runner(tmp_path / "sym", settings("native", **native))
    found = runner.logits(plan(chunk(PROMPT, block_table=[3])))[0]
    expected = dense_logits(PACKABLE, tensors, PROMPT)[-1].float()
    assert (found - expected).norm() < 0.08 * expected.norm()
    write_packed_checkpoint(tmp_path / "asym", AWQ)
    with pytest.raises(ConfigError, match="backend='native': int4 weights with zero points"):
        load_runner(tmp_path / "asym", settings("native", **native))
    runner = load_runner(tmp_path / "asym", settings("auto", **native))
    assert runner.logits(plan(chunk(PROMPT, block_table=[3]))).isfinite().all()


def test_what_is_packed_is_read_from_an_index_as_well(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, ONE_LAYER)
    from_header = ModelConfig.from_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(stored, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ModelConfig.from_checkpoint(tmp_path) == from_header
    assert from_header.packed is not None
    assert len(from_header.packed.names) == 4 + 3 * PACKABLE.num_experts


def test_a_plain_checkpoint_has_nothing_packed(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, tiny_config(n_layers=1))
    assert ModelConfig.from_checkpoint(folder).packed is None
