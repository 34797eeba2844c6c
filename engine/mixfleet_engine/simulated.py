"""A simulated engine: the same door, no model, no torch.

For tests of a whole fleet, and for trying one on a machine that cannot run a model. Requests are
batched, chunked and preempted by the real scheduler; only the forward pass is replaced, by a
sleep and by tokens that hang on nothing but the prompt, the seed and the position. So an answer
is the same on any worker and in any batch, and goes on alike when another worker continues it.
Log-probabilities are simulated too; other sampling settings than the seed change nothing.
"""

import hashlib
import math
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import ConfigError, InvalidRequestError
from mixfleet_engine.grammar import Grammars, GrammarState
from mixfleet_engine.request import GenerateRequest, StepOutput
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.simulated_logprobs import simulated_logprobs
from mixfleet_engine.step import NO_TOKEN, SampledToken, StepPlan
from mixfleet_engine.tokenizer import Tokenizer

_CLOSING = (b'"', b"]", b"}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Script:
    """What one request will be told."""

    key: bytes
    """Digest of prompt and seed."""
    token_ids: Row[int]
    stop_token_ids: Collection[int]
    stops_at: int | None
    """Position of the stop token; None when only ``max_tokens`` ends the answer."""

    endings: frozenset[int] = frozenset()
    """Tokens that bring an answer with a grammar nearer to its end."""

    def token(self, position: int, grammar: GrammarState | None = None) -> int:
        """The answer's token number ``position``, counted from 0; ``NO_TOKEN``: none may follow."""
        if grammar is not None:
            return self._allowed_token(position, grammar)
        if self.stops_at is not None and position >= self.stops_at:
            return min(self.stop_token_ids)
        index = self._number(position)
        # At least one is no stop token, which was checked when the request came.
        while (token_id := self.token_ids[index % len(self.token_ids)]) in self.stop_token_ids:
            index += 1
        return token_id

    def _allowed_token(self, position: int, grammar: GrammarState) -> int:
        mask = grammar.allowed(position)
        if grammar.may_end and self.stop_token_ids:
            return min(self.stop_token_ids)
        allowed = [
            8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1
        ]
        number = self._number(position)
        # Every other token, if it may be one: else strings and lists would hardly ever end.
        ends = [token_id for token_id in allowed if token_id in self.endings] * (number % 2)
        words = [token_id for token_id in allowed if token_id in self.token_ids]
        chosen = ends or words or allowed
        return chosen[number // 2 % len(chosen)] if chosen else NO_TOKEN

    def _number(self, position: int) -> int:
        digest = hashlib.blake2b(position.to_bytes(8, "little"), key=self.key, digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    def sampled(
        self, position: int, num_top: int | None, grammar: GrammarState | None = None
    ) -> SampledToken:
        """The same as a runner returns it, with log-probabilities if they are asked for."""
        token_id = self.token(position, grammar)
        if num_top is None or token_id == NO_TOKEN:
            return SampledToken(token_id)
        found = simulated_logprobs(self.key, position, token_id, self.token_ids, num_top)
        return SampledToken(token_id, found)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Implements :class:`~mixfleet_engine.launch.Launch`: takes its time."""

    tokens: list[SampledToken]
    duration_s: float
    sleep: Callable[[float], None]

    def read(self) -> list[SampledToken]:
        if self.duration_s > 0:
            self.sleep(self.duration_s)
        return self.tokens


@dataclass(slots=True)
class _ScriptReader:
    """The runner: reads the tokens from the scripts."""

    num_blocks: int
    block_size: int
    step_s: float
    token_s: float
    sleep: Callable[[float], None]
    scripts: dict[str, _Script] = field(default_factory=dict)
    """By request id; the engine adds and removes them."""

    def launch(self, plan: StepPlan) -> _Reading:
        # Now: a request may be aborted before its tokens are read.
        sampled = [
            self.scripts[chunk.request_id].sampled(
                chunk.position, chunk.sampling.logprobs, chunk.grammar
            )
            for chunk in plan.chunks
            if chunk.samples
        ]
        return _Reading(sampled, self.step_s + self.token_s * plan.num_tokens, self.sleep)


class SimulatedEngine(Engine):
    """Implements :class:`~mixfleet_engine.door.GenerationEngine` without a model.

    Args:
        token_ids: The tokens that answers are made of, those of plain text for instance.
        vocab_size: Ids in requests must lie below it; None: up to the highest of ``token_ids``.
        context_length: Most tokens of prompt and answer together.
        max_batch_size: Most requests that run at once.
        max_step_tokens: Most tokens in a step; None: 512, or ``max_batch_size`` if that is more.
        num_blocks: Blocks of the pretended KV cache; None: room for a full batch of full contexts.
        block_size: Tokens per block.
        answer_lengths: An answer ends with a stop token (the lowest of the request's) after one of
            these numbers of tokens, the stop token included; prompt and seed choose which. None,
            or a request without stop tokens: the answer goes on to ``max_tokens``.
        step_s: Seconds that every step takes.
        token_s: Seconds that every token of a step takes on top.
        sleep: Called with the seconds of each step that takes any.
        prefix_cache: Whether equal beginnings of prompts take time only once.
        itl_target_s: Seconds that a step with decodes should take at most; it bounds the prefill
            in it.
        clock: Seconds; deadlines are on this clock.
        pipelined: Whether each step begins before the tokens of the one before are read, as on a
            GPU. It takes no less time for that.
        tokenizer: Of ``token_ids``, for requests with a grammar; None: these are refused. Their
            answers are random, but follow it.

    Raises:
        ConfigError: A number is impossible.
    """

    def __init__(
        self,
        *,
        token_ids: Row[int],
        vocab_size: int | None = None,
        context_length: int = 4096,
        max_batch_size: int = 8,
        max_step_tokens: int | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        answer_lengths: range | None = None,
        step_s: float = 0.0,
        token_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        prefix_cache: bool = True,
        itl_target_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        pipelined: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        _check(token_ids, answer_lengths, step_s=step_s, token_s=token_s, block_size=block_size)
        full = max_batch_size * -(-context_length // block_size)
        if vocab_size is None:
            vocab_size = max(token_ids) + 1
        self._endings = _endings(tokenizer, vocab_size)
        scheduler = Scheduler(
            num_blocks=full if num_blocks is None else num_blocks,
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_step_tokens=max(512, max_batch_size)
            if max_step_tokens is None
            else max_step_tokens,
            context_length=context_length,
            vocab_size=vocab_size,
            prefix_cache=prefix_cache,
            itl_target_s=itl_target_s,
            grammars=None if tokenizer is None else Grammars(tokenizer, vocab_size),
        )
        self._reader = _ScriptReader(scheduler.num_blocks, block_size, step_s, token_s, sleep)
        self._token_ids = token_ids
        self._answer_lengths = answer_lengths
        super().__init__(self._reader, scheduler, clock=clock, pipelined=pipelined)

    def submit(self, request: GenerateRequest) -> None:
        """Queue ``request``; it joins at the next step that has room and no better use for it.

        Raises:
            RequestRejectedError: It can never run here. Nothing was queued.
        """
        script = self._script(request)
        super().submit(request)
        self._reader.scripts[request.request_id] = script

    def abort(self, request_id: str) -> bool:
        """Forget a request and free all it holds; whether there was one."""
        self._reader.scripts.pop(request_id, None)
        return super().abort(request_id)

    def step(self) -> list[StepOutput]:
        """Pretend one forward pass over everything that is ready; new tokens and ends of answers.

        Requests that are past their deadlines end here.
        """
        outputs = super().step()
        for output in outputs:
            if output.finish_reason is not None:
                del self._reader.scripts[output.request_id]
        return outputs

    def answer(self, request: GenerateRequest) -> tuple[int, ...]:
        """The whole answer that any such engine gives to a ``request`` without a grammar.

        Raises:
            InvalidRequestError: All tokens of the engine are stop tokens of the request.
        """
        script = self._script(request)
        token_ids: list[int] = []
        while len(token_ids) < request.max_tokens:
            token_ids.append(script.token(len(token_ids)))
            if token_ids[-1] in request.stop_token_ids:
                break
        return tuple(token_ids)

    def _script(self, request: GenerateRequest) -> _Script:
        stop_token_ids = request.stop_token_ids
        if all(token_id in stop_token_ids for token_id in self._token_ids):
            raise InvalidRequestError(
                f"stop_token_ids: all {len(self._token_ids)} tokens of the simulated engine are"
            )
        origin = repr((request.prompt_token_ids, request.sampling.seed)).encode()
        key = hashlib.blake2b(origin, digest_size=32).digest()
        stops_at = None
        if self._answer_lengths is not None and stop_token_ids:
            choice = int.from_bytes(key[:8], "little") % len(self._answer_lengths)
            stops_at = self._answer_lengths[choice] - 1
        return _Script(
            key=key,
            token_ids=self._token_ids,
            stop_token_ids=stop_token_ids,
            stops_at=stops_at,
            endings=self._endings,
        )


def _endings(tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    """Return the tokens that close a string, a list or an object."""
    if tokenizer is None:
        return frozenset()
    return frozenset(i for i in range(vocab_size) if tokenizer.token_bytes(i) in _CLOSING)


def _check(
    token_ids: Row[int],
    answer_lengths: range | None,
    *,
    step_s: float,
    token_s: float,
    block_size: int,
) -> None:
    if not token_ids or min(token_ids) < 0:
        raise ConfigError(f"token_ids={token_ids}: must hold at least one id and none below 0")
    if answer_lengths is not None and (not answer_lengths or min(answer_lengths) < 1):
        raise ConfigError(f"answer_lengths={answer_lengths}: must hold at least one number, from 1")
    for name, value in (("step_s", step_s), ("token_s", token_s)):
        if not value >= 0.0:
            raise ConfigError(f"{name}={value}: must be 0 or more")
    if block_size < 1:
        raise ConfigError(f"block_size={block_size}: must be at least 1")
