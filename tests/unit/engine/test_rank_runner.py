"""Two ranks in one process: what the first one sends is put before the other."""

from collections.abc import Sequence

import pytest

from mixfleet_engine.engine import Engine
from mixfleet_engine.launch import Computed
from mixfleet_engine.rank_runner import LeadingRunner, follow
from mixfleet_engine.ranks import OneRank, RanksLostError
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import StepPlan
from support.engine_requests import make_request, run_to_end
from support.fake_runner import FakeRunner
from support.plans import chunk, plan

VOCAB = 50


class RecordedRanks(OneRank):
    """Keeps what is sent, and hands it out again."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def send(self, words: Sequence[int]) -> None:
        self.sent.append(list(words))

    def receive(self) -> list[int]:
        return self.sent.pop(0)


class PlanKeeper:
    """A runner of a rank that samples nothing."""

    num_blocks = 20
    block_size = 4

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> Computed:
        self.plans.append(plan)
        return Computed([])


def test_the_others_run_the_plans_of_the_first_until_the_end_is_sent() -> None:
    ranks, own = RecordedRanks(), FakeRunner(num_blocks=20, block_size=4, vocab_size=VOCAB)
    leading = LeadingRunner(own, ranks)
    scheduler = Scheduler(
        num_blocks=leading.num_blocks,
        block_size=leading.block_size,
        max_batch_size=3,
        max_step_tokens=6,
        context_length=40,
        vocab_size=VOCAB,
    )
    requests = [make_request(str(n), prompt=range(3 * n + 1), max_tokens=5) for n in range(4)]
    run_to_end(Engine(leading, scheduler), requests)
    ranks.send([])
    follower = PlanKeeper()
    follow(follower, ranks)
    assert ranks.sent == []
    assert len(own.plans) > 5
    assert [
        [(c.token_ids, c.start, c.block_table, c.samples) for c in p.chunks] for p in follower.plans
    ] == [[(c.token_ids, c.start, c.block_table, c.samples) for c in p.chunks] for p in own.plans]


def test_blocks_to_clear_reach_the_others() -> None:
    ranks, follower = RecordedRanks(), PlanKeeper()
    sent = StepPlan(chunks=(chunk([1], block_table=[0]),), clear_blocks=(4, 9))
    LeadingRunner(PlanKeeper(), ranks).launch(sent).read()
    ranks.send([])
    follow(follower, ranks)
    assert [received.clear_blocks for received in follower.plans] == [(4, 9)]


def test_a_step_that_fails_on_the_first_rank_is_the_end_of_the_group() -> None:
    runner = FakeRunner(num_blocks=4, block_size=4, vocab_size=VOCAB, failures=1)
    with pytest.raises(RanksLostError, match="the fake device is lost") as caught:
        LeadingRunner(runner, RecordedRanks()).launch(plan(chunk([1, 2], block_table=[0])))
    # Whoever catches the errors of a step and goes on must not catch this one.
    assert not isinstance(caught.value, Exception)


def test_a_step_that_fails_when_it_is_read_is_the_end_of_the_group_too() -> None:
    runner = FakeRunner(num_blocks=4, block_size=4, vocab_size=VOCAB, failing_reads=1)
    launched = LeadingRunner(runner, RecordedRanks()).launch(plan(chunk([1, 2], block_table=[0])))
    with pytest.raises(RanksLostError, match="the fake device is lost"):
        launched.read()


def test_one_rank_alone_sums_gathers_and_tells_nobody() -> None:
    import torch

    alone, x = OneRank(), torch.arange(6.0).view(2, 3)
    assert alone.sum(x) is x
    assert alone.gather_columns(x, 3) is x
    assert alone.lowest(7) == 7
    assert alone.watched(None) is None
    assert alone.receive() == []
    total = torch.ones(2, 3)
    alone.add_sum(total, x)
    assert torch.equal(total, x + 1)
    alone.share_memory(4, 3, torch.float32)
    alone.on_end(lambda: None)
    alone.send([1])
    alone.wait_for_loaded()
