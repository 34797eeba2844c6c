"""A conversation, and the order of turns that Mistral's formats know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mixfleet_engine.errors import InvalidMessagesError

ROLES = ("system", "user", "assistant")
_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``; a chat format refuses any other."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A conversation as question and answer in turn, with at most one system prompt."""

    system_prompt: str
    """"" if there is none."""
    turns: tuple[Message, ...]
    """Users' and assistant's messages; the first is a user's."""

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
    rest of that answer.

    Raises:
        InvalidMessagesError: There is no message, the only one is the assistant's, an assistant's
            message is empty, or a system message comes right after the assistant.
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
        if role != "system":
            contents = [message.content for message in group if message.content]
            yield Message(role=role, content=_SEPARATOR.join(contents))


def _check_order(messages: Sequence[Message]) -> None:
    if len(messages) == 1 and messages[0].role == "assistant":
        raise InvalidMessagesError("message 0 is the assistant's and there is no other")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content:
            raise InvalidMessagesError(f"message {index}, the assistant's, is empty")
        if index and message.role == "system" and messages[index - 1].role == "assistant":
            raise InvalidMessagesError(
                f"message {index} is the system's and follows the assistant; "
                "put it first, or before the user's next message"
            )
