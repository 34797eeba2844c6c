"""Mistral's own layout: ``params.json`` and ``consolidated*``.

Shape letters: E experts, F expert width, D model width.
"""

import re
from pathlib import Path

from torch import Tensor

from mixfleet_engine.checkpoint_files import SafetensorFiles, TensorFiles, TorchFiles
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.sharding import WHOLE

_EXPERT = re.compile(r"(layers\.\d+)\.feed_forward\.experts\.(\d+)\.(w[123])\.weight")


def open_mistral_files(path: Path) -> TensorFiles:
    """Map the weight files of the folder.

    Raises:
        CheckpointError: There are none, or one cannot be read.
    """
    safetensors = sorted(path.glob("consolidated*.safetensors"))
    if safetensors:
        return SafetensorFiles(safetensors)
    pickled = sorted([*path.glob("consolidated.*.pth"), *path.glob("consolidated.*.pt")])
    if pickled:
        return TorchFiles(pickled)
    raise CheckpointError(f"{path}: neither consolidated*.safetensors nor consolidated.NN.pth")


class MistralCheckpoint:
    """Weights under the engine's names, which are Mistral's, with rotary halves apart.

    Experts are stored one by one (``feed_forward.experts.N.w1.weight``) or stacked as in the first
    8x7B release: ``block_sparse_moe.w1``, ``w2`` and ``w3``, each ``[E*F, D]``, so that ``w2`` is
    transposed.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig) -> None:
        self._files = files
        self._config = config

    @property
    def names(self) -> frozenset[str]:
        """Every name in the files."""
        return self._files.names

    def stored_name(self, name: str) -> str:
        """Return what the files call the weight ``name``."""
        if name in self._files.names:
            return name
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            stacked = f"{expert[1]}.block_sparse_moe.{expert[3]}"
            return stacked if stacked in self._files.names else name
        gate = name.replace("feed_forward.gate", "block_sparse_moe.gate")
        return gate if gate in self._files.names else name

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors of a weight of ``shape`` and the shape that each must have."""
        if self._is_stacked(name):
            shape = (self._config.num_experts * self._config.hidden_dim, self._config.dim)
        return {self.stored_name(name): shape}

    def found_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._files.shape(stored_name)

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return these rows and columns of one weight, all by default; nothing else is read.

        Rows of ``wq`` and ``wk`` must be whole heads.
        """
        expert = _EXPERT.fullmatch(name)
        if expert is not None and self._is_stacked(name):
            first = int(expert[2]) * self._config.hidden_dim
            if expert[3] == "w2":
                return self._read_stacked(name, first, columns, rows).T
            return self._read_stacked(name, first, rows, columns)
        tensor = self._files.read(self.stored_name(name), rows, columns)
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            return rotary_halves_apart(tensor, self._config.head_dim)
        return tensor

    def _read_stacked(self, name: str, first: int, part: slice, columns: slice) -> Tensor:
        """Return ``part`` of the F rows that begin at ``first``, ``[F, D]``."""
        start, stop, _ = part.indices(self._config.hidden_dim)
        return self._files.read(self.stored_name(name), slice(first + start, first + stop), columns)

    def _is_stacked(self, name: str) -> bool:
        return "block_sparse_moe.w" in self.stored_name(name)


def rotary_halves_apart(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k matrix so that rotary pairs stand half a head apart.

    Mistral rotates rows (0, 1), (2, 3), ... of a head together; the engine, like Hugging Face,
    rows (0, h), (1, h + 1), ... with h = head_dim / 2, which needs no strided access. Both q and
    k change alike, so their products stay the same. Worked example, head_dim 6: rows
    ``[0 1 2 3 4 5]`` of a head become ``[0 2 4 1 3 5]``.
    """
    rows, width = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)
