import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import StartHangError
from mixfleet_engine.ranks import RanksLostError
from mixfleet_engine.start_watch import POLL_S, Report, Stage, StartWatch
from support.worker_process import until

PATIENCE_S = 0.3
OTHER = 4242
"""Process id of a rank that is not there."""
Watch = Callable[..., StartWatch]


class DictStore:
    """A store in this process; without `thawed`, readers wait as for a stopped process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.thawed = threading.Event()
        self.thawed.set()
        self.is_gone = False

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        self.thawed.wait()
        if self.is_gone:
            raise RuntimeError("connection reset")
        return all(key in self.values for key in keys)

    def say(self, rank: int, stage: Stage, amount: int = 0) -> None:
        """Report as a rank that is not there."""
        self.set(f"start/{rank}", Report(rank, OTHER, stage, amount).text())


@pytest.fixture
def store() -> Iterator[DictStore]:
    store = DictStore()
    yield store
    store.thawed.set()


@pytest.fixture
def watch(store: DictStore) -> Iterator[Watch]:
    """Makes watches of one rank and ends their threads."""
    made: list[StartWatch] = []

    def make(rank: int, world: int = 2, *, is_hosted: bool = False) -> StartWatch:
        shard = Shard(rank=rank, world=world)
        made.append(StartWatch(store, shard, patience_s=PATIENCE_S, is_hosted=is_hosted))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_ranks_at_the_stage_or_beyond_are_not_waited_for(store: DictStore, watch: Watch) -> None:
    first, second = watch(0, 3), watch(1, 3)
    store.say(2, Stage.OPENING)
    first.reached(Stage.OPENING)
    second.reached(Stage.READY)
    first.wait_for(Stage.OPENING)
    with pytest.raises(StartHangError):
        first.wait_for(Stage.LOADING)


def test_a_rank_that_was_never_heard_of_has_only_started(watch: Watch) -> None:
    first = watch(0)
    first.reached(Stage.RENDEZVOUS)
    message = r"^rank 1 hangs in stage 'started': nothing new for 0.3 s$"
    with pytest.raises(StartHangError, match=message):
        first.wait_for(Stage.RENDEZVOUS)


def test_a_rank_that_stops_is_named_with_its_process_stage_and_bytes(
    store: DictStore, watch: Watch
) -> None:
    first = watch(0)
    first.reached(Stage.READY)
    store.say(1, Stage.LOADING, 5 << 20)
    message = rf"rank 1 \(process {OTHER}\) hangs in stage 'loading weights' after 5 MiB: nothing"
    with pytest.raises(StartHangError, match=message):
        first.wait_for(Stage.READY)


def test_a_rank_may_load_for_longer_than_the_patience(store: DictStore, watch: Watch) -> None:
    def load() -> None:
        for number in range(10):
            store.say(1, Stage.LOADING, number)
            time.sleep(PATIENCE_S / 5)
        store.say(1, Stage.READY)

    first, other = watch(0), threading.Thread(target=load)
    first.reached(Stage.READY)
    other.start()
    first.wait_for(Stage.READY)
    other.join()


def test_a_report_is_seen_while_its_reader_does_something_else(
    store: DictStore, watch: Watch
) -> None:
    """So that the last thing known of rank 0 is not how it was when somebody last waited."""
    second = watch(1)
    second.reached(Stage.READY)
    store.say(0, Stage.LOADING, 3 << 20)
    until(lambda: second._seen[0].amount > 0, "the report is seen")
    store.thawed.clear()
    with pytest.raises(StartHangError, match=r"'loading weights' after 3 MiB: no answer for 0.3 s"):
        second.wait_for(Stage.READY)


def test_a_store_of_torchruns_is_not_blamed_on_a_rank(store: DictStore, watch: Watch) -> None:
    store.thawed.clear()
    with pytest.raises(StartHangError, match="torchrun's store hangs"):
        watch(1, is_hosted=True).wait_for(Stage.READY)


def test_reporting_never_waits_for_the_store(store: DictStore, watch: Watch) -> None:
    store.thawed.clear()
    first = watch(0)
    first.reached(Stage.LOADING, 1)
    store.thawed.set()
    until(lambda: "start/0" in store.values, "the report is written")
    assert store.values["start/0"].split()[0] == str(os.getpid())


def test_a_store_that_is_gone_means_that_its_process_is(store: DictStore, watch: Watch) -> None:
    first = watch(0)
    store.is_gone = True
    with pytest.raises(RanksLostError, match="connection reset"):
        first.wait_for(Stage.READY)


def test_a_closed_watch_writes_nothing_any_more(store: DictStore, watch: Watch) -> None:
    first = watch(0)
    first.close()
    time.sleep(3 * POLL_S)
    first.reached(Stage.READY)
    time.sleep(3 * POLL_S)
    assert " 4 " not in store.values.get("start/0", "")


@pytest.mark.parametrize("stage", list(Stage))
def test_every_stage_has_words(stage: Stage) -> None:
    assert stage.words
