"""What is asked of the gateway in the words of Anthropic's client."""

from typing import Any

import anthropic
from anthropic import Anthropic

from mixfleet_broker.messages import AnswerPart
from support.answer_worker import Scripted

MODEL = "tiny"
QUESTION: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
TOOL: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
# Not among the arguments of this client any more, but of older ones and of other people's.
SAMPLING = {"temperature": 0, "top_p": 0.5, "top_k": 5}
HELLO = Scripted((("text", "Hel"), ("text", "lo"), ("text", " 🙂")))
CALL: tuple[tuple[AnswerPart, str], ...] = (
    ("text", "Let me see."),
    ("tool_calls", '[{"name": "weather", "arg'),
    ("tool_calls", 'uments": {"city": "Pa'),
    ("tool_calls", 'ris"}}]'),
)


def ask(client: Anthropic, **more: Any) -> anthropic.types.Message:
    message = client.messages.create(
        **{"model": MODEL, "max_tokens": 50, "messages": QUESTION, **more}
    )
    assert isinstance(message, anthropic.types.Message)
    return message


def streamed(client: Anthropic, **asked: Any) -> anthropic.types.Message:
    with client.messages.stream(**asked) as stream:
        return stream.get_final_message()


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def text_block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/"}}
