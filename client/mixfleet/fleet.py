"""The client: sends chats to the fleet and hands back their answers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, get_args

from mixfleet.attendance import Attendance
from mixfleet.events import Patience
from mixfleet.openai_shapes import (
    Messages,
    conversation,
    output_format_of,
    tool_choice_of,
    tools_of,
)
from mixfleet.stream import ChatStream
from mixfleet.transport import RedisTransport, Transport
from mixfleet_broker.errors import MessageError, UnknownModelError
from mixfleet_broker.inquiries import TIMEOUT_S
from mixfleet_broker.inquiry_codec import Detokenize, TokenizeChat, TokenizeText
from mixfleet_broker.messages import (
    ChatJob,
    SamplingSettings,
    new_job_id,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.settings import Settings, resolve
from mixfleet_broker.terms import JobTerms, Priority
from mixfleet_broker.traceparent import current_traceparent

OnDisconnect = Literal["continue", "cancel"]


class Client:
    """A connection to a fleet.

    Args:
        redis: URL of the fleet's Redis; None looks at ``MIXFLEET_REDIS``, ``REDIS_URL``, the
            configuration file, and for the embedded server that ``mixfleet up`` started. It wins
            over ``settings``.
        model: The model asked when a call names none; None takes the only one that is served.
        settings: All settings, resolved; None resolves them from the environment.
        transport: Another way to the fleet than Redis, for tests.

    Raises:
        BrokerUnavailableError: No Redis is given or running; the text says what to do.
        ConfigError: A setting in the environment or the configuration file cannot be used.
    """

    def __init__(
        self,
        redis: str | None = None,
        *,
        model: str | None = None,
        settings: Settings | None = None,
        transport: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if settings is None:
            settings = resolve({"redis": redis})
        elif redis is not None:
            settings = replace(settings, redis=redis)
        self._settings = settings
        self._transport = transport or RedisTransport(self._settings)
        self._model = model or self._settings.model
        self._clock = clock
        self._attendance = Attendance(self._transport)

    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        ignore_eos: bool = False,
        priority: Priority = "default",
        start_within_s: float | None = None,
        finish_within_s: float | None = None,
        on_disconnect: OnDisconnect = "continue",
        first_token_timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        job_id: str | None = None,
    ) -> ChatStream:
        """Send a conversation and return its answer's stream at once.

        Args:
            messages: A question, or turns ``{"role": ..., "content": ...}``, also with OpenAI's
                ``tool_calls``, which may be a stream's own, and ``tool_call_id``.
            model: Name of the model.
            system: Instruction put before the conversation.
            tools: What the model may call, in OpenAI's form; the calls are the stream's
                ``tool_calls``. Models of the first Mixtral's kind know no tools.
            tool_choice: ``auto``, ``none``, ``required``, or a tool in OpenAI's form.
            response_format: ``{"type": "json_object"}``, or ``json_schema`` in OpenAI's form.
            temperature: 0 is greedy; None is the fleet's default, as for the next ones.
            top_k: Choose among the k most likely tokens; 0 is all.
            top_p: Choose among the most likely tokens that reach this probability.
            max_tokens: Longest answer; None lets it run to the end of the context.
            stop: The answer ends before the first of these texts.
            seed: The same seed and question give the same answer.
            min_p: Choose among tokens of at least this share of the likeliest one's probability.
            repetition_penalty: Above 1 makes tokens that were there less likely.
            presence_penalty: Above 0 makes tokens of the answer so far less likely.
            frequency_penalty: The same, once for each time that a token is there.
            logit_bias: What to add to the logit of a token, by its id.
            logprobs: Report each token's log-probability and that of so many others.
            ignore_eos: Go on where the model would end its answer, for benchmarks.
            priority: ``interactive`` goes before ``default``, that before ``batch``.
            start_within_s: Refuse the job, or end it, if no worker takes it by then.
            finish_within_s: End the job if its answer is not complete by then.
            on_disconnect: What becomes of the job when this process dies: ``continue``, for
                somebody else to read it, or ``cancel``.
            first_token_timeout_s: Longest wait for the first token; None is for ever.
            total_timeout_s: Longest wait for the end; None is for ever.
            job_id: An id of 32 hex digits made by ``new_job_id``; sending it twice is one job.

        Raises:
            InvalidMessagesError: The messages cannot be a conversation.
            MessageError: A value is outside its limits; the text names it.
            QueueFullError: The fleet takes no more jobs now, or no more of this tenant.
            DeadlineUnreachableError: The job would start too late.
            UnknownModelError: No model is named and none, or several, are served.
            BrokerUnavailableError: Redis cannot be reached.
        """
        sampling = _sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=stop,
            seed=seed,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        job = ChatJob(
            job_id=job_id or new_job_id(),
            model=self.choose_model(model),
            messages=conversation(messages, system),
            tools=tools_of(tools),
            tool_choice=tool_choice_of(tool_choice),
            output_format=output_format_of(response_format),
            # Sent twice under an id of the caller's it must be the same job, in whatever span.
            traceparent=None if job_id else current_traceparent(),
            sampling=sampling,
        )
        terms = self._terms(priority, start_within_s, finish_within_s, on_disconnect)
        return self._send(job, terms, first_token_timeout_s, total_timeout_s)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        ignore_eos: bool = False,
        priority: Priority = "default",
        start_within_s: float | None = None,
        finish_within_s: float | None = None,
        on_disconnect: OnDisconnect = "continue",
        first_token_timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        job_id: str | None = None,
    ) -> ChatStream:
        """Send plain text to be continued, without any chat format; else as :meth:`chat`.

        ``prompt`` is the text, or the model's own tokens, which are taken as they are.
        """
        sampling = _sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=stop,
            seed=seed,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        job = ChatJob(
            job_id=job_id or new_job_id(),
            model=self.choose_model(model),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=() if isinstance(prompt, str) else tuple(prompt),
            traceparent=None if job_id else current_traceparent(),
            sampling=sampling,
        )
        terms = self._terms(priority, start_within_s, finish_within_s, on_disconnect)
        return self._send(job, terms, first_token_timeout_s, total_timeout_s)

    def attach(
        self,
        job_id: str,
        after: str | None = None,
        *,
        first_token_timeout_s: float | None = None,
        total_timeout_s: float | None = None,
    ) -> ChatStream:
        """Read a job's answer from the start, or from after an event, as often as you like.

        Leaving the stream's block does not cancel the job; its :meth:`ChatStream.cancel` does.

        Args:
            job_id: The job, of this or of any other client.
            after: The ``last_event_id`` of another stream, to go on from there.
            first_token_timeout_s: Longest wait for the next token; None is for ever.
            total_timeout_s: Longest wait for the end; None is for ever.

        Raises:
            UnknownJobError: There is no such job, or its answer is no longer kept.
        """
        model = self._transport.model_of(job_id)
        patience = self._patience(first_token_timeout_s, total_timeout_s)
        return ChatStream(
            self._transport,
            job_id,
            model=model,
            patience=patience,
            after=after,
            is_owner=False,
            clock=self._clock,
        )

    def status(self, job_id: str) -> JobInfo:
        """Return where a job is; raises UnknownJobError when nobody knows it."""
        return self._transport.status(job_id, self._transport.model_of(job_id))

    def cancel(self, job_id: str, reason: str | None = None) -> None:
        """Stop a job wherever it is; raises UnknownJobError when nobody knows it."""
        self._transport.cancel(job_id, self._transport.model_of(job_id), reason)

    def models(self) -> tuple[str, ...]:
        """Return the names of the models served now or lately."""
        return self._transport.models()

    def choose_model(self, model: str | None = None) -> str:
        """Return the model that a call asks: the one named, else the only one that is served.

        Raises:
            UnknownModelError: None is named and none, or several, are served.
        """
        chosen = model or self._model
        if chosen is not None:
            return chosen
        known = self._transport.models()
        # A model that was served last week is a choice only when none is served now.
        served = tuple(name for name in known if self._transport.num_workers(name)) or known
        if len(served) == 1:
            return served[0]
        if served:
            message = f"several models are served, name one of: {', '.join(served)}"
        else:
            message = "no model is served: start a worker with `mixfleet worker` or `mixfleet up`"
        raise UnknownModelError(message, models=served)

    def count_tokens(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> int:
        """Return how many tokens the prompt of a conversation has, as a worker counts them.

        A worker answers beside its generating, also when all its slots are busy.

        Args:
            messages: As for :meth:`chat`.
            model: Name of the model.
            system: Instruction put before the conversation.
            tools: What the model may call.
            timeout_s: Longest wait for the answer, at most 30.

        Raises:
            InvalidMessagesError: The messages cannot be a conversation.
            NoWorkerError: No worker of the model lives.
            InquiriesFullError: Too many such questions wait.
            InquiryTimeoutError: No answer came in time; ask again.
            UnknownModelError: No model is named and none, or several, are served.
            BrokerUnavailableError: Redis cannot be reached.
        """
        chosen = self.choose_model(model)
        job = ChatJob(
            job_id=new_job_id(),
            model=chosen,
            messages=conversation(messages, system),
            tools=tools_of(tools),
        )
        inquiry = TokenizeChat(job=job, detail="count")
        return self._transport.ask(chosen, inquiry, timeout_s).num_tokens

    def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        add_special_tokens: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[int, ...]:
        """Return the model's tokens of a text, with BOS before it unless told otherwise.

        Raises:
            MixfleetError: As :meth:`count_tokens`.
        """
        inquiry = TokenizeText(text=text, add_special_tokens=add_special_tokens)
        return self._transport.ask(self.choose_model(model), inquiry, timeout_s).token_ids

    def detokenize(
        self, token_ids: Sequence[int], *, model: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> str:
        """Return the text of tokens; control tokens have none.

        Raises:
            InvalidRequestError: One is not in the model's vocabulary.
            MixfleetError: As :meth:`count_tokens`.
        """
        inquiry = Detokenize(token_ids=tuple(token_ids))
        return self._transport.ask(self.choose_model(model), inquiry, timeout_s).text or ""

    def num_workers(self, model: str) -> int:
        """Return how many live workers serve ``model``; jobs wait while there is none."""
        return self._transport.num_workers(model)

    def close(self) -> None:
        """Close all connections; jobs go on, but for those that end with their reader."""
        self._attendance.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _terms(
        self,
        priority: Priority,
        start_within_s: float | None,
        finish_within_s: float | None,
        on_disconnect: OnDisconnect,
    ) -> JobTerms:
        if on_disconnect not in get_args(OnDisconnect):
            known = ", ".join(get_args(OnDisconnect))
            raise MessageError(f"on_disconnect={on_disconnect!r}: must be one of {known}")
        return JobTerms(
            tenant=self._settings.tenant,
            priority=priority,
            start_within_s=start_within_s,
            finish_within_s=finish_within_s,
            ends_with_reader=on_disconnect == "cancel",
        )

    def _send(
        self,
        job: ChatJob,
        terms: JobTerms,
        first_token_timeout_s: float | None,
        total_timeout_s: float | None,
    ) -> ChatStream:
        started_at = self._clock()
        # The connection repeats it when a reply is lost: the same job id is one job.
        self._transport.submit(job, terms)
        if terms.ends_with_reader:
            self._attendance.enter(job.job_id)
        deadlines = (terms.start_within_s, terms.finish_within_s)
        patience = self._patience(first_token_timeout_s, total_timeout_s)
        return ChatStream(
            self._transport,
            job.job_id,
            model=job.model,
            patience=replace(
                patience, deadlines_s=tuple(within for within in deadlines if within is not None)
            ),
            clock=self._clock,
            started_at=started_at,
            attendance=self._attendance if terms.ends_with_reader else None,
        )

    def _patience(self, first_token_s: float | None, total_s: float | None) -> Patience:
        if first_token_s is None:
            first_token_s = self._settings.first_token_timeout_s
        return Patience(
            first_token_s=first_token_s, total_s=total_s, silence_s=2 * self._settings.lease_s
        )


def _sampling(**given: Any) -> SamplingSettings:
    """Return the settings that were given, and the schema's defaults for the others."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "stop" in chosen:
        stop = chosen["stop"]
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "logit_bias" in chosen:
        chosen["logit_bias"] = tuple(sorted(chosen["logit_bias"].items()))
    return SamplingSettings(**chosen)
