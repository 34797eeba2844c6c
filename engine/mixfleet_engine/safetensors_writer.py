"""Writes bf16 safetensors files one tensor at a time, so that no model needs to fit in memory.

The format: 8 bytes length of the header, the header (JSON: name -> dtype, shape, byte range), then
the tensors in order. With all shapes known beforehand the header can go first.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

BF16_BYTES = 2
_HEADER_ALIGNMENT = 8

Shapes = Mapping[str, tuple[int, ...]]
ReadTensor = Callable[[str], npt.NDArray[np.float32]]


def write_checkpoint(
    directory: Path, shapes: Shapes, read: ReadTensor, *, max_shard_bytes: int
) -> Iterator[int]:
    """Write ``model.safetensors``, or several shards and their index, as Hugging Face names them.

    Args:
        directory: Where the files go; it exists.
        shapes: Every tensor's name and shape, in the order in which they are written.
        read: Gives a tensor by name, fp32, of that shape; called once for each.
        max_shard_bytes: No file gets longer, unless by a single tensor that is.

    Yields:
        After each tensor the bytes that it took.
    """
    shards = _split(shapes, max_shard_bytes)
    if len(shards) == 1:
        yield from _write_file(directory / "model.safetensors", shards[0], read)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        yield from _write_file(directory / file_name, shard, read)
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": num_bytes(shapes)}, "weight_map": weight_map}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def num_bytes(shapes: Shapes) -> int:
    """Return the bytes of all tensors in bf16."""
    return sum(BF16_BYTES * prod(shape) for shape in shapes.values())


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bit patterns of ``values`` in bf16, rounded to the nearest, ties to even.

    bf16 is the upper half of fp32. Adding 0x7FFF, or 0x8000 where the lowest kept bit is 1, carries
    into the upper half exactly when it has to be rounded up.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # The carry would turn a NaN with a small payload into an infinity.
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype("<u2")


def _split(shapes: Shapes, max_shard_bytes: int) -> Sequence[Shapes]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        grown = num_bytes(shards[-1]) + BF16_BYTES * prod(shape)
        if shards[-1] and grown > max_shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _write_file(path: Path, shapes: Shapes, read: ReadTensor) -> Iterator[int]:
    with path.open("wb") as file:
        file.write(_header(shapes))
        for name, shape in shapes.items():
            values = read(name)
            assert values.shape == shape, (name, values.shape, shape)
            file.write(to_bf16(values).tobytes())
            yield BF16_BYTES * prod(shape)


def _header(shapes: Shapes) -> bytes:
    # transformers asks for this key.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + BF16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
