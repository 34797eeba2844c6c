"""A runner without a model, that holds the scheduler to every promise a plan makes.

Like a device it runs launches in order, each before the tokens of the one before are read or not.

Its KV cache holds the tokens themselves, in blocks. The next token hangs on *all* tokens read back
from those blocks, so one lost, stale or foreign token changes the answer. Blocks may be shared, but
only where what they hold is right for each reader, down to the last token before.
"""

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from mixfleet_engine.request import FinishReason, GenerateRequest, SamplingParams
from mixfleet_engine.step import NO_TOKEN, UNREAD, PlannedChunk, SampledToken, StepPlan


def fake_token(token_ids: list[int], sampling: SamplingParams, position: int, vocab: int) -> int:
    """The token after ``token_ids``: deterministic, and different in any other situation."""
    text = repr((token_ids, sampling.seed, sampling.temperature, position))
    return zlib.crc32(text.encode()) % vocab


def slow_answer(
    request: GenerateRequest, vocab_size: int, poison: Collection[int] = ()
) -> tuple[tuple[int, ...], FinishReason]:
    """The new tokens of ``request``, found by the obvious loop over the request alone."""
    token_ids = [*request.prompt_token_ids, *request.output_token_ids]
    answer: list[int] = list(request.output_token_ids)
    while True:
        new = tuple(answer[len(request.output_token_ids) :])
        if any(token_id in poison for token_id in token_ids):
            return new, "error"
        token_id = fake_token(token_ids, request.sampling, len(answer), vocab_size)
        token_ids.append(token_id)
        answer.append(token_id)
        if token_id in request.stop_token_ids:
            return (*new, token_id), "stop"
        if len(answer) == request.max_tokens:
            return (*new, token_id), "length"


@dataclass(frozen=True)
class Cell:
    """One token's place in the fake KV cache: like keys and values, it hangs on all before it."""

    token_id: int
    origin: int
    """Digest of the tokens up to this one, as they stood in the cache when it was written."""


