"""Pickles and compressed bytes of strangers, read as plain data of a bounded size or not at all.

A pickle runs nothing that it cannot first find, and here it finds nothing. A few bytes of it can
still ask for gigabytes, or name one list so often that to print it takes for ever.
"""

import io
import pickle
import zlib
from typing import Any, ClassVar, Final, NoReturn

REFUSAL: Final = "only plain data of a bounded size is read here"
MAX_BYTES: Final = 16 * 1024 * 1024
"""Of one value, decompressed; in Redis a chat of ours has at most one MiB."""
MAX_DEPTH: Final = 64
"""Lists and maps inside each other."""
MAX_DIGITS: Final = 4000
"""Of a number; Python refuses to print longer ones."""

_BITS_PER_DIGIT: Final = 3
_PART_BYTES: Final = 16
"""What one part of a value counts for, besides its text."""


class PlainUnpickler(pickle._Unpickler):
    """Reads numbers, text, lists and maps, and nothing that has to be found.

    The one in Python, for the one in C makes room for whatever index a pickle names.
    """

    # It makes room before it reads.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise pickle.UnpicklingError(REFUSAL)


def plain_loads(data: bytes) -> object:
    """Return the plain data in a pickle.

    Raises:
        pickle.UnpicklingError: It is no pickle, holds more than plain data, or too much of it.
    """
    try:
        value = PlainUnpickler(io.BytesIO(data)).load()
        _check_size(value)
    except Exception as error:  # bytes of a stranger: there is no list of what they may raise
        raise pickle.UnpicklingError(REFUSAL) from error
    return value


def _check_size(value: object) -> None:
    """Count what printing ``value`` would write, each part as often as it appears."""
    size, left = 0, [(value, 0)]
    while left:
        item, depth = left.pop()
        size += _PART_BYTES + (len(item) if isinstance(item, str | bytes) else 0)
        is_long = isinstance(item, int) and item.bit_length() > MAX_DIGITS * _BITS_PER_DIGIT
        if size + len(left) > MAX_BYTES or depth > MAX_DEPTH or is_long:
            raise pickle.UnpicklingError(REFUSAL)
        parts: Any = ()
        if isinstance(item, dict):
            parts = (part for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple | set | frozenset):
            parts = item
        left.extend((part, depth + 1) for part in parts)


class BoundedZlib:
    """The module ``zlib`` for one that decompresses what strangers wrote."""

    error = zlib.error
    compress = staticmethod(zlib.compress)

    @staticmethod
    def decompress(data: bytes) -> bytes:
        """Return ``data`` decompressed.

        Raises:
            zlib.error: It is not compressed, is cut off, or has more than ``MAX_BYTES``.
        """
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(data, MAX_BYTES)
        if not inflater.eof:
            raise zlib.error(REFUSAL)
        return inflated
