import collections
import pickle
import zlib
from typing import Any

import pytest

from mixfleet_broker.plain_pickle import MAX_BYTES, MAX_DEPTH, BoundedZlib, plain_loads
from mixfleet_broker.rq_compat import REFUSING_CALL

PLAIN: list[Any] = [
    None,
    {"text": "né", "numbers": [1, 2.5, 10**30, True]},
    ("name", None, (1, b"bytes"), {"key": {1, 2}}),
]


@pytest.mark.parametrize("value", PLAIN, ids=["nothing", "map", "call"])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_plain_data_is_read(value: Any, protocol: int) -> None:
    if protocol == 2 and value is PLAIN[2]:
        value = PLAIN[2][:2]  # it names a function for bytes and for sets
    assert plain_loads(pickle.dumps(value, protocol=protocol)) == value


def test_the_call_of_our_jobs_is_plain_data() -> None:
    assert plain_loads(REFUSING_CALL) == ("mixfleet_broker.rq_compat.refuse", None, (), {})


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(print),
        pickle.dumps(collections.OrderedDict(a=1)),
        pickle.dumps(ValueError("x")),
        b"cos\nmkdir\n(S'/nowhere/marker'\ntR.",
        b"\x80\x02\x82\x01.",  # by a number of the extension registry
        b"Pname\n.",  # by a persistent id
        b"",
        b"not a pickle",
        b'["mixfleet.chat", null, [], {}]',
        pickle.dumps([1, 2])[:-3],
    ],
)
def test_whatever_has_to_be_found_or_is_no_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        plain_loads(data)


def doubled(times: int, leaf: object) -> list[Any]:
    """A list whose print doubles with each level, of which only one holds the leaf."""
    value: list[Any] = [leaf]
    for _ in range(times):
        value = [value, value]
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f0N.",  # 34 GB for an index, where C makes room for it
        b"\x80\x05\x96\xff\xff\xff\x7f\x00\x00\x00\x00.",  # 2 GB of bytes to come
        b"\x80\x04\x8e\xff\xff\xff\x7f\x00\x00\x00\x00.",
        pickle.dumps(doubled(60, "x")),
        pickle.dumps([["x" * 1000] * 1000] * 1000),
        pickle.dumps(nested(MAX_DEPTH + 1)),
        pickle.dumps(endless()),
        pickle.dumps(10**5000),
    ],
    ids=["index", "bytearray", "bytes", "doubled", "repeated", "nested", "endless", "digits"],
)
def test_a_few_bytes_cannot_cost_gigabytes_or_for_ever(data: bytes) -> None:
    assert len(data) < 100_000
    try:
        value = plain_loads(data)
    except pickle.UnpicklingError:
        return
    assert value is None  # the index was named and never used


@pytest.mark.parametrize("value", [doubled(10, "x"), nested(MAX_DEPTH), 10**3500, "x" * 1_000_000])
def test_large_data_is_read(value: Any) -> None:
    assert plain_loads(pickle.dumps(value)) == value


def test_what_is_compressed_is_bounded_and_else_as_with_zlib() -> None:
    whole = zlib.compress(b"x" * MAX_BYTES)
    assert BoundedZlib.decompress(whole) == b"x" * MAX_BYTES
    for spoilt in (b"plain", whole[:-9], zlib.compress(b"x" * (MAX_BYTES + 1))):
        with pytest.raises(BoundedZlib.error):
            BoundedZlib.decompress(spoilt)
    assert zlib.decompress(BoundedZlib.compress(b"x")) == b"x"