@dataclass(kw_only=True)
class FakeRunner:
    """Implements the engine's ``Runner``; raises AssertionError on any broken promise."""

    num_blocks: int
    block_size: int
    vocab_size: int
    max_step_tokens: int = 10**9
    max_batch_size: int = 10**9
    poison: Collection[int] = ()
    """Tokens whose keys and values are not finite: whoever has one in a block gets no token."""
    failures: int = 0
    """So many coming launches fail after they have written half of their chunks."""
    failing_reads: int = 0
    """So many coming reads fail."""
    during_run: Callable[[StepPlan], None] = lambda _: None
    """Called within each read, between plan and commit."""
    plans: list[StepPlan] = field(default_factory=list)
    """Every plan that ran to its end, in the order of their reads."""
    calls: list[tuple[Literal["launch", "read"], int]] = field(default_factory=list)
    """All launches and reads in order, each with the number of its launch, counted from 0."""
    num_launches: int = 0
    """Launches so far, failed ones included."""

    def __post_init__(self) -> None:
        self._cells: list[list[Cell | None]] = [
            [None] * self.block_size for _ in range(self.num_blocks)
        ]
        self._num_launched: dict[str, int] = {}
        """Tokens of a request that launches have written."""
        self._num_read: dict[str, int] = {}
        """The same of launches that were read."""
        self._last: list[SampledToken] = []
        self._unread: list[FakeLaunch] = []

    def launch(self, plan: StepPlan) -> "FakeLaunch":
        self.calls.append(("launch", self.num_launches))
        self.num_launches += 1
        assert len(self._unread) < 2, "more than one launch ahead"
        self._check_plan(plan)
        chunks = [self._known(chunk) for chunk in plan.chunks]
        for chunk in chunks:
            self._check_chunk(chunk)
        for block in plan.clear_blocks:
            self._cells[block] = [None] * self.block_size
        num_good = len(chunks) // 2 if self.failures else len(chunks)
        for chunk in chunks[:num_good]:
            self._write(chunk)
        if self.failures:
            self.failures -= 1
            raise self._lost()
        for chunk in chunks:
            self._num_launched[chunk.request_id] = chunk.start + len(chunk.token_ids)
        self._last = [SampledToken(self._sample(chunk)) for chunk in chunks if chunk.samples]
        launched = FakeLaunch(self, plan, self.num_launches - 1, self._last)
        self._unread.append(launched)
        return launched

    def read(self, launched: "FakeLaunch") -> list[SampledToken]:
        """Called by the launch."""
        self.calls.append(("read", launched.number))
        assert self._unread[:1] == [launched], "read out of turn"
        self.during_run(launched.plan)
        if self.failing_reads:
            self.failing_reads -= 1
            raise self._lost()
        self._unread.pop(0)
        self.plans.append(launched.plan)
        for chunk in launched.plan.chunks:
            self._num_read[chunk.request_id] = chunk.start + len(chunk.token_ids)
        return launched.tokens

    def _lost(self) -> RuntimeError:
        self._unread.clear()
        self._last = []
        self._num_launched = dict(self._num_read)
        return RuntimeError("the fake device is lost")

    def _known(self, chunk: PlannedChunk) -> PlannedChunk:
        """The chunk with its unread token, which for the fake is there already."""
        assert (chunk.unread_row is not None) == (UNREAD in chunk.token_ids)
        if chunk.unread_row is None:
            return chunk
        assert chunk.token_ids == (UNREAD,)
        assert self._unread, "the token was read"
        return replace(chunk, token_ids=(max(0, self._last[chunk.unread_row].token_id),))

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.chunks, "an empty plan was run"
        assert plan.num_tokens <= self.max_step_tokens
        assert len(plan.chunks) <= self.max_batch_size
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids), "a request is in the plan twice"
        written = [block for chunk in plan.chunks for block in self._written(chunk)]
        read = [block for chunk in plan.chunks for block in self._read_only(chunk)]
        assert len(set(written)) == len(written), "a block is written by two"
        assert not set(written) & set(read), "a block is read that is not computed yet"
        assert not set(plan.clear_blocks) & set(read), "a block is cleared that is needed"

    def _check_chunk(self, chunk: PlannedChunk) -> None:
        assert chunk.token_ids
        num_tokens = chunk.start + len(chunk.token_ids)
        assert len(chunk.block_table) == -(-num_tokens // self.block_size)
        assert len(set(chunk.block_table)) == len(chunk.block_table)
        assert all(0 <= block < self.num_blocks for block in chunk.block_table)
        # Either it goes on where the last step left it, or behind the full blocks that were found.
        goes_on = chunk.start == self._num_launched.get(chunk.request_id, 0)
        assert goes_on or chunk.start % self.block_size == 0
        wanted = list(chunk.history.token_ids)
        if chunk.unread_row is not None:
            assert chunk.grammar is None
            assert not chunk.sampling.counts_tokens
            wanted += chunk.token_ids
        assert not chunk.samples or chunk.position == num_tokens - chunk.history.num_prompt
        assert list(chunk.token_ids) == wanted[chunk.start : num_tokens]
        assert chunk.samples == (num_tokens == len(wanted))
        assert self._read(chunk, chunk.start) == wanted[: chunk.start], "foreign tokens were found"

    def _written(self, chunk: PlannedChunk) -> tuple[int, ...]:
        return chunk.block_table[chunk.start // self.block_size :]

    def _read_only(self, chunk: PlannedChunk) -> tuple[int, ...]:
        return chunk.block_table[: chunk.start // self.block_size]

    def _write(self, chunk: PlannedChunk) -> None:
        origin = _digest(0, self._read(chunk, chunk.start))
        for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
            origin = _digest(origin, [token_id])
            block = self._cells[chunk.block_table[position // self.block_size]]
            block[position % self.block_size] = Cell(token_id, origin)

    def _read(self, chunk: PlannedChunk, num_tokens: int) -> list[int]:
        """The first tokens of the sequence, out of the cache."""
        token_ids: list[int] = []
        origin = 0
        for position in range(num_tokens):
            block = self._cells[chunk.block_table[position // self.block_size]]
            cell = block[position % self.block_size]
            assert cell is not None, f"position {position} was never written"
            origin = _digest(origin, [cell.token_id])
            assert cell.origin == origin, f"position {position} came after other tokens"
            token_ids.append(cell.token_id)
        return token_ids

    def _sample(self, chunk: PlannedChunk) -> int:
        token_ids = self._read(chunk, chunk.start + len(chunk.token_ids))
        # Like masked slots of the real cache, those behind the last token count as well.
        cells = [cell for block in chunk.block_table for cell in self._cells[block]]
        if any(cell is not None and cell.token_id in self.poison for cell in cells):
            return NO_TOKEN
        return fake_token(token_ids, chunk.sampling, chunk.position, self.vocab_size)


@dataclass(frozen=True)
class FakeLaunch:
    """Implements the engine's ``Launch``."""

    runner: FakeRunner
    plan: StepPlan
    number: int
    tokens: list[SampledToken]

    def read(self) -> list[SampledToken]:
        return self.runner.read(self)


def _digest(origin: int, token_ids: list[int]) -> int:
    for token_id in token_ids:
        origin = zlib.crc32(token_id.to_bytes(8, "little"), origin)
    return origin
