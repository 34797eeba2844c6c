"""The Hugging Face layout: ``config.json`` and one or many ``model*.safetensors``."""

from pathlib import Path

import torch
from torch import Tensor

from mixfleet_engine.checkpoint_files import SafetensorFiles, TensorFiles, indexed_files
from mixfleet_engine.checkpoint_names import HF_INDEX, HF_SINGLE, hf_name
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.packed_format import PackedFormat
from mixfleet_engine.packed_matrix import PackedMatrix
from mixfleet_engine.sharding import WHOLE


def open_hf_files(path: Path) -> TensorFiles:
    """Map the weight files of the folder.

    Raises:
        CheckpointError: There are none, or one cannot be read.
    """
    index = path / HF_INDEX
    if index.is_file():
        return SafetensorFiles(indexed_files(index))
    single = path / HF_SINGLE
    if single.is_file():
        return SafetensorFiles([single])
    raise CheckpointError(f"{path}: neither {HF_SINGLE} nor {index.name}")


class HfCheckpoint:
    """Weights under the engine's names; the rotary order is the engine's own already.

    Args:
        files: All tensors.
        packed: How AWQ or GPTQ packed some of them; None: nobody did.
    """

    def __init__(self, files: TensorFiles, packed: PackedFormat | None = None) -> None:
        self._files = files
        self._packed = packed

    @property
    def names(self) -> frozenset[str]:
        """Every name in the files."""
        return self._files.names

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors of a weight of ``shape`` and the shape that each must have."""
        layout = self._packed_format(name)
        if layout is None:
            return {hf_name(name): shape}
        module, (n, k) = _module(name), shape
        words, num_groups = -(-n // layout.per_word), layout.num_groups(k)
        gptq_shape = (-(-k // layout.per_word), n)
        shapes: dict[str, tuple[int, ...]] = {
            f"{module}.qweight": (k, words) if layout.method == "awq" else gptq_shape,
            f"{module}.qzeros": (num_groups, words),
            f"{module}.scales": (num_groups, n),
        }
        for extra, extra_shape in (("g_idx", (k,)), ("bias", (n,))):
            if f"{module}.{extra}" in self.names:
                shapes[f"{module}.{extra}"] = extra_shape
        return shapes

    def found_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._files.shape(stored_name)

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor | PackedMatrix:
        """Return these rows and columns of one weight, all by default.

        Raises:
            CheckpointError: Packed tensors contradict each other.
        """
        layout = self._packed_format(name)
        if layout is None:
            return self._files.read(hf_name(name), rows, columns)
        return self._read_packed(name, layout, rows, columns)

    def _packed_format(self, name: str) -> PackedFormat | None:
        return self._packed if self._packed is not None and name in self._packed.names else None

    def _read_packed(
        self, name: str, layout: PackedFormat, rows: slice, columns: slice
    ) -> PackedMatrix:
        module, per_word = _module(name), layout.per_word
        num_groups, n = self._files.shape(f"{module}.scales")
        across, down = range(n)[rows], range(self._width(module, layout))[columns]
        self._check_bias(module)
        groups, read_groups = self._groups(module, layout, down, num_groups)
        words = slice(across.start // per_word, -(-across.stop // per_word))
        if layout.method == "awq":
            cut, skip = (slice(down.start, down.stop), words), across.start % per_word
        else:
            word_rows = slice(down.start // per_word, -(-down.stop // per_word))
            cut, skip = (word_rows, slice(across.start, across.stop)), down.start % per_word
        return PackedMatrix(
            name=name,
            layout=layout,
            n=len(across),
            k=len(down),
            qweight=self._files.read(f"{module}.qweight", *cut),
            qweight_skip=skip,
            qzeros=self._files.read(f"{module}.qzeros", read_groups, words),
            qzeros_skip=across.start % per_word,
            scales=self._files.read(f"{module}.scales", read_groups, rows),
            groups=groups,
        )

    def _width(self, module: str, layout: PackedFormat) -> int:
        height = self._files.shape(f"{module}.qweight")[0]
        return height if layout.method == "awq" else height * layout.per_word

    def _groups(
        self, module: str, layout: PackedFormat, inputs: range, num_groups: int
    ) -> tuple[Tensor, slice]:
        """Return each input's group, counted from the first that they need, and all they need."""
        if f"{module}.g_idx" in self.names:
            cut = slice(inputs.start, inputs.stop)
            groups = self._files.read(f"{module}.g_idx", cut).long()
        else:
            groups = torch.arange(inputs.start, inputs.stop) // (layout.group_size or inputs.stop)
        first, last = int(groups.min()), int(groups.max())
        if first < 0 or last >= num_groups:
            raise CheckpointError(f"{module}.g_idx: names groups {first} to {last} of {num_groups}")
        return groups - first, slice(first, last + 1)

    def _check_bias(self, module: str) -> None:
        # Early GPTQ tools wrote one of zeros beside every matrix; the architecture has none.
        if f"{module}.bias" in self.names and bool(self._files.read(f"{module}.bias").any()):
            raise CheckpointError(f"{module}.bias: is not zero, and a Mixtral has no bias")


def _module(name: str) -> str:
    return hf_name(name).removesuffix(".weight")
