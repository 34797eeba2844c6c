"""A GGUF file: typed metadata and tensors as fp32. The one file that imports ``gguf``."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mixfleet_engine.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]
_T = TypeVar("_T", str, int, float, bool)


class GgufFile:
    """Reads one GGUF file lazily: a tensor is dequantised when it is asked for.

    Raises:
        CheckpointError: The file is no GGUF file, is cut short, or is one part of several; or the
            ``gguf`` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        self._gguf = _library()
        try:
            self._reader = self._gguf.GGUFReader(path)
        # A broken file makes the library fail in whatever way its first wrong number leads to.
        except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        # The library takes a second to put together an array of 32,000 tokens, each time.
        self._arrays: dict[str, Sequence[Any]] = {}
        num_parts = self.optional("split.count", int)
        if num_parts is not None and num_parts > 1:
            raise CheckpointError(
                f"{path}: one of {num_parts} parts; merge them with `llama-gguf-split --merge`"
            )

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors in the file."""
        return frozenset(self._tensors)

    def has(self, key: str) -> bool:
        """Whether the metadata has ``key``."""
        return self._reader.get_field(key) is not None

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """Return the metadata value of ``key``, None where it is absent.

        Raises:
            CheckpointError: It is of another kind; the text names the key.
        """
        field = self._reader.get_field(key)
        if field is None:
            return None
        value: Any = field.contents()
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: {key}={value!r}: must be {kind.__name__}")
        return value

    def required(self, key: str, kind: type[_T]) -> _T:
        """Return the metadata value of ``key``.

        Raises:
            CheckpointError: It is absent or of another kind; the text names the key.
        """
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {key} is missing")
        return value

    def array(self, key: str) -> Sequence[Any]:
        """Return the metadata array of ``key``.

        Raises:
            CheckpointError: It is absent or no array; the text names the key.
        """
        if key not in self._arrays:
            field = self._reader.get_field(key)
            value: Any = None if field is None else field.contents()
            if not isinstance(value, list):
                raise CheckpointError(f"{self.path}: metadata array {key} is missing")
            self._arrays[key] = value
        return self._arrays[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, rows first as in torch; GGUF counts the other way round.

        Raises:
            CheckpointError: There is no such tensor; the text names it.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, index: int | None = None) -> FloatArray:
        """Return a tensor as fp32, or its part ``index`` along the first axis.

        Raises:
            CheckpointError: It is absent or of a type that cannot be dequantised.
        """
        self.shape(name)  # raises where there is none
        tensor = self._tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        try:
            values = self._gguf.quants.dequantize(data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: tensor {name} of type {kind}: {error}") from error
        return np.asarray(values, dtype=np.float32)


def _library() -> ModuleType:
    """Return ``gguf``, which only those who import a model need."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "reading GGUF files needs the gguf package: pip install 'mixfleet[demo]'"
        ) from error
    return gguf
