"""Values to bytes and back: msgpack, limited in size and depth, without extensions.

msgpack is imported here and nowhere else.
"""

from typing import Final, NoReturn

import msgpack

from mixfleet_broker.errors import MessageError
from mixfleet_broker.schema import check_depth

MAX_MESSAGE_BYTES: Final = 1 << 20


def pack(value: object, *, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """Return the bytes of maps, lists, text, numbers and bytes.

    Raises:
        MessageError: They are more than ``limit``, or hold anything else.
    """
    try:
        data: bytes = msgpack.packb(value, use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise MessageError(f"message: cannot be packed: {error}") from error
    _check_size(data, limit)
    return data


def unpack(data: bytes, *, limit: int = MAX_MESSAGE_BYTES) -> object:
    """Return the value in ``data``.

    Raises:
        MessageError: It is not msgpack, too large, too deep, has a key that is no text or a
            value of an extension type.
    """
    _check_size(data, limit)
    try:
        value: object = msgpack.unpackb(
            data, raw=False, strict_map_key=True, ext_hook=_refuse_extension, max_ext_len=0
        )
    except MessageError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MessageError(f"message: not msgpack: {type(error).__name__}") from None
    check_depth(value)
    return value


def _check_size(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise MessageError(f"message: {len(data)} bytes, the limit is {limit}")


def _refuse_extension(code: int, _data: bytes) -> NoReturn:
    raise MessageError(f"message: extension type {code} is not allowed")
