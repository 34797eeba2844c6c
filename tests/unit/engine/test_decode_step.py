"""Decode steps in buckets against the plain computation of each row by itself."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mixfleet_engine.capture import NoRecorder, Work
from mixfleet_engine.decode_step import DecodeSteps, StepShape, buckets
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.ops.cuda.chunks import PlacedBatch
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import PlannedChunk

VOCAB, BLOCK, CONTEXT = 301, 4, 2000
CPU = torch.device("cpu")


class CountingRecorder:
    """Notes how often work is recorded and how often what was recorded runs."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, work: Work) -> Work:
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def hashed_logits(token: int, position: int, slot: int, table: Sequence[int]) -> Tensor:
    """Logits that hang on all that a row of a step consists of."""
    seed = hash((token, position, slot, tuple(table))) & 0xFFFFFFFF
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


class HashingModel:
    """Answers with `hashed_logits` of what the batch holds, and keeps the last batch."""

    def __init__(self) -> None:
        self.last: PlacedBatch | None = None

    def __call__(self, batch: PlacedBatch) -> Tensor:
        self.last, placed = batch, batch.placed
        assert placed.num_decodes == len(batch.token_ids) == len(batch.sample_rows)
        assert placed.first_rows.tolist() == list(range(len(batch.token_ids)))
        assert int(placed.starts.max()) < placed.max_context
        rows = zip(
            batch.token_ids.tolist(),
            batch.positions.tolist(),
            placed.slots.tolist(),
            placed.block_tables.tolist(),
            strict=True,
        )
        return torch.stack(
            [hashed_logits(t, p, s, table[: p // BLOCK + 1]) for t, p, s, table in rows]
        )


def steps(
    model: Callable[[PlacedBatch], Tensor],
    last_tokens: Tensor,
    recorder: CountingRecorder | NoRecorder | None = None,
    *,
    is_shared: bool = False,
) -> DecodeSteps:
    return DecodeSteps(
        model,
        recorder or NoRecorder(),
        last_tokens,
        max_rows=len(last_tokens),
        context_length=CONTEXT,
        block_size=BLOCK,
        vocab_size=VOCAB,
        device=CPU,
        is_shared=is_shared,
    )


def random_chunk(rng: random.Random, *, sampled: bool, context: int) -> PlannedChunk:
    start = rng.randrange(context)
    return PlannedChunk(
        request_id=str(start),
        token_ids=(rng.randrange(VOCAB),),
        start=start,
        block_table=tuple(rng.randrange(900) for _ in range(start // BLOCK + 1)),
        samples=True,
        sampling=SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.3]) if sampled else 0.0,
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.7]),
            seed=rng.getrandbits(64),
        ),
        history=TokenHistory((1,)),
        position=rng.randrange(50),
    )


