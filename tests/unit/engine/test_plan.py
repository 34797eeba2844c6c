import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import ConfigError, DoesNotFitError
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.plan import (
    LEAST_TOKENS,
    MemoryPlan,
    auto_batch_size,
    engine_sizes,
    kv_bytes_per_token,
    num_parameters,
    plan_blocks,
    plan_memory,
    sharing_problem,
    weight_bytes,
)
from mixfleet_engine.published import PUBLISHED
from mixfleet_engine.weight_formats import format_of
from support.memory_machines import GIB, machine
from support.tiny_model import tiny_config, write_hf_checkpoint, write_mistral_checkpoint

SMALL, LARGE = PUBLISHED["mixtral-8x7b"], PUBLISHED["mixtral-8x22b"]
SIXTEEN_BITS = {"weight_dtype": "bfloat16", "kv_dtype": "bfloat16"}


def plan_of(model: ModelConfig = SMALL, gib: float = 200, **changes: Any) -> MemoryPlan:
    dtypes = {name: changes.pop(name, "bfloat16") for name in ("weight_dtype", "kv_dtype")}
    return plan_memory(model, machine(gib, **changes), **dtypes)


@pytest.mark.parametrize(("model", "gib"), [(SMALL, "86.99"), (LARGE, "261.94")])
def test_published_models_in_bf16_take_the_known_gibibytes(model: ModelConfig, gib: str) -> None:
    assert f"{weight_bytes(model, 'bfloat16') / GIB:.2f}" == gib
    assert weight_bytes(model, "bfloat16") == 2 * num_parameters(model)


@pytest.mark.parametrize(
    ("model", "dtype", "kib"),
    [
        (SMALL, "bfloat16", 128),
        (SMALL, "fp8", 64),
        (LARGE, "bfloat16", 224),
        (LARGE, "fp8", 112),
    ],
)
def test_published_models_add_the_known_kibibytes_per_token(
    model: ModelConfig, dtype: str, kib: int
) -> None:
    assert kv_bytes_per_token(model, dtype) == kib << 10


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"shared_experts": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_take_what_the_real_tensors_take(
    tmp_path: Path, changes: dict[str, Any], dtype: str
) -> None:
    folder = write_hf_checkpoint(tmp_path, tiny_config(**changes), dtype=getattr(torch, dtype))
    tensors = load_file(folder / "model.safetensors").values()
    config = ModelConfig.from_checkpoint(folder)
    assert num_parameters(config) == sum(tensor.numel() for tensor in tensors)
    assert weight_bytes(config, dtype) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_weights_take_what_tensors_of_their_forms_take(
    tmp_path: Path, dtype: str, tied: bool
) -> None:
    config = tiny_config(dim=256, tie_word_embeddings=tied)
    folder = write_mistral_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    tensors = load_file(folder / "consolidated.safetensors")
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    expected = sum(quantised_bytes(tensor, format_of(n, dtype)) for n, tensor in tensors.items())
    assert weight_bytes(config, dtype) == expected


