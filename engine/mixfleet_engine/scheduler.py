"""Continuous batching: decides which tokens of which sequences go through the model next.

Every step carries one token of each decoding sequence, then as much prefill as fits into
``max_step_tokens``, first come, first served. Order of arrival is the order of everything:

- ``_running`` is sorted by arrival, and all of it arrived before all of ``_waiting``.
- A sequence that needs a block while none is free takes those of the *youngest* running one, which
  goes back to the head of the waiting queue with the tokens it has, to be prefilled again. The
  youngest itself pauses instead, holding what it has. So the oldest is never in anyone's way: it
  gets at least one token in every step, and a request ends within ``prompt + max_tokens`` steps
  of being the oldest.

A later priority is one more key in that order; a prefix cache is a matter of the allocator.
"""

import logging
from collections import deque
from collections.abc import Sequence as Row
from itertools import chain

from mixfleet_engine.blocks import BlockAllocator
from mixfleet_engine.errors import ConfigError, InvalidRequestError
from mixfleet_engine.request import GenerateRequest, StepOutput
from mixfleet_engine.request_check import check_request
from mixfleet_engine.sequence import Sequence
from mixfleet_engine.step import NO_TOKEN, PlannedChunk, StepPlan

logger = logging.getLogger(__name__)


class Scheduler:
    """Owns the sequences and the blocks of the KV cache, as plain integers.

    A step is ``plan``, a forward pass somewhere else, ``commit``. A plan promises nothing: until
    it is committed no token counts as cached, so that after a failed forward pass the caller may
    abort whom it likes and plan again.

    Args:
        num_blocks: Blocks of the KV cache.
        block_size: Tokens per block.
        max_batch_size: Most sequences that run at once.
        max_step_tokens: Most tokens in one forward pass; at least ``max_batch_size``.
        context_length: Most tokens of prompt and answer that the model can attend to.
        vocab_size: Token ids lie below it.

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
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("context_length", context_length),
            ("vocab_size", vocab_size),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if max_step_tokens < max_batch_size:
            # All decodes go first: with less, a full batch would starve its youngest for ever.
            raise ConfigError(
                f"max_step_tokens={max_step_tokens}: must be at least "
                f"max_batch_size={max_batch_size}"
            )
        self._blocks = BlockAllocator(num_blocks=num_blocks, block_size=block_size)
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._context_length = min(context_length, num_blocks * block_size)
        self._vocab_size = vocab_size
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._planned: tuple[StepPlan, list[Sequence]] | None = None
        self._num_preemptions = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, free and taken."""
        return self._blocks.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._blocks.block_size

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
        """Tokens of KV cache that nobody holds."""
        return self._blocks.num_free * self._blocks.block_size

    @property
    def has_work(self) -> bool:
        """Whether there is any request; if so, the next plan has at least one chunk."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: new or preempted."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence has lost its blocks to an older one so far."""
        return self._num_preemptions

    def submit(self, request: GenerateRequest) -> None:
        """Queue ``request`` behind all others.

        Raises:
            InvalidRequestError: A field cannot be used, or the id is that of a live request.
            PromptTooLongError: It could never fit the context or the cache.
        """
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"request_id={request.request_id!r}: is in the engine already"
            )
        check_request(request, vocab_size=self._vocab_size, context_length=self._context_length)
        sequence = Sequence(request)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; whether there was one.

        Also right between plan and commit: what the plan computes for it is ignored.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._forget(sequence)
        return True

    def plan(self) -> StepPlan:
        """Choose the tokens of the next forward pass, taking blocks for them.

        A plan that was not committed is void from here on.
        """
        ready = [sequence for sequence in self._running if self._grow(sequence)]
        decodes = [sequence for sequence in ready if sequence.num_pending == 1]
        prefills = [sequence for sequence in ready if sequence.num_pending > 1]
        shares = [(sequence, 1) for sequence in decodes]
        budget = self._max_step_tokens - len(decodes)
        candidates = chain(prefills, iter(self._admit_next, None))
        while budget > 0 and (sequence := next(candidates, None)) is not None:
            num_tokens = min(budget, sequence.num_pending)
            shares.append((sequence, num_tokens))
            budget -= num_tokens
        plan = StepPlan(chunks=tuple(self._chunk(*share) for share in shares))
        self._planned = plan, [sequence for sequence, _ in shares]
        return plan

    def commit(self, plan: StepPlan, sampled: Row[int]) -> list[StepOutput]:
        """Book what the forward pass of ``plan`` computed and return the new tokens.

        Args:
            plan: What the last call of :meth:`plan` returned.
            sampled: One token id per chunk that samples, in the plan's order; ``NO_TOKEN`` ends
                that request with the reason ``error``.

        Raises:
            ValueError: Not the last plan, committed before, or not one token per sampling chunk.
                Nothing was booked.
        """
        if self._planned is None or self._planned[0] is not plan:
            raise ValueError("only the last plan can be committed, and only once")
        if len(sampled) != plan.num_samples:
            raise ValueError(f"{len(sampled)} tokens for {plan.num_samples} chunks that sample")
        sequences = self._planned[1]
        self._planned = None
        token_ids = iter(sampled)
        outputs: list[StepOutput] = []
        for chunk, sequence in zip(plan.chunks, sequences, strict=True):
            token_id = next(token_ids) if chunk.samples else None
            # Aborted meanwhile, and perhaps another one was submitted under the same id.
            if self._sequences.get(chunk.request_id) is not sequence:
                continue
            sequence.num_cached += len(chunk.token_ids)
            if token_id is not None:
                outputs.append(self._append(sequence, token_id))
        return outputs

    def _grow(self, sequence: Sequence) -> bool:
        """Own blocks for all of a running sequence's tokens; False when it must pause.

        Preempts only sequences behind it in ``_running``, from the end.
        """
        missing = self._num_missing(sequence)
        while missing > self._blocks.num_free:
            youngest = self._running[-1]
            if youngest is sequence:
                return False
            self._preempt(youngest)
        sequence.block_table += self._blocks.allocate(missing)
        return True

    def _preempt(self, youngest: Sequence) -> None:
        logger.info(
            "preempted request_id=%s num_tokens=%d",
            youngest.request.request_id,
            youngest.num_tokens,
        )
        self._running.pop()
        self._blocks.release(youngest.drop_cache())
        self._waiting.appendleft(youngest)
        self._num_preemptions += 1

    def _admit_next(self) -> Sequence | None:
        """Let the head of the waiting queue run if it fits, with blocks for all its tokens."""
        if not self._waiting or len(self._running) == self._max_batch_size:
            return None
        # One free block is left for each running sequence to grow into: without it a newcomer
        # would be preempted again as soon as it has been prefilled.
        missing = self._num_missing(self._waiting[0])
        if missing + len(self._running) > self._blocks.num_free:
            return None
        sequence = self._waiting.popleft()
        sequence.block_table += self._blocks.allocate(missing)
        self._running.append(sequence)
        return sequence

    def _num_missing(self, sequence: Sequence) -> int:
        return self._blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)

    def _chunk(self, sequence: Sequence, num_tokens: int) -> PlannedChunk:
        num_blocks = self._blocks.num_blocks_for(sequence.num_cached + num_tokens)
        return sequence.chunk(num_tokens, num_blocks)

    def _append(self, sequence: Sequence, token_id: int) -> StepOutput:
        request_id = sequence.request.request_id
        if token_id == NO_TOKEN:
            self._forget(sequence)
            return StepOutput(request_id=request_id, token_ids=(), finish_reason="error")
        finish_reason = sequence.append(token_id)
        if finish_reason is not None:
            self._forget(sequence)
        return StepOutput(
            request_id=request_id,
            token_ids=(token_id,),
            finish_reason=finish_reason,
        )

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        # Who runs holds at least one block, who waits holds none.
        (self._running if sequence.block_table else self._waiting).remove(sequence)
        self._blocks.release(sequence.drop_cache())
