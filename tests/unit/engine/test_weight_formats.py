import math
from typing import Any

import pytest
import torch

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.published import PUBLISHED
from mixfleet_engine.weight_formats import (
    INT4_GROUP,
    KV_BYTES,
    PLAIN_BYTES,
    WEIGHT_DTYPES,
    format_of,
    stored_bytes,
    weight_kinds,
)
from mixfleet_engine.weights import weight_shapes
from support.tiny_model import tiny_config

MATRICES = (
    "layers.0.attention.wq.weight",
    "layers.31.attention.wk.weight",
    "layers.7.attention.wv.weight",
    "layers.7.attention.wo.weight",
    "layers.12.feed_forward.experts.7.w1.weight",
    "layers.12.feed_forward.experts.0.w2.weight",
    "layers.12.feed_forward.experts.0.w3.weight",
)
NEVER = (
    "tok_embeddings.weight",
    "layers.0.attention_norm.weight",
    "layers.0.ffn_norm.weight",
    "layers.0.feed_forward.gate.weight",
    "norm.weight",
)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_matrices_of_attention_and_experts_are_quantised(name: str, dtype: str) -> None:
    assert format_of(name, dtype) == dtype


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_embedding_norms_and_routers_are_never_quantised(name: str, dtype: str) -> None:
    assert format_of(name, dtype) == "plain"


def test_the_output_matrix_has_no_fewer_than_eight_bits() -> None:
    formats = {dtype: format_of("output.weight", dtype) for dtype in ("fp8", "int8", "int4")}
    assert formats == {"fp8": "fp8", "int8": "int8", "int4": "int8"}


@pytest.mark.parametrize("name", [*MATRICES, *NEVER, "output.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floating_dtypes_quantise_nothing(name: str, dtype: str) -> None:
    assert format_of(name, dtype) == "plain"


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="weight_dtype='int2': must be one of float32, "):
        format_of("norm.weight", "int2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_plain_number_takes_what_torch_says(dtype: str) -> None:
    size = getattr(torch, dtype).itemsize
    assert PLAIN_BYTES[dtype] == KV_BYTES[dtype] == size
    assert stored_bytes("output.weight", (5, 7), dtype) == 35 * size


def test_fp8_of_the_kv_cache_takes_what_torch_says() -> None:
    assert KV_BYTES["fp8"] == torch.float8_e4m3fn.itemsize


@pytest.mark.parametrize(("dtype", "form"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_eight_bits_have_a_scale_per_row(dtype: str, form: torch.dtype) -> None:
    values, scales = torch.empty(48, 300, dtype=form), torch.empty(48)
    expected = values.nbytes + scales.nbytes
    assert stored_bytes(MATRICES[0], (48, 300), dtype) == expected


@pytest.mark.parametrize("columns", [128, 200, 256, 384])
def test_four_bits_have_a_scale_per_row_and_group(columns: int) -> None:
    groups = len(range(0, columns, INT4_GROUP))
    values = torch.empty(48, columns // 2, dtype=torch.uint8)
    expected = values.nbytes + torch.empty(48, groups).nbytes
    assert stored_bytes(MATRICES[-1], (48, columns), "int4") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"shared_experts": True},
        {"n_layers": 5, "num_experts": 3},
    ],
)
def test_kinds_are_the_weights_that_the_loader_looks_for(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    shapes = weight_shapes(config)
    kinds = weight_kinds(config)
    assert sum(kind.count for kind in kinds) == len(shapes)
    assert {kind.name: kind.shape for kind in kinds}.items() <= shapes.items()
    numbers = sum(kind.count * math.prod(kind.shape) for kind in kinds)
    assert numbers == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shares_of_all_ranks_make_the_whole(tp: int) -> None:
    for kind in weight_kinds(PUBLISHED["mixtral-8x7b"]):
        share = math.prod(kind.rank_shape(tp))
        assert share * (1 if kind.split is None else tp) == math.prod(kind.shape)


def test_a_vocabulary_that_does_not_divide_gives_the_largest_share() -> None:
    (embedding,) = (k for k in weight_kinds(tiny_config(vocab_size=511)) if "tok" in k.name)
    assert embedding.rank_shape(2) == (256, 64)
