"""Named tensors in files, mapped and not read until asked for.

The only file that knows safetensors and torch's pickled files. Names are the files' own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.sharding import WHOLE


class TensorFiles(Protocol):
    """All tensors of one checkpoint under the names that its files give them."""

    @property
    def names(self) -> frozenset[str]:
        """Every stored name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        ...

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return these rows and columns of a tensor, all by default; only they are read."""
        ...


class SafetensorFiles:
    """Tensors of one or more safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._handles: dict[str, Any] = {}
        for file in files:
            handle = _open_safetensors(file)
            for name in handle.keys():  # noqa: SIM118 - a handle is no dict
                if name in self._handles:
                    raise CheckpointError(f"{file}: {name} is in another file too")
                self._handles[name] = handle

    @property
    def names(self) -> frozenset[str]:
        """Every stored name."""
        return frozenset(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return these rows and columns of a tensor, all by default; only they are read."""
        if rows == columns == WHOLE:
            tensor: Tensor = self._handles[name].get_tensor(name)
        else:
            tensor = self._handles[name].get_slice(name)[_cut(rows, columns)]
        return tensor


class TorchFiles:
    """Tensors of one or more ``.pth`` files, read with ``weights_only`` and memory-mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._copies: dict[str, list[tuple[Path, Tensor]]] = {}
        for file in files:
            for name, tensor in _open_torch(file).items():
                self._copies.setdefault(name, []).append((file, tensor))

    @property
    def names(self) -> frozenset[str]:
        """Every stored name."""
        return frozenset(self._copies)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._copies[name][0][1].shape)

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return these rows and columns of a tensor, all by default; only they are read.

        Raises:
            CheckpointError: Files disagree about it. (Some releases repeat the attention and the
                norms in each file, which is fine as long as the copies are equal.)
        """
        cut = _cut(rows, columns)
        (_, first), *others = self._copies[name]
        for file, other in others:
            if first.shape != other.shape or not torch.equal(first[cut], other[cut]):
                raise CheckpointError(f"{file}: {name} differs from the one in another file")
        return first[cut]


def _cut(rows: slice, columns: slice) -> slice | tuple[slice, slice]:
    """Return an index; the one of all columns serves vectors as well."""
    return rows if columns == WHOLE else (rows, columns)


def indexed_files(index: Path) -> list[Path]:
    """Return the files that ``model.safetensors.index.json`` names.

    Raises:
        CheckpointError: It is broken, or a file that it names is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: broken index: {error!r}") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not in the folder")
    return [index.parent / name for name in names]


def _open_safetensors(file: Path) -> Any:
    # Imported here: weights that come from elsewhere, a benchmark's, need no safetensors.
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _open_torch(file: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise CheckpointError(f"{file}: not a readable torch file of tensors: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{file}: holds something else than named tensors")
    return found
