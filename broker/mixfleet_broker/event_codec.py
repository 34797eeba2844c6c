"""The bytes of a job's events, as they lie in its channel.

An event is an entry of a Redis stream with two fields, ``k`` its kind and ``d`` its body, and an
id that says the run and how many tokens the answer has with it. Neither is said twice.
"""

from dataclasses import replace
from typing import Final, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.messages import (
    MAX_COUNT,
    AnswerPart,
    FinishReason,
    JobEnd,
    JobEvent,
    Requeued,
    RequeueReason,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from mixfleet_broker.packing import pack, unpack
from mixfleet_broker.schema import Fields, integer, items, number

RUN_STARTED: Final = "a"
TOKENS: Final = "t"
REQUEUED: Final = "q"
END: Final = "e"

MAX_LOGPROB: Final = 1e6
"""Farthest below zero: it stands for minus infinity too, which JSON could not carry."""
MAX_REASON_CHARACTERS: Final = 2000
"""Longest message of an end."""


def encode_run_start(worker_id: str) -> bytes:
    """Return the body of a :class:`RunStarted`; its id says the rest."""
    return pack({"w": worker_id})


def encode_chunk(chunk: TokenChunk) -> bytes:
    """Return the body of a chunk; its id says how many tokens the answer has with it."""
    if not 0 <= len(chunk.token_ids) <= chunk.num_tokens:
        raise MessageError(
            f"chunk: {len(chunk.token_ids)} new tokens in an answer of {chunk.num_tokens}"
        )
    body: dict[str, object] = {"t": chunk.text, "i": list(chunk.token_ids)}
    if chunk.part == "tool_calls":
        body["c"] = True
    if chunk.logprobs:
        body["l"] = [_logprob_body(item) for item in chunk.logprobs]
    if chunk.num_prompt_tokens is not None:
        body["n"] = chunk.num_prompt_tokens
    return pack(body)


def _logprob_body(item: TokenLogprob) -> list[object]:
    body: list[object] = [item.token, item.logprob, list(item.top)]
    return [*body, True] if item.is_control else body


def with_bounded_message(end: JobEnd) -> JobEnd:
    """Return ``end`` with a message that fits any wire: what was cut from it is counted in it.

    The message of a failure may quote anything, and saying why a job failed must not fail.
    """
    if end.message is None:
        return end
    # Half a surrogate pair, which UTF-8 cannot carry, is written out.
    message = end.message.encode(errors="backslashreplace").decode()
    if len(message) > MAX_REASON_CHARACTERS:
        message = f"{message[:MAX_REASON_CHARACTERS]}... ({len(message)} characters in all)"
    return replace(end, message=message)


def encode_end(end: JobEnd) -> bytes:
    """Return the body of a job's end.

    Raises:
        MessageError: It is finished without a finish reason, or failed without a code.
    """
    usage = end.usage
    body = {
        "s": end.state,
        "r": end.finish_reason,
        "c": end.code,
        "m": end.message,
        "x": end.stop_string,
        "u": None if usage is None else [usage.prompt_tokens, usage.completion_tokens],
    }
    data = pack({name: value for name, value in body.items() if value is not None})
    _read_end(unpack(data))
    return data


def decode_event(kind: str, run: int, num_tokens: int, data: bytes) -> JobEvent:
    """Return one event of a channel.

    Args:
        kind: ``a`` run started, ``t`` tokens, ``q`` queued again, ``e`` end.
        run: The first half of the event's id.
        num_tokens: The second half: tokens of the answer so far.
        data: The body.

    Raises:
        MessageError: It is not of the schema.
    """
    value = unpack(data)
    if kind == RUN_STARTED:
        fields = Fields(value, "run")
        worker_id = fields.text("w")
        fields.done()
        return RunStarted(run=run, worker_id=worker_id, num_tokens=num_tokens)
    if kind == TOKENS:
        return _read_chunk(value, num_tokens)
    if kind == REQUEUED:
        return _read_requeued(value, num_tokens)
    if kind == END:
        return _read_end(value)
    raise MessageError(f"channel: unknown kind of event {kind[:20]!r}")


def _read_chunk(value: object, num_tokens: int) -> TokenChunk:
    fields = Fields(value, "chunk")
    chunk_text = fields.text("t")
    token_ids = tuple(integer(i, "chunk.i", 0, MAX_COUNT) for i in fields.items("i"))
    part: AnswerPart = "tool_calls" if fields.take("c") is True else "text"
    logprobs = tuple(_read_logprob(item) for item in fields.items("l"))
    num_prompt_tokens = fields.integer_or_none("n", 0, MAX_COUNT)
    fields.done()
    if len(token_ids) > num_tokens:
        raise MessageError(f"chunk: {len(token_ids)} new tokens in an answer of {num_tokens}")
    if logprobs and len(logprobs) != len(token_ids):
        raise MessageError(f"chunk: {len(logprobs)} log-probabilities of {len(token_ids)} tokens")
    return TokenChunk(
        num_tokens=num_tokens,
        text=chunk_text,
        token_ids=token_ids,
        part=part,
        logprobs=logprobs,
        num_prompt_tokens=num_prompt_tokens,
    )


def _read_logprob(value: object) -> TokenLogprob:
    parts = items(value, "chunk.l")
    if len(parts) not in (3, 4):
        raise MessageError(f"chunk.l: {len(parts)} parts, must be 3 or 4")
    is_control = len(parts) == 4
    if is_control and parts[3] is not True:
        raise MessageError("chunk.l: the fourth part must be true")
    token, logprob = _read_pair(parts[:2])
    top = tuple(_read_pair(pair) for pair in items(parts[2], "chunk.l top"))
    return TokenLogprob(token=token, logprob=logprob, top=top, is_control=is_control)


def _read_pair(value: object) -> tuple[bytes, float]:
    parts = items(value, "chunk.l")
    if len(parts) != 2 or not isinstance(parts[0], bytes):
        raise MessageError("chunk.l: must be the bytes of a token and a number")
    return parts[0], number(parts[1], "chunk.l", -MAX_LOGPROB, 0.0)


def _read_requeued(value: object, num_tokens: int) -> Requeued:
    fields = Fields(value, "requeued")
    word = fields.text("r")
    fields.done()
    for known in get_args(RequeueReason):
        if word == known:
            reason: RequeueReason = known
            return Requeued(num_tokens=num_tokens, reason=reason)
    raise MessageError(f"requeued.r={word[:20]!r}: must be one of {get_args(RequeueReason)}")


def _read_end(value: object) -> JobEnd:
    fields = Fields(value, "end")
    state, reason = fields.text("s"), _read_reason(fields.take("r"))
    code, message = fields.text_or_none("c"), fields.text_or_none("m")
    usage, stop = _read_usage(fields.take("u")), fields.text_or_none("x")
    fields.done()
    if state == "finished" and reason is not None and code is None:
        return JobEnd(
            state="finished", finish_reason=reason, message=message, usage=usage, stop_string=stop
        )
    if stop is not None:
        raise MessageError(f"end: state {state[:20]!r} with a stop string")
    if state == "failed" and code is not None and reason is None:
        return JobEnd(state="failed", code=code, message=message, usage=usage)
    if state == "canceled" and code is None and reason is None:
        return JobEnd(state="canceled", message=message, usage=usage)
    raise MessageError(
        f"end: state {state[:20]!r} with finish reason {reason} and code {str(code)[:40]!r}"
    )


def _read_reason(value: object) -> FinishReason | None:
    for known in get_args(FinishReason):
        if value == known:
            reason: FinishReason = known
            return reason
    if value is None:
        return None
    raise MessageError(f"end.r={str(value)[:20]!r}: must be one of {get_args(FinishReason)}")


def _read_usage(value: object) -> Usage | None:
    if value is None:
        return None
    counts = [integer(item, "end.u", 0, MAX_COUNT) for item in items(value, "end.u")]
    if len(counts) != 2:
        raise MessageError(f"end.u: {len(counts)} counts, must be 2")
    return Usage(prompt_tokens=counts[0], completion_tokens=counts[1])
