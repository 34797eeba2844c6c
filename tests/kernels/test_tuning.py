import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from triton.runtime.errors import OutOfResources

from mixfleet_engine.ops.cuda.tuning import Tuner, TuningKey, tokens_bucket
from mixfleet_engine.ops.cuda.tuning_file import TunedFor, TuningFile

HERE = TunedFor(device="H100", capability="9.0", triton="3.6.0", kernels="a1b2")
KEY = TuningKey(kernel="moe_gemm", form="int4", n=4096, k=14336, tokens=16, dtype="bfloat16")
OTHER = TuningKey(kernel="moe_gemm", form="int4", n=4096, k=14336, tokens=32, dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    block_n: int
    num_warps: int = 4


CANDIDATES = [Tiles(block_n=64), Tiles(block_n=128), Tiles(block_n=256)]
TIMES = {64: 3.0, 128: 1.0, 256: 2.0}


@dataclass
class Bench:
    """A GPU on which a launch takes as long as it says, by a clock of its own."""

    times: dict[int, float] = field(default_factory=lambda: dict(TIMES))
    failing: dict[int, Exception] = field(default_factory=dict)
    launched: list[int] = field(default_factory=list)
    in_graph: bool = False
    clock: float = 0.0

    def launch(self, tiles: Tiles) -> None:
        if tiles.block_n in self.failing:
            raise self.failing[tiles.block_n]
        self.launched.append(tiles.block_n)
        self.clock += self.times[tiles.block_n]

    def measure(self, launch: Callable[[], object]) -> float:
        started = self.clock
        launch()
        return self.clock - started

    def tuner(
        self, folder: Path | None = None, *, enabled: bool = True, budget_s: float = 100
    ) -> Tuner:
        return Tuner(
            TuningFile(folder, HERE) if folder else None,
            self.measure,
            enabled=enabled,
            budget_s=budget_s,
            now=lambda: self.clock,
            capturing=lambda: self.in_graph,
        )


def test_the_fastest_candidate_is_chosen_and_timed_only_once() -> None:
    bench = Bench()
    tuner = bench.tuner()
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == Tiles(block_n=128)
    bench.times[256] = 0.1
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == Tiles(block_n=128)
    assert bench.launched == [64, 128, 256]


def test_of_equally_fast_candidates_the_earlier_is_chosen() -> None:
    bench = Bench(times={64: 1.0, 128: 1.0, 256: 1.0})
    assert bench.tuner().choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[0]


def test_each_key_has_its_own_choice() -> None:
    bench = Bench()
    tuner = bench.tuner()
    tuner.choose(KEY, CANDIDATES, bench.launch)
    bench.times[256] = 0.1
    assert tuner.choose(OTHER, CANDIDATES, bench.launch) == Tiles(block_n=256)


def test_the_next_process_knows_the_choice(tmp_path: Path) -> None:
    bench = Bench()
    bench.tuner(tmp_path).choose(KEY, CANDIDATES, bench.launch)
    later = Bench(in_graph=True)  # not even a graph stands in its way
    assert later.tuner(tmp_path).choose(KEY, CANDIDATES, later.launch) == Tiles(block_n=128)
    assert later.launched == []


def test_a_stored_choice_that_is_no_candidate_any_more_is_made_anew(tmp_path: Path) -> None:
    bench = Bench()
    bench.tuner(tmp_path).choose(KEY, CANDIDATES, bench.launch)
    left = [CANDIDATES[0], CANDIDATES[2]]
    assert bench.tuner(tmp_path).choose(KEY, left, bench.launch) == CANDIDATES[2]
    assert bench.tuner(tmp_path).choose(KEY, left, bench.launch) == CANDIDATES[2]
    assert bench.launched == [64, 128, 256, 64, 256]


def test_a_broken_file_does_no_harm(tmp_path: Path) -> None:
    TuningFile(tmp_path, HERE).path.write_text("{")
    bench = Bench()
    assert bench.tuner(tmp_path).choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[1]


def test_a_tuner_that_is_off_takes_defaults_and_times_nothing(tmp_path: Path) -> None:
    bench = Bench()
    bench.tuner(tmp_path).choose(KEY, CANDIDATES, bench.launch)
    tuner = bench.tuner(tmp_path, enabled=False)
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[0]
    assert bench.launched == [64, 128, 256]


def test_a_single_candidate_is_not_timed() -> None:
    bench = Bench()
    assert bench.tuner().choose(KEY, CANDIDATES[1:2], bench.launch) == CANDIDATES[1]
    assert bench.launched == []


@pytest.mark.parametrize(
    "error", [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager failed")]
)
def test_a_candidate_that_cannot_run_is_passed_over(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(failing={128: error})
    with caplog.at_level(logging.DEBUG):
        assert bench.tuner().choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[2]
    failed = [record for record in caplog.records if str(error) in record.message]
    assert [record.levelno for record in failed] == [logging.DEBUG]


def test_an_error_of_our_own_is_not_taken_for_a_lack_of_room() -> None:
    bench = Bench(failing={128: TypeError("no such argument")})
    with pytest.raises(TypeError):
        bench.tuner().choose(KEY, CANDIDATES, bench.launch)


def test_where_no_candidate_runs_the_default_shows_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(failing=dict.fromkeys((64, 128, 256), RuntimeError("no GPU")))
    assert bench.tuner(tmp_path).choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[0]
    assert "no candidate" in caplog.text
    assert TuningFile(tmp_path, HERE).read() == {}


def test_when_the_time_is_used_up_defaults_are_taken_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()
    tuner = bench.tuner(tmp_path, budget_s=6.0)
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[1]
    for tokens in (64, 128):
        key = TuningKey(kernel="dense", form="fp8", n=1, k=1, tokens=tokens, dtype="bfloat16")
        assert tuner.choose(key, CANDIDATES, bench.launch) == CANDIDATES[0]
    assert len(bench.launched) == 3
    assert caplog.text.count("no time is left") == 1
    assert list(TuningFile(tmp_path, HERE).read()) == [str(KEY)]


def test_a_choice_that_the_budget_cut_short_holds_for_this_process_alone(tmp_path: Path) -> None:
    bench = Bench()
    tuner = bench.tuner(tmp_path, budget_s=4.0)
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[1]
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[1]
    assert bench.launched == [64, 128]
    assert TuningFile(tmp_path, HERE).read() == {}


def test_nothing_is_tuned_in_a_graph_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(in_graph=True)
    tuner = bench.tuner()
    for key in (KEY, OTHER, KEY):
        assert tuner.choose(key, CANDIDATES, bench.launch) == CANDIDATES[0]
    assert bench.launched == []
    assert caplog.text.count("CUDA graph") == 1
    bench.in_graph = False
    assert tuner.choose(KEY, CANDIDATES, bench.launch) == CANDIDATES[1]


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (9999, 4096)]
)
def test_tokens_fall_into_buckets_of_powers_of_two(tokens: int, bucket: int) -> None:
    assert tokens_bucket(tokens) == bucket
