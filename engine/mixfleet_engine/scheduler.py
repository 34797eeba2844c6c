"""Continuous batching: decides which tokens of which sequences go through the model next.

Every step carries one token of each decoding sequence, then as much prefill as ``max_step_tokens``
and the target for the time between two tokens of an answer allow, in the order that ``admission``
keeps. A request that is first in that order moves by at least one token in every step.

A step may be planned while the one before it runs, as if each sequence went on with whatever token
it gets. One that ends with that token has a surplus chunk then, and nobody sees what comes of it.
"""

from collections.abc import Sequence as Row

from mixfleet_engine.admission import Admission
from mixfleet_engine.errors import ConfigError, InvalidRequestError
from mixfleet_engine.grammar import Grammars, grammar_of
from mixfleet_engine.kv_book import KvBook
from mixfleet_engine.pacing import StepBudget, StepLoad, StepTimeModel
from mixfleet_engine.planned_steps import PlannedSteps
from mixfleet_engine.request import FinishReason, GenerateRequest, StepOutput
from mixfleet_engine.request_check import check_request
from mixfleet_engine.sequence import Sequence
from mixfleet_engine.step import NO_TOKEN, SampledToken, StepPlan


class Scheduler:
    """Owns the sequences and the blocks of the KV cache, as plain integers.

    A step is ``plan``, a forward pass somewhere else, ``commit``; between these two the next step
    may be planned with ``plan_ahead``. A plan promises nothing: until it is committed no token
    counts as cached, so that after a failed forward pass the caller may abort whom it likes and
    plan again.

    Args:
        num_blocks: Blocks of the KV cache.
        block_size: Tokens per block.
        max_batch_size: Most sequences that run at once.
        max_step_tokens: Most tokens in one forward pass; at least ``max_batch_size``.
        context_length: Most tokens of prompt and answer that the model can attend to.
        vocab_size: Token ids lie below it.
        prefix_cache: Whether requests share the blocks of equal beginnings.
        itl_target_s: Seconds that a step with decodes should take at most; it bounds the prefill
            in it, down to one block of tokens. ``inf``: no bound.
        grammars: Of the model's vocabulary; None: a request with a grammar is refused.

    Raises:
        ConfigError: A number is impossible.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_step_tokens: int,
        context_length: int,
        vocab_size: int,
        prefix_cache: bool = True,
        itl_target_s: float = 0.1,
        grammars: Grammars | None = None,
    ) -> None:
        _check_sizes(
            max_batch_size=max_batch_size, context_length=context_length, vocab_size=vocab_size
        )
        if max_step_tokens < max_batch_size:
            # All decodes go first: with less, a full batch would starve its youngest for ever.
            raise ConfigError(
                f"max_step_tokens={max_step_tokens}: must be at least "
                f"max_batch_size={max_batch_size}"
            )
        if not itl_target_s > 0:
            raise ConfigError(f"itl_target_s={itl_target_s}: must be above 0")
        self._book = KvBook(num_blocks=num_blocks, block_size=block_size, prefix_cache=prefix_cache)
        self._admission = Admission(self._book, max_batch_size=max_batch_size)
        self._times = StepTimeModel()
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._itl_target_s = itl_target_s
        self._context_length = min(context_length, num_blocks * block_size)
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._sequences: dict[str, Sequence] = {}
        self._ended: dict[str, StepOutput] = {}
        self._num_submitted = 0
        self._planned = PlannedSteps(self._book, self._admission)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, free and held."""
        return self._book.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._book.block_size

    @property
    def context_length(self) -> int:
        """Most tokens of one request: the model's context, or the whole cache if that is less."""
        return self._context_length

    @property
    def free_slots(self) -> int:
        """How many more requests would run at once; never negative."""
        return max(0, self._max_batch_size - len(self._sequences))

    @property
    def free_tokens(self) -> int:
        """Tokens of KV cache that nobody holds, those that the prefix cache remembers included."""
        return self._book.num_free * self._book.block_size

    @property
    def has_work(self) -> bool:
        """Whether there is any request, or the end of one that nobody was told of yet."""
        return bool(self._sequences or self._ended)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: new or preempted."""
        return self._admission.num_waiting

    @property
    def num_preemptions(self) -> int:
        """How often a sequence has lost its blocks to one before it in the order so far."""
        return self._admission.num_preemptions

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens that requests had each time they began to run, first or again."""
        return self._book.num_queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of them were in the KV cache already."""
        return self._book.num_hit_tokens

    def submit(self, request: GenerateRequest) -> None:
        """Queue ``request`` behind all others of its priority.

        One whose deadline is over already, or whose grammar lets nothing follow the tokens so far,
        ends with the next step.

        Raises:
            InvalidRequestError: A field cannot be used, the grammar among them, or the id is that
                of a live request.
            PromptTooLongError: It could never fit the context or the cache.
        """
        if request.request_id in self._sequences or request.request_id in self._ended:
            raise InvalidRequestError(
                f"request_id={request.request_id!r}: is in the engine already"
            )
        check_request(request, vocab_size=self._vocab_size, context_length=self._context_length)
        grammar = grammar_of(request, self._grammars)
        if grammar is not None and (grammar.is_complete or grammar.dead_end is not None):
            self._end(request.request_id, "stop")
            return
        sequence = Sequence(request, self._num_submitted, grammar)
        self._num_submitted += 1
        self._sequences[request.request_id] = sequence
        self._admission.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; whether there was one.

        Also right between plan and commit: what the plan computes for it is ignored.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return self._ended.pop(request_id, None) is not None
        self._forget(sequence)
        return True

    def plan(self, now: float = 0.0) -> StepPlan:
        """Choose the tokens of the next forward pass, taking blocks for them.

        Plans that were not committed are void from here on. No forward pass is needed for a plan
        without chunks, but it must be committed as well.

        Args:
            now: Seconds on the clock of the deadlines. Who is overdue ends here, and is told of by
                the next commit.
        """
        self._planned.void()
        self._end_overdue(now)
        return self._planned.add(self._shares(self._admission.ready()))

    def plan_ahead(self, now: float = 0.0) -> StepPlan | None:
        """Choose the tokens of the forward pass after the one that is planned and not committed.

        The tokens that it samples go on as unread ones. None: nobody could take part, or only at
        another's cost, or the host must know a token first (a grammar, a penalty). Commit then.

        Args:
            now: As for :meth:`plan`; who is overdue loses the token that is being sampled.
        """
        self._end_overdue(now)
        ready = self._admission.ready_ahead()
        shares = self._shares(ready) if ready is not None else []
        return self._planned.add(shares) if shares else None

    def commit(
        self, plan: StepPlan, sampled: Row[SampledToken], *, elapsed_s: float | None = None
    ) -> list[StepOutput]:
        """Book what the forward pass of ``plan`` computed and return the new tokens.

        Args:
            plan: The oldest that is neither committed nor void.
            sampled: One token per chunk that samples, in the plan's order; ``NO_TOKEN`` ends
                that request with the reason ``error``.
            elapsed_s: Seconds that the step took, without what it waited for the one before; later
                plans learn from them. None: unknown.

        Raises:
            ValueError: Not that plan, or not one token per sampling chunk. Nothing was booked.
        """
        sequences = self._planned.take(plan, len(sampled))
        if elapsed_s is not None and plan.chunks:
            self._times.learn(StepLoad.of(plan), elapsed_s)
        outputs = list(self._ended.values())
        self._ended.clear()
        tokens = iter(sampled)
        for chunk, sequence in zip(plan.chunks, sequences, strict=True):
            token = next(tokens) if chunk.samples else None
            # Ended meanwhile, and perhaps another one was submitted under the same id.
            if self._sequences.get(chunk.request_id) is not sequence:
                continue
            output = self._book_chunk(sequence, len(chunk.token_ids), token)
            if output is not None:
                outputs.append(output)
        return outputs

    def _shares(self, ready: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Who takes part in the next step, with how many tokens; decodes first."""
        decodes = [sequence for sequence in ready if sequence.num_pending == 1]
        shares = [(sequence, 1) for sequence in decodes]
        budget = StepBudget(
            self._times,
            StepLoad.of_decodes(sequence.start for sequence in decodes),
            max_tokens=self._max_step_tokens,
            floor=self.block_size,
            target_s=self._itl_target_s,
        )
        prefilling = [sequence for sequence in ready if sequence.num_pending > 1]
        candidates = self._admission.next_to_prefill(prefilling)
        while budget.is_open and (sequence := next(candidates, None)) is not None:
            num_tokens = budget.take(start=sequence.start, num_pending=sequence.num_pending)
            if num_tokens > 0:
                shares.append((sequence, num_tokens))
        return shares

    def _end_overdue(self, now: float) -> None:
        for sequence in [s for s in self._sequences.values() if s.is_overdue(now)]:
            self._forget(sequence)
            self._end(sequence.request.request_id, "deadline")

    def _end(self, request_id: str, reason: FinishReason) -> None:
        """Have the next commit say that the request has ended without a token."""
        self._ended[request_id] = _end_of(request_id, reason)

    def _book_chunk(
        self, sequence: Sequence, num_tokens: int, token: SampledToken | None
    ) -> StepOutput | None:
        request_id = sequence.request.request_id
        if token is not None and token.token_id == NO_TOKEN:
            reason = sequence.grammar.dead_end if sequence.grammar is not None else None
            if reason is None:
                self._book.condemn(sequence)
            self._forget(sequence)
            return _end_of(request_id, reason or "error")
        self._book.book(sequence, num_tokens, sampled=token is not None)
        if token is None:
            return None
        finish_reason = sequence.append(token.token_id)
        if finish_reason is not None:
            self._forget(sequence)
        return StepOutput(
            request_id=request_id,
            token_ids=(token.token_id,),
            finish_reason=finish_reason,
            logprobs=() if token.logprobs is None else (token.logprobs,),
        )

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        self._admission.remove(sequence)


def _end_of(request_id: str, reason: FinishReason) -> StepOutput:
    return StepOutput(request_id=request_id, token_ids=(), finish_reason=reason)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
