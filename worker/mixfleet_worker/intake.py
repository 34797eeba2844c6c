"""The one place where wire values are checked and become engine values.

A claimed payload comes in; out goes a request for the engine together with the text filter of
its answer, or the end of a job that has nothing left to compute. A payload that cannot be used
raises, and hurts no other job.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeVar

from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    decode_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    FinishReason,
    SamplingSettings,
    TokenChunk,
)
from mixfleet_broker.queue import Lease
from mixfleet_engine.chat_format import ChatFormat, encode_prompt
from mixfleet_engine.detokenizer import AnswerText
from mixfleet_engine.errors import PromptTooLongError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_worker.handoff import TakenJob
from mixfleet_worker.output_grammar import output_grammar
from mixfleet_worker.tool_messages import engine_messages, offered_tools

SEED_BITS = 63

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedJob:
    """A job that the engine can compute."""

    lease: Lease
    request: GenerateRequest
    text: AnswerText
    """Has seen the tokens that earlier runs delivered."""
    claimed_at: float
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteJob:
    """A job whose earlier runs delivered the whole answer and died before they said so."""

    lease: Lease
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    chunk: TokenChunk | None
    """Text that was held back as a possible stop string, if any."""
    stop_string: str | None = None
    """The one that ended the answer, if one did."""
    claimed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """What the engine is asked to go on with."""

    token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    continues: bool
    """The answer goes on in the middle of a text, so that its first space counts."""
    tool_calls_id: int | None = None
    """The token that begins the tool calls; None if it may not make any."""


class Intake:
    """Turns claimed jobs into requests for one engine.

    Args:
        model: Name of the model served here; a job for another one is rejected.
        tokenizer: The checkpoint's own.
        chat_format: How a conversation becomes one prompt.
        context_length: Most tokens of prompt and answer together.
        defaults: The model's own sampling settings, for what a job leaves open.
    """

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        context_length: int,
        defaults: SamplingDefaults,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._chat_format = chat_format
        self._context_length = context_length
        self._defaults = defaults

    def admit(self, taken: TakenJob) -> AdmittedJob | CompleteJob:
        """Check one claimed job and make the request that begins or continues its answer.

        Raises:
            MessageError: The payload, or the tokens delivered so far, are not of the schema.
            RequestRejectedError: The conversation or its length does not fit this model.
        """
        lease = taken.claimed.lease
        _check_delivered(taken)
        job = self._checked(decode_job(taken.claimed.payload), lease)
        prompt = self._prompt(job)
        max_tokens = self._max_tokens(job.sampling, len(prompt.token_ids))
        text = AnswerText(
            self._tokenizer,
            job.sampling.stop,
            continues=prompt.continues,
            tool_calls_id=prompt.tool_calls_id,
        )
        finish_reason = self._replay(taken, text, max_tokens, prompt.stop_token_ids)
        if finish_reason is not None:
            return _complete(taken, finish_reason, len(prompt.token_ids), text)
        request = GenerateRequest(
            request_id=lease.job_id,
            prompt_token_ids=prompt.token_ids,
            output_token_ids=taken.delivered_token_ids,
            max_tokens=max_tokens,
            stop_token_ids=prompt.stop_token_ids,
            sampling=self._sampling_params(job),
            deadline=_deadline(taken),
            grammar=output_grammar(job, self._tokenizer),
        )
        return AdmittedJob(
            lease=lease,
            request=request,
            text=text,
            claimed_at=taken.claimed_at,
            traceparent=job.traceparent,
        )

    def _checked(self, job: ChatJob, lease: Lease) -> ChatJob:
        if job.job_id != lease.job_id:
            raise MessageError(f"job {lease.job_id} holds the request of job {job.job_id}")
        if job.model != self._model:
            raise MessageError(
                f"the job asks for model {job.model!r} on the queue of {self._model!r}"
            )
        return job

    def _prompt(self, job: ChatJob) -> _Prompt:
        prompt = self._chat_prompt(job) if job.messages else self._plain_prompt(job)
        return replace(prompt, stop_token_ids=frozenset()) if job.sampling.ignore_eos else prompt

    def _plain_prompt(self, job: ChatJob) -> _Prompt:
        eos_id = self._tokenizer.eos_id
        # Whether given ids are in the vocabulary is the engine's to say: it knows the model's.
        token_ids = job.prompt_token_ids
        if job.prompt is not None:
            token_ids = tuple(encode_prompt(self._tokenizer, job.prompt))
        return _Prompt(
            token_ids=token_ids,
            stop_token_ids=frozenset() if eos_id is None else frozenset({eos_id}),
            continues=True,
        )

    def _chat_prompt(self, job: ChatJob) -> _Prompt:
        messages, tools = engine_messages(job), offered_tools(job)
        return _Prompt(
            token_ids=tuple(self._chat_format.encode(messages, tools)),
            stop_token_ids=self._chat_format.stop_token_ids,
            continues=self._chat_format.continues(messages),
            tool_calls_id=self._chat_format.tool_calls_id if tools else None,
        )

    def _max_tokens(self, sampling: SamplingSettings, num_prompt_tokens: int) -> int:
        """Return the longest answer; the engine itself checks one that was asked for."""
        if sampling.max_tokens is not None:
            return sampling.max_tokens
        rest = self._context_length - num_prompt_tokens
        if rest < 1:
            raise PromptTooLongError(
                prompt_tokens=num_prompt_tokens,
                max_tokens=1,
                context_length=self._context_length,
            )
        return rest

    def _sampling_params(self, job: ChatJob) -> SamplingParams:
        given, own = job.sampling, self._defaults
        none = SamplingParams()
        return SamplingParams(
            temperature=_or(given.temperature, own.temperature),
            top_k=_or(given.top_k, own.top_k),
            top_p=_or(given.top_p, own.top_p),
            seed=derived_seed(job.job_id) if given.seed is None else given.seed,
            min_p=_or(given.min_p, none.min_p),
            repetition_penalty=_or(given.repetition_penalty, none.repetition_penalty),
            presence_penalty=_or(given.presence_penalty, none.presence_penalty),
            frequency_penalty=_or(given.frequency_penalty, none.frequency_penalty),
            logit_bias=given.logit_bias,
            logprobs=given.logprobs,
        )

    def _replay(
        self,
        taken: TakenJob,
        text: AnswerText,
        max_tokens: int,
        stop_token_ids: frozenset[int],
    ) -> FinishReason | None:
        """Bring ``text`` to where the last run left it; return why the answer ended, if it did."""
        for token_id in taken.delivered_token_ids:
            if text.push(token_id).stopped or token_id in stop_token_ids:
                return "stop"
        return "length" if len(taken.delivered_token_ids) >= max_tokens else None


def _or(given: Number | None, default: Number) -> Number:
    return default if given is None else given


def _check_delivered(taken: TakenJob) -> None:
    num_delivered, num_read = taken.claimed.num_delivered, len(taken.delivered_token_ids)
    if num_read != num_delivered:
        raise MessageError(
            f"the channel holds {num_read} tokens and says that it holds {num_delivered}"
        )


def _deadline(taken: TakenJob) -> float | None:
    """Return when the job must be complete, on the worker's and the engine's monotonic clock."""
    left_s = taken.claimed.time_left_s
    return None if left_s is None else taken.claimed_at + left_s


def derived_seed(job_id: str) -> int:
    """Return the seed of a job that names none: the same in every run and on every worker."""
    digest = sha256(job_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def _complete(
    taken: TakenJob, finish_reason: FinishReason, num_prompt_tokens: int, text: AnswerText
) -> CompleteJob:
    num_tokens = len(taken.delivered_token_ids)
    stop_string, rest = text.stop_string, text.finish()
    chunk = None
    if rest:
        chunk = TokenChunk(
            num_tokens=num_tokens,
            text=rest,
            token_ids=(),
            part=text.part,
            num_prompt_tokens=num_prompt_tokens,
        )
    return CompleteJob(
        lease=taken.claimed.lease,
        finish_reason=finish_reason,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        chunk=chunk,
        stop_string=stop_string,
        claimed_at=taken.claimed_at,
    )
