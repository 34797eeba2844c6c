"""The wire: what a client sends and what comes back.

These are plain values. job_codec.py makes the bytes of a job, event_codec.py those of its events,
and both check everything that they read against the schema.
"""

import secrets
import time
from dataclasses import dataclass, field
from typing import Final, Literal

MAX_COUNT: Final = 2**31 - 1
"""Of anything that is counted in tokens."""
MAX_LOGIT_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20
"""Most likely tokens that are reported beside each of an answer."""

Role = Literal["system", "user", "assistant", "tool"]
JobState = Literal["queued", "started", "finished", "failed", "canceled"]
"""rq's own status names."""
TERMINAL_STATES: frozenset[JobState] = frozenset({"finished", "failed", "canceled"})
FinishReason = Literal["stop", "length"]
AnswerPart = Literal["text", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of one of the client's tools, which the assistant asked for."""

    call_id: str
    """By which the result names it. Models know ids of nine letters and digits only, so a worker
    writes any other as one of these."""
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant, after its text, if it has any."""
    call_id: str | None = None
    """Of a ``tool`` message: the call whose result this is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool that the assistant may call."""

    name: str
    description: str = ""
    parameters: str = "{}"
    """JSON schema of its arguments, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """What the text of the answer must be; the worker lets the model say nothing else."""

    kind: Literal["json_object", "json_schema"]
    schema: str | None = None
    """The JSON schema, as text; given with ``json_schema`` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the answer is to be generated. None is the model's own default."""

    temperature: float | None = None
    """0 is greedy; at most 2."""
    top_k: int | None = None
    """0 keeps all tokens."""
    top_p: float | None = None
    """In (0, 1]."""
    max_tokens: int | None = None
    """Longest answer; None lets it run to the end of the model's context."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; none of it is ever shown."""
    seed: int | None = None
    """0 to 2**63 - 1; None derives one from the job id, so that a continued job goes on alike."""
    min_p: float | None = None
    """In [0, 1]: tokens of at least this share of the most likely one's probability."""
    repetition_penalty: float | None = None
    """In (0, 10]; above 1 makes tokens that were there less likely."""
    presence_penalty: float | None = None
    """In [-2, 2], as for the next one; OpenAI's."""
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of token id and a number in [-100, 100]; at most ``MAX_LOGIT_BIASES``."""
    logprobs: int | None = None
    """Report each token's log-probability and that of so many most likely ones, at most
    ``MAX_LOGPROBS``."""
    ignore_eos: bool = False
    """Go on where the model would end its answer, for benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """A chat to be answered.

    Exactly one of ``messages``, ``prompt`` and ``prompt_token_ids`` is given.
    """

    job_id: str
    """Made by the client, see :func:`new_job_id`; whoever knows it may read the answer."""
    model: str
    """Name of the model, which is the name of its queue."""
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    """Plain text to be continued, without any chat format."""
    prompt_token_ids: tuple[int, ...] = ()
    """The same, as the model's own tokens; BOS is theirs to have."""
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required``, or ``=`` and the name of the tool to be called."""
    output_format: OutputFormat | None = None
    traceparent: str | None = None
    """W3C trace context of whoever sent it."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of one answer, in tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A worker took the job. Another one later means that the first was lost."""

    run: int
    worker_id: str
    num_tokens: int
    """Tokens delivered by earlier runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely the model found a token of the answer, and what else it might have said."""

    token: bytes
    """Its text; may be a part of a character. A control token, which has none, goes by its name:
    ``</s>``, where an answer ends by it."""
    logprob: float
    """Natural logarithm, of the model's own probability: before penalties, bias and temperature.
    What is below -1e6, minus infinity included, is -1e6."""
    top: tuple[tuple[bytes, float], ...] = ()
    """The most likely tokens, best first."""
    is_control: bool = False
    """Whether it is a control token, and so no part of the answer's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """The next piece of an answer, one or more tokens long."""

    num_tokens: int
    """Tokens of the answer up to and including this chunk: 1, 2, 3, ... so that a reader can
    see that it lost nothing."""
    text: str
    """Whole characters; empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...]
    part: AnswerPart = "text"
    """What ``text`` belongs to: the answer's own text, or the JSON list of its tool calls."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token if the job asked for them."""
    num_prompt_tokens: int | None = None
    """Set on the first chunk of each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """The last event of a job; there is exactly one."""

    state: Literal["finished", "failed", "canceled"]
    finish_reason: FinishReason | None = None
    """Set when finished."""
    code: str | None = None
    """Set when failed: the stable name of the error, see errors.py."""
    message: str | None = None
    usage: Usage | None = None
    stop_string: str | None = None
    """The one that ended the answer, if one did."""


RequeueReason = Literal["lost", "released", "isolated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """The job waits again, and its next run goes on with the answer."""

    num_tokens: int
    """Tokens delivered so far."""
    reason: RequeueReason
    """Its worker died; gave it back; or its engine failed on a batch that it was part of."""


JobEvent = RunStarted | TokenChunk | Requeued | JobEnd


def new_job_id() -> str:
    """Return a new job id: 32 hex digits, 48 bits of time in ms and 80 random bits.

    Ids sort by time, and nobody can guess one.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
