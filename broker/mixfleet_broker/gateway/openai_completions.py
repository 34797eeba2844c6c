"""OpenAI's older ``/v1/completions``: texts, or their tokens, continued without any chat format."""

import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Answer, Choice, collect_or_leave
from mixfleet_broker.gateway.completion_logprobs import LogprobLists
from mixfleet_broker.gateway.completion_schema import CompletionBody
from mixfleet_broker.gateway.openai_schema import of_choice
from mixfleet_broker.gateway.openai_shapes import finish_reason, of_text, usage_value
from mixfleet_broker.gateway.openai_stream import stream_chunks
from mixfleet_broker.gateway.service import Service, job_ids
from mixfleet_broker.messages import ChatJob, JobEnd, JobEvent, TokenChunk, Usage

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/completions")
async def create_completion(request: Request, body: CompletionBody) -> Response:
    """Continue one prompt or several, whole or as a stream of chunks."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    body.check()
    jobs = completion_jobs(body, job_ids(request, caller, body.num_choices()))
    reply = CompletionReply(body, jobs)
    answer = await service.begin(
        request, caller, jobs, streams=body.stream, priority=body.priority()
    )
    if body.stream:
        return sse.EventStream(reply.stream(answer), answer.headers, answer.leave)
    choices = await collect_or_leave(answer, request.receive)
    return JSONResponse(reply.whole(choices), headers=answer.headers)


def completion_jobs(body: CompletionBody, ids: list[str]) -> list[ChatJob]:
    """Return one job for each choice, all choices of the first prompt first, as OpenAI has them."""
    settings = body.settings(body.max_tokens, body.logprobs)
    n = body.n or 1
    prompts = body.prompts()
    jobs = []
    for index, job_id in enumerate(ids):
        prompt = prompts[index // n]
        jobs.append(
            ChatJob(
                job_id=job_id,
                model=body.model,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=() if isinstance(prompt, str) else prompt,
                sampling=of_choice(settings, index % n),
            )
        )
    return jobs


class CompletionReply:
    """What one request is answered with."""

    def __init__(self, body: CompletionBody, jobs: list[ChatJob]) -> None:
        self._body = body
        self._jobs = jobs
        self._head = {
            "id": f"cmpl-{jobs[0].job_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._usage_of = partial(usage_value, per_prompt=body.n or 1)

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """Return the one object of a request that is not streamed."""
        return {
            **self._head,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage_of([choice.usage for choice in choices]),
        }

    def stream(self, answer: Answer) -> AsyncIterator[bytes]:
        """Return the events of a stream."""
        deltas = [_Deltas(self._body, self._echo(i), i) for i in range(len(self._jobs))]
        return stream_chunks(answer, self._body, self._head, deltas, self._usage_of)

    def _echo(self, index: int) -> str:
        return (self._jobs[index].prompt or "") if self._body.echo else ""

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = LogprobLists() if self._body.logprobs is not None else None
        return {
            "index": index,
            "text": self._echo(index) + "".join(choice.text),
            "logprobs": logprobs.take(of_text(choice.logprobs)) if logprobs else None,
            "finish_reason": finish_reason(choice.end, has_calls=False),
        }


class _Deltas:
    """The chunks of one choice."""

    def __init__(self, body: CompletionBody, echo: str, index: int) -> None:
        self._echo = echo
        self._index = index
        self._logprobs = LogprobLists() if body.logprobs is not None else None
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def first(self) -> dict[str, Any] | None:
        """Return the prompt, if it is to be echoed."""
        return self._choice(self._echo) if self._echo else None

    def plain_text(self, what: JobEvent) -> bytes | None:
        """Return the rest of a chunk, after ``"index":``, of text and nothing else; else None."""
        if not isinstance(what, TokenChunk) or self._logprobs or not what.text:
            return None
        text = f'{self._index},"text":{sse.dumps(what.text)}'
        return f'{text},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()

    def take(self, what: JobEvent) -> list[dict[str, Any]]:
        """Return the choices that an event gives, one for each chunk."""
        if isinstance(what, JobEnd):
            self.usage = what.usage or self.usage
            return [self._choice("", reason=finish_reason(what, has_calls=False))]
        if not isinstance(what, TokenChunk):
            return []
        shown = of_text(what.logprobs)
        if not what.text and not shown:
            return []
        lists = self._logprobs.take(shown) if self._logprobs else None
        return [self._choice(what.text, lists)]

    def _choice(
        self,
        text: str,
        logprobs: dict[str, Sequence[Any]] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
