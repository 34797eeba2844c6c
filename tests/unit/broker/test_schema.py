import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.packing import MAX_MESSAGE_BYTES, pack, unpack
from mixfleet_broker.schema import Fields, check_depth, integer, items, number, text

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def depth(value: object) -> int:
    """The slow and obvious way to say how many maps and lists lie inside each other."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(plain)
def test_values_survive_packing_unless_they_are_too_deep(value: object) -> None:
    if depth(value) <= 8:
        assert unpack(pack(value)) == value


@given(plain, st.integers(0, 4))
def test_depth_is_counted_as_a_child_would(value: object, limit: int) -> None:
    # A list or map that is empty at the very bottom holds nothing that would be deeper.
    too_deep = depth(value) > limit
    try:
        check_depth(value, limit)
    except MessageError:
        assert too_deep
    else:
        assert depth(value) <= limit + 1


def test_what_msgpack_cannot_say_is_a_message_error() -> None:
    for value in (object(), 2**64, "\ud800", [{1: {2: object()}}]):
        with pytest.raises(MessageError, match="cannot be packed"):
            pack(value)


def test_the_limit_is_a_mebibyte_both_ways() -> None:
    largest = b"x" * (MAX_MESSAGE_BYTES - 5)
    assert unpack(pack(largest)) == largest
    with pytest.raises(MessageError, match=f"{MAX_MESSAGE_BYTES + 1} bytes"):
        pack(largest + b"x")


def test_each_field_is_taken_once_and_what_is_left_is_unknown() -> None:
    fields = Fields({"a": "x", "b": 2, "c": None}, "thing")
    assert fields.text("a") == "x"
    assert fields.text_or_none("a") is None
    with pytest.raises(MessageError, match="thing: unknown field 'b', 'c'"):
        fields.done()
    assert fields.integer_or_none("b", 0, 5) == 2
    assert fields.integer_or_none("c", 0, 5) is None
    fields.done()


def test_a_null_is_a_missing_field() -> None:
    fields = Fields({"number": None, "items": None}, "")
    assert fields.number_or_none("number", 0, 1) is None
    assert fields.items("items") == []
    with pytest.raises(MessageError, match=r"^text: must be text, is missing$"):
        fields.text("text")


@pytest.mark.parametrize("value", [0, 5, 10])
def test_numbers_in_range_pass(value: int) -> None:
    assert integer(value, "n", 0, 10) == value
    assert number(value, "n", 0, 10) == float(value)


@pytest.mark.parametrize("value", [-1, 11, True, "5", None, 5.5j, 10**400])
def test_other_numbers_do_not(value: object) -> None:
    with pytest.raises(MessageError, match=r"^n"):
        integer(value, "n", 0, 10)
    with pytest.raises(MessageError, match=r"^n"):
        number(value, "n", 0, 10)


def test_a_tuple_is_a_list_and_text_is_not() -> None:
    assert items((1, 2), "n") == [1, 2]
    with pytest.raises(MessageError, match="n: must be a list, is str"):
        items("12", "n")


def test_text_must_be_such_that_utf8_can_carry_it() -> None:
    assert text("\U0001f680", "n") == "\U0001f680"
    with pytest.raises(MessageError, match="n: holds a lone surrogate at 1"):
        text("a\ud800", "n")


def test_of_many_unknown_fields_a_few_are_named_and_the_rest_counted() -> None:
    fields = Fields({f"field{i:05}": 0 for i in range(70_000)}, "job")
    with pytest.raises(MessageError) as caught:
        fields.done()
    assert str(caught.value).startswith("job: unknown field 'field00000', 'field00001', ")
    assert str(caught.value).endswith(" and 69995 more")
    assert len(str(caught.value)) < 200
