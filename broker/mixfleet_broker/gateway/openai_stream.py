"""A stream of OpenAI's chunks: the same loop for chat and for completions."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.answer import Answer, Happening, Waiting
from mixfleet_broker.gateway.api_errors import ApiError, error_of_end
from mixfleet_broker.gateway.openai_schema import Sampling
from mixfleet_broker.gateway.openai_shapes import waiting_comment
from mixfleet_broker.messages import JobEnd, JobEvent, Usage


class Deltas(Protocol):
    """What one choice's stream is made of."""

    usage: Usage
    """Its counts, once it has ended."""

    def first(self) -> dict[str, Any] | None:
        """Return the choice that opens the stream, if one does."""

    def plain_text(self, what: JobEvent) -> bytes | None:
        """Return the rest of a chunk, after ``"index":``, of text and nothing else; else None."""

    def take(self, what: JobEvent) -> list[dict[str, Any]]:
        """Return the choices that an event gives, one for each chunk."""


async def stream_chunks(
    answer: Answer,
    body: Sampling,
    head: dict[str, Any],
    deltas: Sequence[Deltas],
    usage_of: Callable[[Sequence[Usage]], dict[str, int]],
) -> AsyncIterator[bytes]:
    """Iterate over the events of a stream; a failure is its last one.

    Args:
        answer: Whose happenings they are.
        body: The request, which says if usage is told.
        head: Of every chunk.
        deltas: One for each choice.
        usage_of: The whole request's usage from that of its choices.
    """
    # Most chunks differ in their text alone, and writing all of one as JSON is half its cost.
    before = f'data: {sse.dumps(head).removesuffix("}")},"choices":[{{"index":'.encode(
        errors="backslashreplace"
    )
    try:
        opening = [choice for d in deltas if (choice := d.first()) is not None]
        if opening:
            yield b"".join(sse.data({**head, "choices": [choice]}) for choice in opening)
        async for batch in answer.happenings():
            pieces = [_piece(answer, head, before, deltas, happening) for happening in batch]
            yield b"".join(pieces) if pieces else sse.KEEP_ALIVE
        if body.stream_options and body.stream_options.include_usage:
            yield sse.data({**head, "choices": [], "usage": usage_of([d.usage for d in deltas])})
        yield sse.DONE
    except ApiError as error:
        await answer.cancel("another choice of the request failed")
        yield sse.data(error.openai_body())
    finally:
        await answer.leave()


def _piece(
    answer: Answer,
    head: dict[str, Any],
    before: bytes,
    deltas: Sequence[Deltas],
    happening: Happening,
) -> bytes:
    what = happening.what
    if isinstance(what, Waiting):
        return waiting_comment(what.info)
    if isinstance(what, JobEnd):
        failure = error_of_end(what, answer.job_ids[happening.index])
        if failure is not None:
            raise failure
    plain = deltas[happening.index].plain_text(what)
    if plain is not None:
        return before + plain
    choices = deltas[happening.index].take(what)
    return b"".join(sse.data({**head, "choices": [choice]}) for choice in choices)
