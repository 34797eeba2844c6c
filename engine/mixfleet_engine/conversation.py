"""A conversation, and the order of turns that Mistral's formats know.

What holds of calls and results in it is in tool_turns.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mixfleet_engine.errors import InvalidMessagesError

ROLES = ("system", "user", "assistant", "tool")
_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that the assistant may call."""

    name: str
    description: str
    parameters: str
    """JSON schema of its arguments, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool by the assistant."""

    call_id: str
    """By which the result names it; of any form."""
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``; a chat format refuses any other."""
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant, after its text, if it has any."""
    call_id: str | None = None
    """Of a tool's message: the call whose result it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A conversation as question and answer in turn, with at most one system prompt."""

    system_prompt: str
    """"" if there is none."""
    turns: tuple[Message, ...]
    """Users', assistant's and tools' messages; the first is a user's."""

    @property
    def continues(self) -> bool:
        """Whether the last turn is the beginning of the answer."""
        return self.turns[-1].role == "assistant"


def check_messages(messages: Sequence[Message]) -> None:
    """Raise unless there is a message and each has a known role.

    Raises:
        InvalidMessagesError: The text names the message by its index.
    """
    if not messages:
        raise InvalidMessagesError("the conversation is empty")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidMessagesError(
                f"message {index} has role {message.role!r}, not one of {', '.join(ROLES)}"
            )


def dialogue(messages: Sequence[Message]) -> Dialogue:
    """Return ``messages`` as Mistral's own library reads them.

    System messages are joined to one prompt, wherever they stand. Messages of one role that follow
    each other directly become one, with an empty line between them. A conversation that begins
    with the assistant begins with an empty question. One that ends with the assistant asks for the
    rest of that answer. Results of tools stay apart.

    Raises:
        InvalidMessagesError: There is no message, the only one is the assistant's, an assistant's
            message is empty, or a system message comes right after the assistant or a tool.
    """
    check_messages(messages)
    _check_order(messages)
    turns = list(_merged(messages))
    if not turns or turns[0].role != "user":
        turns.insert(0, Message(role="user", content=""))
    system = [message.content for message in messages if message.role == "system"]
    return Dialogue(system_prompt=_SEPARATOR.join(filter(None, system)), turns=tuple(turns))


def _merged(messages: Sequence[Message]) -> Iterator[Message]:
    # A system message between two questions keeps them apart, though it goes elsewhere itself.
    for role, group in groupby(messages, key=lambda message: message.role):
        if role == "tool":
            yield from group
        elif role != "system":
            yield _joined(role, list(group))


def _joined(role: str, group: Sequence[Message]) -> Message:
    return Message(
        role=role,
        content=_SEPARATOR.join(message.content for message in group if message.content),
        tool_calls=tuple(call for message in group for call in message.tool_calls),
    )


def _check_order(messages: Sequence[Message]) -> None:
    if len(messages) == 1 and messages[0].role == "assistant":
        raise InvalidMessagesError("message 0 is the assistant's and there is no other")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not (message.content or message.tool_calls):
            raise InvalidMessagesError(f"message {index}, the assistant's, is empty")
        before = messages[index - 1].role if index else None
        if message.role == "system" and before in ("assistant", "tool"):
            raise InvalidMessagesError(
                f"message {index} is the system's and follows the {before}; "
                "put it first, or before the user's next message"
            )
