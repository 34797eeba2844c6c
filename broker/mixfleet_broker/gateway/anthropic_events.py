"""One answer as Anthropic's clients read it: whole, or as a sequence of events.

A call that the end of the answer cuts off is no JSON: a whole message leaves it out, as
``stop_reason`` says why, and a stream has shown as much of it as there is.
"""

import json
from typing import Any, Final

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Choice
from mixfleet_broker.messages import JobEnd, TokenChunk, Usage
from mixfleet_broker.tool_call_text import (
    ArgumentsPiece,
    CallFinished,
    CallStarted,
    ToolCallEvent,
    ToolCallParser,
    parse_tool_calls,
)

PING: Final = sse.data({"type": "ping"}, "ping")


def whole_message(model: str, choice: Choice) -> dict[str, Any]:
    """Return the one object of a request that is not streamed."""
    text = "".join(choice.text)
    calls = parse_tool_calls(choice.job_id, "".join(choice.tool_text)).calls
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    content += [
        {
            "type": "tool_use",
            "id": call.call_id,
            "name": call.name,
            # NaN and Infinity, which models may write, are no JSON: they travel as texts.
            "input": json.loads(call.arguments, parse_constant=str),
        }
        for call in calls
    ]
    usage = choice.usage
    return {
        **_message(model, choice.job_id, usage.prompt_tokens, usage.completion_tokens),
        "content": content,
        **_reasons(choice.end, has_calls=bool(calls)),
    }


class MessageEvents:
    """The events of one streamed answer.

    Args:
        model: Its name as the request has it.
        job_id: Of the answer.
    """

    def __init__(self, model: str, job_id: str) -> None:
        self._model = model
        self._job_id = job_id
        self._calls = ToolCallParser(job_id)
        self._has_begun = False
        self._num_blocks = 0
        self._open: str | None = None

    def take(self, what: TokenChunk | JobEnd) -> bytes:
        """Return what a piece of the answer, or its good end, says to the client."""
        if isinstance(what, JobEnd):
            return self._end(what)
        # The size of the prompt is in this event, so it cannot come before the first token.
        begin = b"" if self._has_begun else self._begin(what.num_prompt_tokens or 0)
        if what.part == "text":
            return begin + self._text(what.text)
        return begin + b"".join(map(self._call, self._calls.push(what.text)))

    def _begin(self, num_prompt_tokens: int) -> bytes:
        self._has_begun = True
        message = _message(self._model, self._job_id, num_prompt_tokens, 0)
        return _event("message_start", message=message)

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        begin = b""
        if self._open != "text":
            begin = self._close() + self._open_block({"type": "text", "text": ""})
        return begin + self._delta({"type": "text_delta", "text": text})

    def _call(self, event: ToolCallEvent) -> bytes:
        if isinstance(event, CallStarted):
            block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
            return self._close() + self._open_block(block)
        if isinstance(event, ArgumentsPiece):
            return self._delta({"type": "input_json_delta", "partial_json": event.text})
        assert isinstance(event, CallFinished)
        return self._close()

    def _end(self, end: JobEnd) -> bytes:
        usage = end.usage or Usage(prompt_tokens=0, completion_tokens=0)
        begin = b"" if self._has_begun else self._begin(usage.prompt_tokens)
        has_calls = bool(self._calls.parsed().calls)
        counts = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        return (
            begin
            + self._close()
            + _event("message_delta", delta=_reasons(end, has_calls=has_calls), usage=counts)
            + _event("message_stop")
        )

    def _open_block(self, block: dict[str, Any]) -> bytes:
        self._open = block["type"]
        return _event("content_block_start", index=self._num_blocks, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._num_blocks += 1
        return _event("content_block_stop", index=self._num_blocks - 1)


def _message(model: str, job_id: str, num_prompt: int, num_answer: int) -> dict[str, Any]:
    return {
        "id": f"msg_{job_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": num_prompt, "output_tokens": num_answer},
    }


def _reasons(end: JobEnd | None, *, has_calls: bool) -> dict[str, str | None]:
    """Return why the answer ended, in Anthropic's words."""
    stop_string = end.stop_string if end is not None else None
    if end is not None and end.finish_reason == "length":
        reason = "max_tokens"
    elif stop_string is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if has_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": stop_string}


def _event(name: str, **fields: Any) -> bytes:
    return sse.data({"type": name, **fields}, name)
