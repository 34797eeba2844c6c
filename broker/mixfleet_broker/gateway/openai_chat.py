"""OpenAI's ``/v1/chat/completions``, exactly as its clients know it, over the queue."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Answer, Choice, collect_or_leave
from mixfleet_broker.gateway.openai_schema import ChatBody, of_choice
from mixfleet_broker.gateway.openai_shapes import (
    chat_logprobs,
    finish_reason,
    of_text,
    tool_call_values,
    usage_value,
)
from mixfleet_broker.gateway.openai_stream import stream_chunks
from mixfleet_broker.gateway.service import Service, job_ids
from mixfleet_broker.messages import ChatJob, JobEnd, JobEvent, TokenChunk, Usage
from mixfleet_broker.tool_call_text import (
    ArgumentsPiece,
    CallStarted,
    ToolCallParser,
)

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/chat/completions")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    jobs = chat_jobs(body, job_ids(request, caller, body.n or 1))
    reply = ChatReply(body, jobs)
    answer = await service.begin(
        request, caller, jobs, streams=body.stream, priority=body.priority()
    )
    if body.stream:
        return sse.EventStream(reply.stream(answer), answer.headers, answer.leave)
    choices = await collect_or_leave(answer, request.receive)
    return JSONResponse(reply.whole(choices), headers=answer.headers)


def chat_jobs(body: ChatBody, ids: list[str]) -> list[ChatJob]:
    """Return one job for each choice; each has a seed of its own."""
    settings = body.settings(body.most_tokens(), body.num_logprobs())
    tools = tuple(tool.spec() for tool in body.tools or ())
    return [
        ChatJob(
            job_id=job_id,
            model=body.model,
            messages=tuple(m.message(f"messages.{i}") for i, m in enumerate(body.messages)),
            tools=tools,
            tool_choice=body.choice_of_tool(),
            output_format=body.response_format.output_format() if body.response_format else None,
            sampling=of_choice(settings, index),
        )
        for index, job_id in enumerate(ids)
    ]


class ChatReply:
    """What one request is answered with."""

    def __init__(self, body: ChatBody, jobs: list[ChatJob]) -> None:
        self._body = body
        self._jobs = jobs
        self._created = int(time.time())

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """Return the one object of a request that is not streamed."""
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage_value([choice.usage for choice in choices]),
        }

    def stream(self, answer: Answer) -> AsyncIterator[bytes]:
        """Return the events of a stream."""
        deltas = [_Deltas(self._body, job.job_id, index) for index, job in enumerate(self._jobs)]
        head = self._head("chat.completion.chunk")
        return stream_chunks(answer, self._body, head, deltas, usage_value)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._jobs[0].job_id}",
            "object": kind,
            "created": self._created,
            "model": self._body.model,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        calls = tool_call_values(choice.job_id, "".join(choice.tool_text))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(choice.text) if choice.text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(choice.logprobs) if self._body.logprobs else None,
            "finish_reason": finish_reason(choice.end, has_calls=bool(calls)),
        }


class _Deltas:
    """The chunks of one choice."""

    def __init__(self, body: ChatBody, job_id: str, index: int) -> None:
        self._body = body
        self._index = index
        self._calls = ToolCallParser(job_id)
        self._has_calls = False
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def first(self) -> dict[str, Any]:
        """Return the choice of the first chunk, which alone says the role."""
        return self._choice({"role": "assistant", "content": ""})

    def plain_text(self, what: JobEvent) -> bytes | None:
        """Return the rest of a chunk, after ``"index":``, of text and nothing else; else None."""
        if not isinstance(what, TokenChunk) or what.part != "text" or self._body.logprobs:
            return None
        if not what.text:
            return None
        delta = f'{self._index},"delta":{{"content":{sse.dumps(what.text)}}}'
        return f'{delta},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()

    def take(self, what: JobEvent) -> list[dict[str, Any]]:
        """Return the choices that an event gives, one for each chunk."""
        if isinstance(what, JobEnd):
            self.usage = what.usage or self.usage
            reason = finish_reason(what, has_calls=self._has_calls)
            return [self._choice({}, reason)]
        if not isinstance(what, TokenChunk):
            return []
        if what.part == "tool_calls":
            return [self._choice({"tool_calls": [call]}) for call in self._call_deltas(what.text)]
        if not what.text and not (self._body.logprobs and of_text(what.logprobs)):
            return []
        choice = self._choice({"content": what.text})
        if self._body.logprobs:
            choice["logprobs"] = chat_logprobs(what.logprobs)
        return [choice]

    def _call_deltas(self, text: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in self._calls.push(text):
            if isinstance(event, CallStarted):
                self._has_calls = True
                deltas.append(
                    {
                        "index": event.index,
                        "id": event.call_id,
                        "type": "function",
                        "function": {"name": event.name, "arguments": ""},
                    }
                )
            elif isinstance(event, ArgumentsPiece):
                deltas.append({"index": event.index, "function": {"arguments": event.text}})
        return deltas

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": reason,
        }
