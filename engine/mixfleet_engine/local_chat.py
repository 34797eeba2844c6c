"""One conversation with an engine in the same process: no queue, no Redis, no other users."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from mixfleet_engine.chat_format import ChatFormat
from mixfleet_engine.conversation import Message
from mixfleet_engine.detokenizer import Detokenizer
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.errors import AnswerFailedError, PromptTooLongError
from mixfleet_engine.prompt_encoding import encode_prompt
from mixfleet_engine.request import FinishReason, GenerateRequest, SamplingParams
from mixfleet_engine.request_check import MAX_SEED
from mixfleet_engine.tokenizer import Tokenizer

_REQUEST_ID = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    continues: bool
    """Whether the answer goes on in the middle of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStats:
    """What one answer took."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    """From the question to the first token."""
    total_s: float
    finish_reason: FinishReason | None
    """None: the reader left before the end."""

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 where there was no second one."""
        decode_s = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / decode_s if decode_s > 0 else 0.0


class LocalChat:
    """A conversation that grows turn by turn, or a plain text that grows.

    Args:
        engine: Nobody else uses it.
        tokenizer: The model's.
        chat_format: How turns are written; None: a plain text is continued.
        sampling: How tokens are chosen; each answer's seed is the given one plus its number.
        max_tokens: Longest answer; None: as far as the context reaches.
        system_prompt: Instruction in front; "" for none.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None,
        *,
        sampling: SamplingParams,
        max_tokens: int | None = None,
        system_prompt: str = "",
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._format = chat_format
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._system_prompt = system_prompt
        self._num_answers = 0
        self._messages: list[Message] = []
        self._text = ""
        self.last_stats: AnswerStats | None = None
        """Of the latest answer."""
        self.clear()

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._text = ""
        self._messages = []
        if self._system_prompt:
            self._messages.append(Message(role="system", content=self._system_prompt))

    def set_system_prompt(self, text: str) -> None:
        """Put ``text`` in front of a new conversation; "" is none."""
        self._system_prompt = text
        self.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece, and remember both; leaving early ends the answer.

        A question without an answer is forgotten.

        Raises:
            RequestRejectedError: The conversation does not fit; nothing is remembered.
            AnswerFailedError: The model's numbers were not finite.
        """
        messages = [*self._messages, Message(role="user", content=question)]
        text = self._text + question
        answer: list[str] = []
        pieces = self._generate(self._prompt(messages, text))
        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            pieces.close()
            self._remember(messages, text, "".join(answer))

    def _remember(self, messages: list[Message], text: str, answer: str) -> None:
        if answer:  # an empty one is no turn that a format could write
            self._text = text + answer
            self._messages = [*messages, Message(role="assistant", content=answer)]

    def _prompt(self, messages: Sequence[Message], text: str) -> _Prompt:
        if self._format is not None:
            return _Prompt(
                token_ids=tuple(self._format.encode(messages)),
                stop_token_ids=self._format.stop_token_ids,
                continues=self._format.continues(messages),
            )
        eos_id = self._tokenizer.eos_id
        return _Prompt(
            token_ids=tuple(encode_prompt(self._tokenizer, text)),
            stop_token_ids=frozenset() if eos_id is None else frozenset({eos_id}),
            continues=True,
        )

    def _generate(self, prompt: _Prompt) -> Generator[str, None, None]:
        started = time.monotonic()
        self._engine.submit(self._request(prompt))
        detokenizer = Detokenizer(self._tokenizer, continues=prompt.continues)
        first_s, num_tokens = 0.0, 0
        finish_reason: FinishReason | None = None
        try:
            while finish_reason is None:
                for output in self._engine.step():
                    finish_reason = output.finish_reason
                    first_s = first_s or time.monotonic() - started
                    num_tokens += len(output.token_ids)
                    yield "".join(map(detokenizer.push, output.token_ids))
            yield detokenizer.flush()
            if finish_reason == "error":
                raise AnswerFailedError("the model's numbers were not finite: no token to choose")
        finally:
            self._engine.abort(_REQUEST_ID)
            self.last_stats = AnswerStats(
                prompt_tokens=len(prompt.token_ids),
                completion_tokens=num_tokens,
                first_token_s=first_s,
                total_s=time.monotonic() - started,
                finish_reason=finish_reason,
            )

    def _request(self, prompt: _Prompt) -> GenerateRequest:
        num_prompt, context_length = len(prompt.token_ids), self._engine.context_length
        if num_prompt >= context_length:
            raise PromptTooLongError(
                prompt_tokens=num_prompt, max_tokens=1, context_length=context_length
            )
        number, self._num_answers = self._num_answers, self._num_answers + 1
        seed = (self._sampling.seed + number) % (MAX_SEED + 1)
        return GenerateRequest(
            request_id=_REQUEST_ID,
            prompt_token_ids=prompt.token_ids,
            max_tokens=context_length - num_prompt
            if self._max_tokens is None
            else self._max_tokens,
            stop_token_ids=prompt.stop_token_ids,
            sampling=replace(self._sampling, seed=seed),
        )
