"""The output items of a response, and the events that tell of them, from a job's chunks."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from mixfleet_broker.gateway.openai_shapes import chat_logprobs
from mixfleet_broker.gateway.responses_items import Status
from mixfleet_broker.messages import TokenChunk, TokenLogprob
from mixfleet_broker.tool_call_text import (
    ArgumentsPiece,
    CallStarted,
    ToolCallEvent,
    ToolCallParser,
)

Event = dict[str, Any]


class OutputItems:
    """Messages and calls, at most the last of which is still being written.

    Args:
        job_id: Of the job, from which all ids are made.
        has_logprobs: Whether the text carries them.
    """

    def __init__(self, job_id: str, *, has_logprobs: bool) -> None:
        self._job_id = job_id
        self._has_logprobs = has_logprobs
        self._parser = ToolCallParser(job_id)
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        """Of the open item's text or arguments."""
        self._logprobs: list[Any] = []
        """Of the open message."""
        self._untold: list[TokenLogprob] = []
        """Of tokens whose characters are not complete."""

    def values(self) -> list[dict[str, Any]]:
        """Return the items as far as they have come."""
        self._write_down()
        return deepcopy(self._items)

    def take(self, chunk: TokenChunk) -> list[Event]:
        """Return the events of a chunk."""
        if chunk.part == "tool_calls":
            return [e for found in self._parser.push(chunk.text) for e in self._of_call(found)]
        if self._has_logprobs:
            self._untold += chunk.logprobs
        if not chunk.text:
            return []
        events = [] if self._is_open("message") else self._begin_message()
        logprobs = self._told_logprobs()
        self._pieces.append(chunk.text)
        self._logprobs += logprobs
        place = self._place(content_index=0)
        events.append(_event("output_text.delta", **place, delta=chunk.text, logprobs=logprobs))
        return events

    def end(self, status: Status) -> list[Event]:
        """Return the events of an answer's end; there is an item then, if only an empty one."""
        events = [] if self._items else self._begin_message()
        # A call that is still open was never closed by the model, however its answer ended.
        return events + self._close(status if self._is_open("message") else "incomplete")

    def break_off(self) -> None:
        """Leave the open item as it is, for a job that gave no answer."""
        if self._open is not None:
            self._write_down()
            self._open["status"] = "incomplete"
            self._open = None

    def _of_call(self, found: ToolCallEvent) -> list[Event]:
        if isinstance(found, CallStarted):
            return [*self._close("completed"), *self._begin_call(found)]
        if isinstance(found, ArgumentsPiece):
            self._pieces.append(found.text)
            place = self._place()
            return [_event("function_call_arguments.delta", **place, delta=found.text)]
        return self._close("completed")

    def _begin_message(self) -> list[Event]:
        events = self._close("completed")
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        part["logprobs"] = []
        head = {"type": "message", "status": "in_progress", "role": "assistant"}
        item = {"id": f"msg_{self._job_id}_{len(self._items)}", **head}
        events.append(self._added({**item, "content": []}))
        assert self._open is not None
        self._open["content"] = [part]
        place = self._place(content_index=0)
        events.append(_event("content_part.added", **place, part=dict(part)))
        return events

    def _begin_call(self, found: CallStarted) -> list[Event]:
        return [
            self._added(
                {
                    "id": f"fc_{self._job_id}_{len(self._items)}",
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": found.call_id,
                    "name": found.name,
                    "arguments": "",
                }
            )
        ]

    def _added(self, item: dict[str, Any]) -> Event:
        self._open = item
        self._items.append(item)
        self._pieces, self._logprobs = [], []
        index = len(self._items) - 1
        return _event("output_item.added", output_index=index, item=deepcopy(item))

    def _close(self, status: Status) -> list[Event]:
        item = self._open
        if item is None:
            return []
        self._write_down()
        item["status"] = status
        if item["type"] == "message":
            place = self._place(content_index=0)
            part = item["content"][0]
            told = {"text": part["text"], "logprobs": list(part["logprobs"])}
            events = [
                _event("output_text.done", **place, **told),
                _event("content_part.done", **place, part=deepcopy(part)),
            ]
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = [_event("function_call_arguments.done", **self._place(), **named)]
        self._open = None
        index = len(self._items) - 1
        return [*events, _event("output_item.done", output_index=index, item=deepcopy(item))]

    def _write_down(self) -> None:
        if self._open is None:
            return
        text = "".join(self._pieces)
        if self._open["type"] == "function_call":
            self._open["arguments"] = text
        else:
            # Tokens at the end may have no text of their own: a stop string's, half a character's.
            part = self._open["content"][0]
            part["text"], part["logprobs"] = text, [*self._logprobs, *_values(self._untold)]

    def _told_logprobs(self) -> list[Any]:
        told, self._untold = _values(self._untold), []
        return told

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _place(self, **more: int) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1, **more}


def _values(logprobs: Sequence[TokenLogprob]) -> list[Any]:
    return list(chat_logprobs(logprobs)["content"])


def _event(kind: str, **fields: Any) -> Event:
    return {"type": f"response.{kind}", **fields}
