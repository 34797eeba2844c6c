"""A checkpoint folder, whatever its layout, with every weight in its place and shape.

The engine's own names for weights are Mistral's per-expert ones, and the rotary pairs of ``wq``
and ``wk`` stand half a head apart (see `rotary_halves_apart`).
"""

import logging
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mixfleet_engine.checkpoint_hf import HfCheckpoint, open_hf_files
from mixfleet_engine.checkpoint_mistral import MistralCheckpoint, open_mistral_files
from mixfleet_engine.config import ModelConfig, checkpoint_layout
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.packed_matrix import PackedMatrix
from mixfleet_engine.sharding import WHOLE

logger = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """One folder of weights, whatever its layout."""

    @property
    def names(self) -> frozenset[str]:
        """Every name in the files, as the files spell it."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors of a weight of ``shape`` and the shape that each must have."""
        ...

    def found_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        ...

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor | PackedMatrix:
        """Return rows and columns of one weight in the engine's own order, read no more than that.

        They are still mapped from the file wherever that can be.
        """
        ...


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight that a checkpoint of these sizes must hold."""
    q_width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention_norm.weight"] = (config.dim,)
        shapes[f"{prefix}.attention.wq.weight"] = (q_width, config.dim)
        shapes[f"{prefix}.attention.wk.weight"] = (kv_width, config.dim)
        shapes[f"{prefix}.attention.wv.weight"] = (kv_width, config.dim)
        shapes[f"{prefix}.attention.wo.weight"] = (config.dim, q_width)
        shapes[f"{prefix}.ffn_norm.weight"] = (config.dim,)
        shapes[f"{prefix}.feed_forward.gate.weight"] = (config.num_experts, config.dim)
        for expert in range(1 if config.shared_experts else config.num_experts):
            name = f"{prefix}.feed_forward.experts.{expert}"
            shapes[f"{name}.w1.weight"] = (config.hidden_dim, config.dim)
            shapes[f"{name}.w2.weight"] = (config.dim, config.hidden_dim)
            shapes[f"{name}.w3.weight"] = (config.hidden_dim, config.dim)
    shapes["norm.weight"] = (config.dim,)
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, config.dim)
    return shapes


def open_checkpoint(path: Path, config: ModelConfig) -> Checkpoint:
    """Map the files of a checkpoint and check that every weight is there and has its shape.

    Nothing is read yet, so a broken folder is refused in a moment, not after minutes.

    Args:
        path: The folder.
        config: Sizes that the weights must have.

    Raises:
        CheckpointError: A file or a tensor is missing, broken or of the wrong shape.
    """
    checkpoint: Checkpoint
    if checkpoint_layout(path) == "mistral":
        checkpoint = MistralCheckpoint(open_mistral_files(path), config)
    else:
        checkpoint = HfCheckpoint(open_hf_files(path), config.packed)
    used: set[str] = set()
    for name, shape in weight_shapes(config).items():
        for stored, expected in checkpoint.stored(name, shape).items():
            _check(path, checkpoint, stored, expected)
            used.add(stored)
    unknown = sorted(n for n in checkpoint.names - used if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        logger.warning("%s: %d tensors not used, first %s", path, len(unknown), unknown[0])
    return checkpoint


def _check(path: Path, checkpoint: Checkpoint, stored: str, expected: tuple[int, ...]) -> None:
    if stored not in checkpoint.names:
        raise CheckpointError(f"{path}: tensor {stored} is missing")
    found = checkpoint.found_shape(stored)
    if found != expected:
        raise CheckpointError(
            f"{path}: tensor {stored} has shape {list(found)}, expected {list(expected)}"
        )
