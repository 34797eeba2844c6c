"""From a checkpoint folder to checked tensors of the wanted dtype, one at a time.

The engine's own names for weights are Mistral's per-expert ones, and the rotary pairs of ``wq``
and ``wk`` stand half a head apart (see `rotary_halves_apart`).
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixfleet_engine.checkpoint_hf import HfCheckpoint, open_hf_files
from mixfleet_engine.checkpoint_mistral import MistralCheckpoint, open_mistral_files
from mixfleet_engine.config import ModelConfig, Shard, checkpoint_layout
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.heap import HeapTrimmer
from mixfleet_engine.quantise import Weight, quantise, stacked
from mixfleet_engine.sharding import WHOLE, WeightCuts
from mixfleet_engine.weight_formats import format_of

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, counted as the engine holds them."""


class Checkpoint(Protocol):
    """One folder of weights, whatever its layout."""

    @property
    def names(self) -> frozenset[str]:
        """Every name in the files, as the files spell it."""
        ...

    def stored_name(self, name: str) -> str:
        """Return what the files call the weight ``name``."""
        ...

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the stored tensor of a weight of ``shape`` must have."""
        ...

    def found_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored tensor of a weight."""
        ...

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
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
        checkpoint = HfCheckpoint(open_hf_files(path))
    used = set()
    for name, shape in weight_shapes(config).items():
        _check(path, checkpoint, name, shape)
        used.add(checkpoint.stored_name(name))
    unknown = sorted(n for n in checkpoint.names - used if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        logger.warning("%s: %d tensors not used, first %s", path, len(unknown), unknown[0])
    return checkpoint


def _check(path: Path, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = checkpoint.stored_name(name)
    if stored not in checkpoint.names:
        raise CheckpointError(f"{path}: tensor {stored} is missing")
    expected, found = checkpoint.stored_shape(name, shape), checkpoint.found_shape(name)
    if found != expected:
        raise CheckpointError(
            f"{path}: tensor {stored} has shape {list(found)}, expected {list(expected)}"
        )


class WeightLoader:
    """Reads one rank's part of the weights one by one, converts them and reports progress.

    Args:
        checkpoint: Where from.
        config: Sizes of the whole model.
        dtype: The engine's.
        device: Where the weights go.
        progress: Called after each weight with the bytes of this rank.
        shard: Whose part to read; None: all of it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight_dtype: str = "auto",
        progress: Progress | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.shard = shard or Shard()
        self._weight_dtype = weight_dtype
        self._heap = HeapTrimmer()
        self._checkpoint = checkpoint
        self._progress = progress
        self._bytes_done = 0
        self._shapes = weight_shapes(config)
        self._cuts = WeightCuts(config, self.shard)
        numbers = sum(math.prod(self._cuts.shape(*item)) for item in self._shapes.items())
        self._bytes_total = numbers * dtype.itemsize

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of the rank's part of one weight, in the engine's dtype or the given one.

        A copy, because the file may be replaced while the engine runs.
        """
        mapped = self._checkpoint.read(name, *self._cuts.of(name, self._shapes[name]))
        tensor = mapped.to(device=self.device, dtype=dtype or self.dtype, copy=True).contiguous()
        self._bytes_done += tensor.numel() * self.dtype.itemsize
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
        return tensor

    def matrix(self, *names: str) -> Weight:
        """Return matrices one above the other, so that one product serves all."""
        return stacked([self.stored(name, self.tensor(name)) for name in names])

    def stored(self, name: str, matrix: Tensor) -> Weight:
        """Return ``matrix`` in the form in which weights of this name are kept.

        Raises:
            CheckpointError: It is to be quantised, and a number in it is not finite.
        """
        if self._weight_dtype == "auto":
            return matrix
        weight = quantise(matrix, format_of(name, self._weight_dtype), name)
        self._heap.freed(matrix.nbytes)
        return weight