def expected_logits(chunks: Sequence[PlannedChunk]) -> Tensor:
    return torch.stack(
        [
            hashed_logits(
                chunk.token_ids[0],
                chunk.start,
                chunk.block_table[-1] * BLOCK + chunk.start % BLOCK,
                chunk.block_table,
            )
            for chunk in chunks
        ]
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_steps_of_any_size_one_after_the_other_sample_what_the_sampler_does(sampled: bool) -> None:
    rng = random.Random(int(sampled))
    run = steps(HashingModel(), torch.zeros(20, dtype=torch.int64))
    for _ in range(25):
        context = rng.choice([3, 500, CONTEXT])
        chunks = [
            random_chunk(rng, sampled=sampled, context=context) for _ in range(rng.randint(1, 20))
        ]
        logits = expected_logits(chunks)
        found = run.run(chunks, [-1] * len(chunks), "drawn" if sampled else "greedy")
        assert found.tolist() == [t.token_id for t in Sampler().sample(logits, chunks)]
        assert torch.equal(run.run(chunks, [-1] * len(chunks), "none"), logits)


def test_a_token_that_the_host_has_not_read_comes_from_the_step_before() -> None:
    rng = random.Random(3)
    last = torch.tensor([7, 250, -1, 9])
    chunks = [random_chunk(rng, sampled=False, context=90) for _ in range(3)]
    found = steps(HashingModel(), last).run(chunks, [1, -1, 2], "none")
    known = [
        PlannedChunk(
            request_id=chunk.request_id,
            token_ids=(token,),
            start=chunk.start,
            block_table=chunk.block_table,
            samples=True,
            sampling=chunk.sampling,
            history=chunk.history,
            position=chunk.position,
        )
        for chunk, token in zip(chunks, [250, chunks[1].token_ids[0], 0], strict=True)
    ]
    assert torch.equal(found, expected_logits(known))


def test_rows_that_fill_up_a_bucket_repeat_the_shortest_one_and_write_nothing() -> None:
    rng, model = random.Random(5), HashingModel()
    chunks = [random_chunk(rng, sampled=True, context=90) for _ in range(5)]
    steps(model, torch.zeros(16, dtype=torch.int64)).run(chunks, [-1] * 5, "drawn")
    assert model.last is not None
    placed = model.last.placed
    shortest = min(range(5), key=lambda row: chunks[row].start)
    assert placed.slots.tolist()[5:] == [-1, -1, -1]
    for values in (model.last.token_ids, placed.positions, placed.starts, placed.block_tables):
        assert all(torch.equal(row, values[shortest]) for row in values[5:])


def test_a_shape_is_recorded_once_and_then_only_replayed() -> None:
    rng, recorder = random.Random(1), CountingRecorder()
    run = steps(HashingModel(), torch.zeros(16, dtype=torch.int64), recorder)
    for _ in range(4):
        chunks = [random_chunk(rng, sampled=False, context=400) for _ in range(7)]
        run.run(chunks, [-1] * 7, "greedy")
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)
    long = random_chunk(rng, sampled=False, context=1)
    wide = PlannedChunk(
        request_id="wide",
        token_ids=(1,),
        start=1500,
        block_table=tuple(range(376)),
        samples=True,
        sampling=long.sampling,
        history=long.history,
        position=0,
    )
    run.run([wide], [-1], "greedy")
    assert run.shapes == (StepShape(8, 512, "greedy"), StepShape(1, CONTEXT, "greedy"))


def test_ranks_record_the_same_at_the_same_step_whatever_the_first_one_samples() -> None:
    rng, exchanges = random.Random(8), [CountingRecorder(), CountingRecorder()]
    last = torch.zeros(8, dtype=torch.int64)
    first = steps(HashingModel(), last, exchanges[0], is_shared=True)
    other = steps(lambda _: torch.empty(0, VOCAB), last, exchanges[1], is_shared=True)
    for _ in range(20):
        sampled = rng.random() < 0.5
        chunks = [random_chunk(rng, sampled=sampled, context=900) for _ in range(rng.randint(1, 8))]
        expected = Sampler().sample(expected_logits(chunks), chunks)
        unread = [-1] * len(chunks)
        found = first.run(chunks, unread, "drawn" if sampled else "greedy")
        other.run(chunks, unread, "none")
        assert found.tolist() == [t.token_id for t in expected]
        assert first.shapes == other.shapes
    assert {shape.sampling for shape in first.shapes} == {"none"}
    assert len(first.shapes) == exchanges[1].num_recorded < exchanges[0].num_recorded


def test_what_was_recorded_can_be_forgotten() -> None:
    rng, recorder = random.Random(2), CountingRecorder()
    run = steps(HashingModel(), torch.zeros(4, dtype=torch.int64), recorder, is_shared=True)
    chunks = [random_chunk(rng, sampled=False, context=90)]
    run.run(chunks, [-1], "greedy")
    run.forget()
    assert run.shapes == ()
    run.run(chunks, [-1], "greedy")
    assert (recorder.num_recorded, recorder.num_replayed) == (4, 0)


def test_buckets_go_up_to_the_largest_step() -> None:
    assert buckets(1) == (1,)
    assert buckets(5) == (1, 2, 4, 8)
    assert buckets(256)[-1] == 256
    assert buckets(257)[-2:] == (256, 512)
    assert buckets(1000)[-1] == 1024
    run = steps(HashingModel(), torch.zeros(5, dtype=torch.int64))
    assert [size for size in range(12) if run.takes(size)] == list(range(1, 9))
