import re
from collections.abc import Sequence

import pytest

from mixfleet_engine import tool_ids
from mixfleet_engine.conversation import Message, ToolCall
from mixfleet_engine.tool_ids import with_model_ids


def mapped(*call_ids: str) -> list[str]:
    """Return what the ids of calls became, and check that their results follow them."""
    calls = tuple(ToolCall(call_id=i, name="x", arguments="{}") for i in call_ids)
    messages = [Message(role="assistant", content="", tool_calls=calls)]
    messages += [Message(role="tool", content="", call_id=call_id) for call_id in call_ids]
    first, *results = with_model_ids(messages)
    found = [call.call_id for call in first.tool_calls]
    assert [message.call_id for message in results] == found
    return found


def test_an_id_of_nine_letters_and_digits_stays() -> None:
    assert mapped("VvvODy9mT", "000000000") == ["VvvODy9mT", "000000000"]


@pytest.mark.parametrize(
    "call_id",
    ["call_abc", "toolu_01A09q90qw90lq917835lq9", "x" * 128, "VvvODy9m", "VvvODy9m-", "VvvODy9mé"],
)
def test_any_other_id_becomes_nine_letters_and_digits_and_always_the_same(call_id: str) -> None:
    (first,) = mapped(call_id)
    assert re.fullmatch("[a-zA-Z0-9]{9}", first)
    assert mapped("other", call_id)[1] == first
    assert mapped("VvvODy9mT\n")[0] != "VvvODy9mT"


def test_ten_thousand_ids_become_as_many() -> None:
    ids = [f"call_{number}" for number in range(10_000)]
    assert len(set(mapped(*ids))) == 10_000


def test_ids_whose_hashes_meet_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(call_id: str, number: int) -> str:  # noqa: ARG001
        return f"{number:09d}"

    monkeypatch.setattr(tool_ids, "_hashed", hashed)
    assert mapped("a", "b", "000000001", "a", "c") == [
        "000000000",
        "000000002",
        "000000001",
        "000000000",
        "000000003",
    ]


def test_messages_without_calls_stay_as_they_are() -> None:
    messages: Sequence[Message] = [Message(role="user", content="Hi")]
    assert with_model_ids(messages) == messages
