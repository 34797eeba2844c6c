"""One rank's part of the weights, read one by one and put into their form where they will stay.

On a GPU that is done on the GPU: a plain matrix goes there as the file has it and is quantised
there, so that its memory never holds more than the finished weights and one matrix more. Meanwhile
a thread reads the next ones into pinned memory.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig, Shard
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.heap import HeapTrimmer
from mixfleet_engine.packed_format import CONVERT
from mixfleet_engine.packed_matrix import PackedMatrix
from mixfleet_engine.quantise import Weight, form_of, quantise, stacked
from mixfleet_engine.read_ahead import ReadAhead
from mixfleet_engine.sharding import WeightCuts
from mixfleet_engine.weight_formats import format_of
from mixfleet_engine.weights import Checkpoint, weight_shapes

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, counted as the engine holds them."""
Read = Tensor | PackedMatrix

READ_AHEAD_BYTES: Final = 256 << 20
"""Pinned memory of each rank that waits for its GPU: two matrices of an 8x7B's experts."""


class WeightLoader:
    """Reads one rank's part of the weights one by one, converts them and reports progress.

    Args:
        checkpoint: Where from.
        config: Sizes of the whole model.
        dtype: The engine's.
        device: Where the weights go.
        weight_dtype: Form of the large matrices; ``auto``: as the checkpoint has them, plain ones
            in ``dtype``.
        progress: Called after each weight with the bytes of this rank.
        shard: Whose part to read; None: all of it.
        reads_ahead: Whether a thread reads the next weights; None: for a GPU.
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
        reads_ahead: bool | None = None,
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
        self._ahead: ReadAhead[Read] | None = None
        if device.type == "cuda" if reads_ahead is None else reads_ahead:
            self._ahead = ReadAhead(
                lambda name: _moved(self._read(name), _pinned),
                tuple(self._shapes),
                num_bytes=_num_bytes,
                max_bytes=READ_AHEAD_BYTES,
            )

    def close(self) -> None:
        """Stop reading ahead; to be called when the model is loaded, or will not be."""
        if self._ahead is not None:
            self._ahead.close()
            # torch would keep the pinned memory for more of the same, of which there is none.
            release = getattr(torch._C, "_host_emptyCache", None)
            if release is not None and self.device.type == "cuda":
                release()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of the rank's part of one weight, in the engine's dtype or the given one.

        A copy, because the file may be replaced while the engine runs.
        """
        tensor = self._plain(self._on_device(name), dtype or self.dtype)
        self._report(name)
        return tensor

    def matrix(self, *names: str) -> Weight:
        """Return matrices one above the other, so that one product serves all.

        Raises:
            ConfigError: The checkpoint has them in different forms, or in one that cannot be run.
            CheckpointError: A file contradicts itself, or a number to be quantised is not finite.
        """
        weights = [self._weight(name) for name in names]
        forms = [form_of(weight) for weight in weights]
        if len(set(forms)) > 1:
            found = ", ".join(f"{name} {form}" for name, form in zip(names, forms, strict=True))
            raise ConfigError(
                f"matrices that are run as one in different forms: {found}; {CONVERT}"
            )
        return stacked(weights)

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

    def _weight(self, name: str) -> Weight:
        found = self._on_device(name)
        if isinstance(found, PackedMatrix) and self._stays_packed(name, found):
            weight: Weight = found.int4()
            self._heap.freed(found.n * found.k)  # of its scratch, a byte a number
        else:
            weight = self.stored(name, self._plain(found, self.dtype))
        self._report(name)
        return weight

    def _stays_packed(self, name: str, found: PackedMatrix) -> bool:
        """Whether a packed matrix is run as it is, even if that means an error."""
        if self._weight_dtype == "auto":
            return True
        is_asked_for = format_of(name, self._weight_dtype) == "int4"
        return is_asked_for and not found.layout.has_zeros and found.int4_problem is None

    def _plain(self, found: Read, dtype: torch.dtype) -> Tensor:
        if isinstance(found, PackedMatrix):
            return found.dequantised(dtype)
        is_mapped = self.device.type == "cpu"
        return found.to(dtype=dtype, copy=is_mapped).contiguous()

    def _on_device(self, name: str) -> Read:
        """Return a weight as the files have it, on a CPU still mapped from them."""
        found = self._read(name) if self._ahead is None else self._ahead.take(name)
        return _moved(found, self._to_device)

    def _to_device(self, tensor: Tensor) -> Tensor:
        # From pinned memory this returns at once; torch keeps that memory until the copy is done.
        return tensor.to(self.device, non_blocking=True)

    def _read(self, name: str) -> Read:
        return self._checkpoint.read(name, *self._cuts.of(name, self._shapes[name]))

    def _report(self, name: str) -> None:
        numbers = math.prod(self._cuts.shape(name, self._shapes[name]))
        self._bytes_done += numbers * self.dtype.itemsize
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)


def _moved(found: Read, move: Callable[[Tensor], Tensor]) -> Read:
    return found.moved(move) if isinstance(found, PackedMatrix) else move(found)


def _pinned(tensor: Tensor) -> Tensor:
    """Return a copy that the GPU can fetch by itself; what is on a device already as it is."""
    if tensor.device.type != "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _num_bytes(found: Read) -> int:
    tensors = found.tensors if isinstance(found, PackedMatrix) else (found,)
    return sum(tensor.nbytes for tensor in tensors)
