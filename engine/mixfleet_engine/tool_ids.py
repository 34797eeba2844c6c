"""Ids of tool calls as Mistral's models know them: nine letters and digits.

Clients make theirs as they like (``call_...``, ``toolu_...``), and a model that is shown an id of
another form writes bad ones itself.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Final

from mixfleet_engine.conversation import Message

_MODEL_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def with_model_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with an id of nine letters and digits in every call and result.

    One that has that form stays. Any other becomes a hash of itself, which is the same in the call
    and in its result, in every turn of the conversation and on every worker; two different ids
    never become the same one.
    """
    given = [call.call_id for message in messages for call in message.tool_calls]
    given += [message.call_id for message in messages if message.call_id is not None]
    ids = _model_ids(given)
    return [
        replace(
            message,
            tool_calls=tuple(
                replace(call, call_id=ids[call.call_id]) for call in message.tool_calls
            ),
            call_id=None if message.call_id is None else ids[message.call_id],
        )
        for message in messages
    ]


def _model_ids(given: Sequence[str]) -> dict[str, str]:
    """Return a different model id for each different id, by that id."""
    ids = {call_id: call_id for call_id in given if _MODEL_ID.fullmatch(call_id)}
    taken = set(ids)
    for call_id in given:
        if call_id in ids:
            continue
        number = 0
        while (made := _hashed(call_id, number)) in taken:
            number += 1
        ids[call_id] = made
        taken.add(made)
    return ids


def _hashed(call_id: str, number: int) -> str:
    digest = sha256(f"{number}:{call_id}".encode(errors="surrogatepass")).digest()
    value = int.from_bytes(digest, "big")
    letters = []
    for _ in range(9):
        value, index = divmod(value, len(_LETTERS))
        letters.append(_LETTERS[index])
    return "".join(letters)
