"""Which calls of tools and which results of theirs make a conversation."""

from collections.abc import Sequence

from mixfleet_engine.conversation import Message, Tool, ToolCall
from mixfleet_engine.errors import InvalidMessagesError


def refuse_tools(name: str, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """Raise if there is anything of tools in a conversation for a format that knows none.

    Args:
        name: Of the chat format.
        messages: The conversation.
        tools: Offered to the assistant.

    Raises:
        InvalidMessagesError: There is; the text names the format.
    """
    reason = f"this model's tokenizer knows no tools (chat format {name!r})"
    if tools:
        raise InvalidMessagesError(f"{len(tools)} tools are offered, and {reason}")
    for index, message in enumerate(messages):
        if message.role == "tool":
            raise InvalidMessagesError(f"message {index} has role 'tool', and {reason}")
        if message.tool_calls:
            raise InvalidMessagesError(f"message {index} calls tools, and {reason}")


def check_tool_turns(messages: Sequence[Message]) -> None:
    """Raise unless each call has its result right after the message that makes it.

    The results of one message's calls may come in any order. Mistral's own library counts them;
    here they are matched by id as well, for a result under a wrong id is one that the model would
    take for another call's.

    Raises:
        InvalidMessagesError: The text names the message by its index.
    """
    pending: list[str] = []
    caller = 0
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.call_id not in pending:
                raise InvalidMessagesError(
                    f"message {index} is the result of call {message.call_id!r}, which is no call "
                    "of the assistant's message before it, or has its result already"
                )
            pending.remove(message.call_id)
            continue
        if pending:
            raise InvalidMessagesError(
                f"message {index} comes before {_missing(pending)} of message {caller}"
            )
        if message.tool_calls:
            _check_caller(index, message)
            pending, caller = [call.call_id for call in message.tool_calls], index
    if pending:
        raise InvalidMessagesError(
            f"the conversation ends before {_missing(pending)}, made by message {caller}"
        )


def check_single_results(name: str, messages: Sequence[Message]) -> None:
    """Raise if a message after the last question makes several calls.

    Their results would have to stand in one list, which tokenizers of version 2 never learned.
    Older ones are not shown to the model at all.

    Raises:
        InvalidMessagesError: The text names the message by its index.
    """
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    first = users[-1] if users else 0
    for index, message in enumerate(messages):
        if index >= first and len(message.tool_calls) > 1:
            raise InvalidMessagesError(
                f"message {index} makes {len(message.tool_calls)} calls; this model's tokenizer "
                f"takes one result per turn (chat format {name!r})"
            )


def call_of(result: Message, before: Sequence[Message]) -> ToolCall:
    """Return the call whose result ``result`` is; ``before`` are the turns up to it, checked."""
    caller = next(turn for turn in reversed(before) if turn.tool_calls)
    return next(call for call in caller.tool_calls if call.call_id == result.call_id)


def _check_caller(index: int, message: Message) -> None:
    if message.role != "assistant":
        raise InvalidMessagesError(
            f"message {index} calls tools and is the {message.role}'s, not the assistant's"
        )


def _missing(pending: Sequence[str]) -> str:
    more = f" and {len(pending) - 1} more" if len(pending) > 1 else ""
    return f"the result of call {pending[0]!r}{more}"
