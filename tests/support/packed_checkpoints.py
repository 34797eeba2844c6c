"""AWQ and GPTQ checkpoints of a random Mixtral, packed as the formats' own descriptions say.

It shares no line with the engine. What the numbers stand for comes back as plain matrices, so that
a dense float model can be run beside the engine.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mixfleet_engine.config import ModelConfig
from support.tiny_model import Tensors, hf_config_json, hf_tensors, tiny_config

Words = NDArray[numpy.int64]

PACKABLE = tiny_config(
    dim=128, hidden_dim=256, n_heads=8, n_kv_heads=2, head_dim=32, num_experts=4, vocab_size=256
)
"""Widths of 128 and more, of which two ranks can share each that is cut along its inputs."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What somebody told AutoAWQ or GPTQModel."""

    method: Literal["awq", "gptq"]
    bits: int = 4
    group_size: int = 128
    """-1: a row is one group."""
    symmetric: bool = False
    desc_act: bool = False
    """Groups are made of inputs that lie apart."""
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    writes_g_idx: bool = True

    def __str__(self) -> str:
        zeros = "sym" if self.symmetric else "asym"
        version = "-v2" if self.checkpoint_format == "gptq_v2" else ""
        order = "-desc" if self.desc_act else ""
        return f"{self.method}{version}{self.bits}-g{self.group_size}-{zeros}{order}"

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What goes into `config.json`."""
        found: dict[str, Any] = {
            "quant_method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
        }
        if self.method == "awq":
            return found | {
                "version": "gemm",
                "zero_point": not self.symmetric,
                "modules_to_not_convert": ["gate"],
            }
        return found | {
            "sym": self.symmetric,
            "desc_act": self.desc_act,
            "checkpoint_format": self.checkpoint_format,
        }


def write_packed_checkpoint(
    folder: Path,
    packing: Packing,
    config: ModelConfig = PACKABLE,
    *,
    plain: Collection[str] = (),
    seed: int = 0,
) -> Tensors:
    """Write a random model and return the plain tensors that it stands for.

    Args:
        folder: Where to; made if it is not there.
        packing: How.
        config: Sizes.
        plain: Names or parts of names of matrices that stay plain.
        seed: Of all numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = hf_config_json(config) | {"quantization_config": packing.quantization_config}
    (folder / "config.json").write_text(json.dumps(found))
    generator = numpy.random.default_rng(seed)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in hf_tensors(config, seed=seed).items():
        is_packed = "_proj." in name or ".experts." in name
        if is_packed and not any(part in name for part in plain):
            module = name.removesuffix(".weight")
            parts, meant[name] = _packed(packing, tensor.shape, generator)
            stored |= {f"{module}.{part}": values for part, values in parts.items()}
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def _packed(
    packing: Packing, shape: torch.Size, generator: numpy.random.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of one random matrix, and the matrix of `shape` that they mean."""
    n, k = shape
    size = k if packing.group_size == -1 else packing.group_size
    num_groups, highest = -(-k // size), 2**packing.bits - 1
    numbers = generator.integers(0, highest + 1, (k, n))
    zeros = generator.integers(0, highest + 1, (num_groups, n))
    if packing.symmetric:
        zeros[:] = (highest + 1) // 2
    scales = (0.8 * generator.uniform(0.3, 1.0, (num_groups, n)) / highest).astype(numpy.float16)
    group_of = numpy.arange(k) // size
    if packing.desc_act:
        group_of = generator.permutation(group_of)
    meant = (numbers - zeros[group_of]) * scales[group_of].astype(numpy.float64)
    pack = _pack_awq if packing.method == "awq" else _pack_gptq
    parts = {name: _int32(words) for name, words in pack(packing, numbers, zeros).items()}
    parts["scales"] = torch.from_numpy(scales)
    if packing.method == "gptq" and packing.writes_g_idx:
        parts["g_idx"] = torch.from_numpy(group_of.astype(numpy.int32))
    return parts, torch.from_numpy(meant.T.copy()).float()


def _pack_awq(packing: Packing, numbers: Words, zeros: Words) -> dict[str, Words]:
    del packing
    return {"qweight": _awq_words(numbers), "qzeros": _awq_words(zeros)}


def _awq_words(numbers: Words) -> Words:
    """Output j of eight stands at bit 16 of the word if j is odd, plus 4 for each pair before."""
    words = numpy.zeros((len(numbers), numbers.shape[1] // 8), dtype=numpy.int64)
    for column in range(numbers.shape[1]):
        j = column % 8
        words[:, column // 8] |= numbers[:, column] << (16 * (j & 1) + 4 * (j >> 1))
    return words


def _pack_gptq(packing: Packing, numbers: Words, zeros: Words) -> dict[str, Words]:
    words = _gptq_words(zeros, packing.bits)
    if packing.checkpoint_format == "gptq":
        # 1 less each, taken off the word as a whole: a 0 borrows from its neighbour.
        words = words - sum(1 << shift for shift in range(0, 32, packing.bits))
    return {"qweight": _gptq_words(numbers.T, packing.bits).T, "qzeros": words}


def _gptq_words(numbers: Words, bits: int) -> Words:
    """The first of those that share a word stands in its lowest bits."""
    per_word = 32 // bits
    words = numpy.zeros((len(numbers), numbers.shape[1] // per_word), dtype=numpy.int64)
    for column in range(numbers.shape[1]):
        words[:, column // per_word] |= numbers[:, column] << (bits * (column % per_word))
    return words


def _int32(words: Words) -> Tensor:
    low = (words % 2**32).astype(numpy.uint32)
    return torch.from_numpy(numpy.ascontiguousarray(low).view(numpy.int32).copy())