def quantised_bytes(tensor: torch.Tensor, form: str) -> int:
    if form == "plain":
        return tensor.nbytes
    if form == "int4":
        groups = [part for row in tensor for part in row.split(128)]
        return sum(part.numel() // 2 + 4 for part in groups)
    return sum(row.to(torch.int8).nbytes + 4 for row in tensor)


def test_a_tied_output_is_counted_again_where_it_is_laid_out_anew() -> None:
    config = tiny_config(tie_word_embeddings=True)
    more = weight_bytes(config, "bfloat16", copies_output=True) - weight_bytes(config, "bfloat16")
    assert more == 2 * config.vocab_size * config.dim
    untied = tiny_config()
    assert weight_bytes(untied, "bfloat16", copies_output=True) == weight_bytes(untied, "bfloat16")
    on_cpu, on_gpu = (plan_of(config, kind=kind).weight_bytes for kind in ("cpu", "cuda"))
    assert on_cpu - on_gpu == more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_bytes_are_those_of_the_real_cache(dtype: str) -> None:
    config = tiny_config()
    cache = KvCache(
        config,
        num_blocks=3,
        block_size=16,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    layers = [cache.layer(number) for number in range(config.n_layers)]
    held = sum(keys.nbytes + values.nbytes for keys, values in layers)
    assert 3 * 16 * kv_bytes_per_token(config, dtype) == held


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_ranks_together_hold_the_model_and_what_is_on_each(tp: int, dtype: str) -> None:
    whole, shared = weight_bytes(SMALL, dtype), tp * weight_bytes(SMALL, dtype, tp)
    norms_and_routers = 2 * (65 * SMALL.dim + 32 * 8 * SMALL.dim)
    scales_of_split_rows = 0
    if dtype == "int8":  # wo and w2 are split inside their rows, so each rank scales each row
        scales_of_split_rows = 4 * 32 * (1 + 8) * SMALL.dim
    assert shared - whole == (tp - 1) * (norms_and_routers + scales_of_split_rows)
    assert tp * kv_bytes_per_token(SMALL, "bfloat16", tp) == 128 << 10


@pytest.mark.parametrize(
    ("model", "tp", "named"),
    [
        (SMALL, 3, "tp=3: 3 ranks cannot share n_heads=32 equally"),
        (SMALL, 16, "tp=16: 16 ranks cannot share n_kv_heads=8 equally"),
        (tiny_config(hidden_dim=97), 2, "tp=2: 2 ranks cannot share hidden_dim=97 equally"),
        (SMALL, 0, "tp=0: "),
    ],
)
def test_a_group_that_cannot_share_the_heads_is_refused_with_the_numbers(
    model: ModelConfig, tp: int, named: str
) -> None:
    assert (sharing_problem(model, tp) or "").startswith(named)
    with pytest.raises(ConfigError, match=named):
        weight_bytes(model, "bfloat16", tp)
    with pytest.raises(ConfigError, match=named):
        kv_bytes_per_token(model, "bfloat16", tp)
    with pytest.raises(ConfigError, match=named):
        plan_memory(model, machine(80, num_devices=tp), **SIXTEEN_BITS)


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(ConfigError, match="weight_dtype='int3'"):
        plan_of(weight_dtype="int3")
    with pytest.raises(ConfigError, match="kv_dtype='int8': must be one of float32, bfloat16"):
        plan_of(kv_dtype="int8")


def test_a_gpu_keeps_six_percent_and_two_gibibytes() -> None:
    plan = plan_of(gib=100)
    assert plan.reserve_bytes == pytest.approx(8 * GIB, abs=1)
    assert plan.kv_bytes == 100 * GIB - plan.reserve_bytes - plan.weight_bytes
    assert plan.kv_tokens == plan.kv_bytes // (128 << 10)


def test_a_cpu_keeps_ten_percent_and_room_to_pack_the_largest_matrix() -> None:
    plan = plan_of(gib=200, kind="cpu")
    packing = 2 * torch.empty(32_000, 4096, dtype=torch.bfloat16, device="meta").nbytes
    assert plan.reserve_bytes == pytest.approx(20 * GIB + GIB // 2 + packing, abs=1)


def test_the_largest_matrix_of_a_small_model_is_its_vocabulary() -> None:
    wide = tiny_config(vocab_size=50_000)
    growth = (
        plan_of(wide, kind="cpu").reserve_bytes - plan_of(tiny_config(), kind="cpu").reserve_bytes
    )
    assert growth == 2 * 2 * 64 * (50_000 - 512)


def test_what_others_use_is_not_there() -> None:
    whole, used = plan_of(gib=120), plan_of(gib=200, free_gib=120)
    assert used.kv_tokens == whole.kv_tokens
    assert used.reserve_bytes == whole.reserve_bytes


def test_a_model_fits_from_the_least_useful_cache_on() -> None:
    gib = (86.99073 + 2 + LEAST_TOKENS / (1 << 13)) / 0.94  # 128 KiB each
    below, above = (plan_of(gib=gib + more) for more in (-0.001, 0.001))
    assert (below.fits, above.fits) == (False, True)
    assert above.kv_tokens == pytest.approx(LEAST_TOKENS, abs=16)
    assert (below.sequences(512), above.sequences(512)) == (0, 2)
    assert below.needed_bytes > below.machine.memory_bytes


def test_sequences_are_full_ones() -> None:
    plan = plan_of(gib=100)
    for context in (8192, 32_768):
        count = plan.sequences(context)
        assert count * context <= plan.kv_tokens < (count + 1) * context


@given(
    gib=st.floats(1, 700),
    tp=st.sampled_from([1, 2, 4, 8]),
    kind=st.sampled_from(["cuda", "cpu"]),
    dtype=st.sampled_from(["float32", "bfloat16", "fp8", "int8", "int4"]),
    kv_dtype=st.sampled_from(["bfloat16", "fp8"]),
)
def test_a_plan_never_gives_out_more_than_there_is(
    gib: float, tp: int, kind: Any, dtype: str, kv_dtype: str
) -> None:
    plan = plan_of(gib=gib, num_devices=tp, kind=kind, weight_dtype=dtype, kv_dtype=kv_dtype)
    cache = plan.kv_tokens * plan.kv_bytes_per_token
    if plan.fits:
        assert plan.weight_bytes + plan.reserve_bytes + cache <= plan.machine.memory_bytes
        assert plan.needed_bytes <= plan.machine.memory_bytes
        assert auto_batch_size(plan, 1024) >= 1
    else:
        assert plan.needed_bytes > plan.machine.memory_bytes
        assert plan.sequences(LEAST_TOKENS) == 0


@pytest.mark.parametrize(
    ("gib", "kind", "context", "expected"),
    [
        (120, "cuda", 32_768, 23),  # 23.8 GiB of cache: 195 K tokens over 8 K
        (120, "cuda", 2048, 256),
        (120, "cuda", 1, 256),
        (97, "cuda", 32_768, 2),
        (200, "cpu", 2048, 32),
        (110, "cpu", 32_768, 11),
        (60, "cuda", 32_768, 1),  # does not even fit
    ],
)
def test_auto_batch_size_takes_sequences_to_be_a_quarter_full(
    gib: float, kind: Any, context: int, expected: int
) -> None:
    plan = plan_of(gib=gib, kind=kind)
    assert auto_batch_size(plan, context) == expected
    if 1 < expected < (256 if kind == "cuda" else 32):
        assert expected == math.floor(plan.kv_bytes / (128 << 10) / (context / 4))


def blocks(plan: MemoryPlan, **changes: Any) -> int:
    return plan_blocks(plan, **{"block_size": 16, "context": 8192, "max_batch_size": 8} | changes)


def test_a_gpu_gets_blocks_for_a_full_batch() -> None:
    assert blocks(plan_of(gib=200)) == 8 * 8192 // 16
    assert blocks(plan_of(gib=200), context=8190) == 8 * 512, "each sequence has its own last block"


def test_a_gpu_gets_no_more_blocks_than_fit() -> None:
    plan = plan_of(gib=100)
    assert blocks(plan, max_batch_size=256) == plan.kv_tokens // 16


@pytest.mark.parametrize(
    ("model", "context", "max_batch_size", "expected_bytes"),
    [
        (tiny_config(), 512, 8, 8 * 512 * 256),  # a full batch is less than 2 GiB
        (SMALL, 32_768, 1, 4 * GIB),  # one full context
        (SMALL, 32_768, 16, 16 * GIB),  # sixteen quarters of it
        (SMALL, 2048, 16, 2 * GIB),
        (SMALL, 32_768, 64, 40 * GIB),  # what fits
    ],
)
def test_a_cpu_keeps_memory_for_others(
    model: ModelConfig, context: int, max_batch_size: int, expected_bytes: int
) -> None:
    gib = 0.1 + (87 + 0.5 + 2 * 0.21875 + 40) / 0.9
    plan = plan_of(model, gib=gib, kind="cpu")
    block_bytes = 16 * plan.kv_bytes_per_token
    found = blocks(plan, context=context, max_batch_size=max_batch_size) * block_bytes
    assert found == pytest.approx(expected_bytes, rel=0.01)


def test_what_is_set_is_what_is_made() -> None:
    plan = plan_of(gib=100)
    assert blocks(plan, num_blocks=7) == 7
    assert blocks(plan, kv_cache_bytes=7 * 16 * (128 << 10) + 1) == 7


def test_a_cache_that_was_set_too_large_is_refused_with_the_numbers() -> None:
    plan = plan_of(gib=100)
    with pytest.raises(DoesNotFitError, match=r"6\.00 GiB needed, 5\.01 GiB available") as error:
        blocks(plan, kv_cache_bytes=6 * GIB)
    assert error.value.needed_bytes == 6 * GIB
    assert error.value.available_bytes == plan.kv_bytes
    with pytest.raises(DoesNotFitError):
        blocks(plan, num_blocks=plan.kv_tokens // 16 + 1)


def test_a_cache_of_no_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match="1000 bytes of KV cache hold no block, which takes 2097152"
    ):
        blocks(plan_of(gib=100), kv_cache_bytes=1000)


def test_settings_left_open_come_from_the_plan() -> None:
    plan = plan_of(gib=120)
    sizes = engine_sizes(plan, EngineConfig(max_batch_size=None), SMALL)
    assert sizes.max_batch_size == auto_batch_size(plan, 32_768) == 23
    assert sizes.num_blocks == plan.kv_tokens // 16
    shorter = engine_sizes(plan, EngineConfig(max_batch_size=None, context_length=8192), SMALL)
    assert shorter.max_batch_size == auto_batch_size(plan, 8192)


def test_settings_that_are_made_stay() -> None:
    config = EngineConfig(max_batch_size=3, context_length=1000, block_size=8)
    sizes = engine_sizes(plan_of(gib=120), config, SMALL)
    assert (sizes.max_batch_size, sizes.num_blocks) == (3, 3 * 125)
    stated = EngineConfig(max_batch_size=3, num_blocks=11)
    assert engine_sizes(plan_of(gib=120), stated, SMALL).num_blocks == 11


def test_an_automatic_batch_can_step() -> None:
    config = EngineConfig(max_batch_size=None, max_step_tokens=20)
    assert engine_sizes(plan_of(gib=120), config, SMALL).max_batch_size == 20
