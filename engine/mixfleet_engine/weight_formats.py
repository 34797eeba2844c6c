"""How every weight is held under each weight dtype: the one table that planner and loader share.

Torch-free. Names are the engine's own, which are Mistral's: ``layers.0.attention.wq.weight``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.packed_format import OWN_GROUP, PackedFormat

WeightFormat = Literal["plain", "fp8", "int8", "int4"]

INT4_GROUP: Final = OWN_GROUP
"""Neighbours in a row of an int4 matrix that share a scale."""
SCALE_BYTES: Final = 4
"""One fp32 scale: per output row of fp8 and int8, per group of int4."""
ZERO_BYTES: Final = 4
"""One fp32 zero point per group of int4, if it comes from a checkpoint that has them."""

PLAIN_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 2, "int8": 2, "int4": 2}
)
"""Weight dtype -> bytes of a number that is not quantised; beside quantised ones it is bf16."""
WEIGHT_DTYPES: Final = tuple(PLAIN_BYTES)
KV_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
)
"""KV dtype -> bytes of one number of the KV cache."""

_PARTS: Final = (
    ("attention", re.compile(r"layers\.\d+\.attention\.w[qkvo]\.weight")),
    ("experts", re.compile(r"layers\.\d+\.feed_forward\.experts\.\d+\.w[123]\.weight")),
    ("output", re.compile(r"output\.weight")),
)
"""The matrices that may be quantised. Embedding, norms and routers never are: the first is only
looked up, the others are small, and a router's rounding would change the choice of experts."""

_NUMBER: Final = re.compile(r"\.\d+\.")

_FORMATS: Final[Mapping[str, Mapping[str, WeightFormat]]] = MappingProxyType(
    {
        "fp8": {"attention": "fp8", "experts": "fp8", "output": "fp8"},
        "int8": {"attention": "int8", "experts": "int8", "output": "int8"},
        # Errors of the output matrix go straight into the logits, and it is small.
        "int4": {"attention": "int4", "experts": "int4", "output": "int8"},
    }
)


def format_of(weight_name: str, weight_dtype: str) -> WeightFormat:
    """Return how the weight ``weight_name`` is held in a model of ``weight_dtype``.

    A plain weight has the dtype that the engine computes in, a router fp32.

    Raises:
        ConfigError: There is no such weight dtype.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ConfigError(
            f"weight_dtype={weight_dtype!r}: must be one of {', '.join(WEIGHT_DTYPES)}"
        )
    for part, names in _PARTS:
        if names.fullmatch(weight_name):
            return _FORMATS.get(weight_dtype, {}).get(part, "plain")
    return "plain"


def stored_bytes(weight_name: str, shape: tuple[int, ...], weight_dtype: str) -> int:
    """Return the bytes of one weight of ``shape`` ``[rows, columns]``, scales included.

    Worked example, int4 and ``[2, 200]``: 200 bytes of 4-bit numbers, and per row the two groups
    of 128 and 72 numbers with a scale of 4 bytes each, so 216.
    """
    count = math.prod(shape)
    match format_of(weight_name, weight_dtype):
        case "plain":
            return count * PLAIN_BYTES[weight_dtype]
        case "int4":
            rows, columns = shape
            return -(-count // 2) + rows * -(-columns // INT4_GROUP) * SCALE_BYTES
        case _:
            return count + shape[0] * SCALE_BYTES


def packed_bytes(shape: tuple[int, ...], packed: PackedFormat) -> int:
    """Return the bytes of one matrix of an AWQ or GPTQ checkpoint that is run as it is."""
    rows, columns = shape
    per_group = SCALE_BYTES + (ZERO_BYTES if packed.has_zeros else 0)
    return -(-rows * columns // 2) + rows * -(-columns // INT4_GROUP) * per_group


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightKind:
    """Weights of one kind, all of one shape: the ``wq`` of all layers, say."""

    name: str
    """Of the first of them."""
    shape: tuple[int, ...]
    """Of one of them, whole."""
    count: int
    split: Literal[0, 1] | None
    """The axis along which the ranks of a tensor-parallel group share it; None: each has all."""

    def rank_shape(self, tp: int) -> tuple[int, ...]:
        """Return the shape of the largest share when ``tp`` ranks share one of them."""
        if self.split is None:
            return self.shape
        shares = list(self.shape)
        shares[self.split] = -(-shares[self.split] // tp)
        return tuple(shares)


def kind_name(weight_name: str) -> str:
    """Return the name of the kind that a weight belongs to: of the first of them."""
    return _NUMBER.sub(".0.", weight_name)


def weight_kinds(model: ModelConfig) -> tuple[WeightKind, ...]:
    """Return all weights of a model, by kind."""
    q_width, kv_width = (n * model.head_dim for n in (model.n_heads, model.n_kv_heads))
    num_experts = 1 if model.shared_experts else model.num_experts
    experts = model.n_layers * num_experts
    up, down = (model.hidden_dim, model.dim), (model.dim, model.hidden_dim)
    in_layers: tuple[tuple[str, tuple[int, ...], int, Literal[0, 1] | None], ...] = (
        ("attention_norm", (model.dim,), model.n_layers, None),
        ("attention.wq", (q_width, model.dim), model.n_layers, 0),
        ("attention.wk", (kv_width, model.dim), model.n_layers, 0),
        ("attention.wv", (kv_width, model.dim), model.n_layers, 0),
        ("attention.wo", (model.dim, q_width), model.n_layers, 1),
        ("ffn_norm", (model.dim,), model.n_layers, None),
        ("feed_forward.gate", (model.num_experts, model.dim), model.n_layers, None),
        ("feed_forward.experts.0.w1", up, experts, 0),
        ("feed_forward.experts.0.w2", down, experts, 1),
        ("feed_forward.experts.0.w3", up, experts, 0),
    )
    vocabulary = (model.vocab_size, model.dim)
    outside = [WeightKind(name="tok_embeddings.weight", shape=vocabulary, count=1, split=0)]
    outside.append(WeightKind(name="norm.weight", shape=(model.dim,), count=1, split=None))
    if not model.tie_word_embeddings:
        outside.append(output_kind(model))
    return (
        *(
            WeightKind(name=f"layers.0.{name}.weight", shape=shape, count=count, split=split)
            for name, shape, count, split in in_layers
        ),
        *outside,
    )


def output_kind(model: ModelConfig) -> WeightKind:
    """Return the output matrix, which a tied model has only where it is held a second time."""
    shape = (model.vocab_size, model.dim)
    return WeightKind(name="output.weight", shape=shape, count=1, split=0)
