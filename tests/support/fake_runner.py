"""A runner without a model, that holds the scheduler to every promise a plan makes.

Its KV cache holds the tokens themselves, in blocks. The next token hangs on *all* tokens read back
from those blocks, so one lost, stale or foreign token changes the answer.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from mixfleet_engine.request import FinishReason, GenerateRequest, SamplingParams
from mixfleet_engine.step import PlannedChunk, StepPlan


def fake_token(token_ids: list[int], sampling: SamplingParams, position: int, vocab: int) -> int:
    """The token after ``token_ids``: deterministic, and different in any other situation."""
    text = repr((token_ids, sampling.seed, sampling.temperature, position))
    return zlib.crc32(text.encode()) % vocab


def slow_answer(request: GenerateRequest, vocab_size: int) -> tuple[tuple[int, ...], FinishReason]:
    """The new tokens of ``request``, found by the obvious loop over the request alone."""
    token_ids = [*request.prompt_token_ids, *request.output_token_ids]
    answer: list[int] = list(request.output_token_ids)
    while True:
        token_id = fake_token(token_ids, request.sampling, len(answer), vocab_size)
        token_ids.append(token_id)
        answer.append(token_id)
        new = tuple(answer[len(request.output_token_ids) :])
        if token_id in request.stop_token_ids:
            return new, "stop"
        if len(answer) == request.max_tokens:
            return new, "length"


@dataclass(frozen=True)
class Cell:
    """One token's place in the fake KV cache."""

    request_id: str
    generation: int
    """How often the request had been prefilled from its start when this was written."""
    position: int
    token_id: int


@dataclass(kw_only=True)
class FakeRunner:
    """Implements the engine's ``Runner``; raises AssertionError on any broken promise."""

    num_blocks: int
    block_size: int
    vocab_size: int
    max_step_tokens: int = 10**9
    max_batch_size: int = 10**9
    failures: int = 0
    """So many coming steps fail after they have written half of their chunks."""
    during_run: Callable[[StepPlan], None] = lambda _: None
    """Called within each run, between plan and commit."""
    plans: list[StepPlan] = field(default_factory=list)
    """Every plan that ran to its end."""

    def __post_init__(self) -> None:
        self._cells: list[list[Cell | None]] = [
            [None] * self.block_size for _ in range(self.num_blocks)
        ]
        self._num_cached: dict[str, int] = {}
        self._generation: dict[str, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        self._check_plan(plan)
        num_good = len(plan.chunks) // 2 if self.failures else len(plan.chunks)
        for chunk in plan.chunks[:num_good]:
            self._write(chunk)
        self.during_run(plan)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the fake device is lost")
        self.plans.append(plan)
        for chunk in plan.chunks:
            self._num_cached[chunk.request_id] = chunk.start + len(chunk.token_ids)
        return [
            fake_token(self._read(chunk), chunk.sampling, chunk.position, self.vocab_size)
            for chunk in plan.chunks
            if chunk.samples
        ]

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.chunks, "an empty plan was run"
        assert plan.num_tokens <= self.max_step_tokens
        assert len(plan.chunks) <= self.max_batch_size
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids), "a request is in the plan twice"
        blocks = [block for chunk in plan.chunks for block in chunk.block_table]
        assert len(set(blocks)) == len(blocks), "a block is owned twice"
        assert all(0 <= block < self.num_blocks for block in blocks)
        for chunk in plan.chunks:
            self._check_chunk(chunk)

    def _check_chunk(self, chunk: PlannedChunk) -> None:
        assert chunk.token_ids
        num_tokens = chunk.start + len(chunk.token_ids)
        assert len(chunk.block_table) == -(-num_tokens // self.block_size)
        # Either it goes on where the last step left it, or from the start after a preemption.
        assert chunk.start in (0, self._num_cached.get(chunk.request_id, 0))
        assert not chunk.samples or 0 <= chunk.position < num_tokens

    def _write(self, chunk: PlannedChunk) -> None:
        if chunk.start == 0:
            self._generation[chunk.request_id] = self._generation.get(chunk.request_id, 0) + 1
        generation = self._generation[chunk.request_id]
        for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
            block = self._cells[chunk.block_table[position // self.block_size]]
            block[position % self.block_size] = Cell(
                chunk.request_id, generation, position, token_id
            )

    def _read(self, chunk: PlannedChunk) -> list[int]:
        """All tokens of the sequence, out of the cache."""
        token_ids = []
        for position in range(chunk.start + len(chunk.token_ids)):
            block = self._cells[chunk.block_table[position // self.block_size]]
            cell = block[position % self.block_size]
            assert cell is not None, f"position {position} was never written"
            found = cell.request_id, cell.generation, cell.position
            wanted = chunk.request_id, self._generation[chunk.request_id], position
            assert found == wanted, f"the cache holds {found} in place of {wanted}"
            token_ids.append(cell.token_id)
        return token_ids
