"""How engines are measured, and what is read from llama.cpp's programs."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks import measuring
from benchmarks.engine_runs import Contender, Workplace, contenders
from benchmarks.measuring import DECODE, PREFILL, Job, Prompt, measure, rates
from benchmarks.peers.installing import PeerError, last_line, once, run_quietly
from benchmarks.peers.llama_cpp.run import batched_command, bench_command, parse_batched
from benchmarks.peers.llama_cpp.run import parse_bench as parse
from benchmarks.peers.vllm_cpu.make import preloads

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"


def a_job(**changes: object) -> Job:
    fields: dict[str, object] = {
        "variant": "auto:bf16",
        "model_path": "/models/demo",
        "vocab_size": 1000,
        "threads": 1,
        "started_at": 0.0,
        "folder": "/peers/llama_cpp",
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


class Counting:
    """An engine that only remembers what it was asked for."""

    def __init__(self) -> None:
        self.starts: list[list[Prompt]] = []
        self.steps = 0
        self.running = 0

    def start(self, prompts: Sequence[Prompt]) -> None:
        assert self.running == 0, "the prompts before were not finished"
        self.running = len(prompts)
        self.starts.append(list(prompts))

    def step(self) -> None:
        assert self.running
        self.steps += 1

    def finish(self) -> None:
        self.running = 0


def test_measure_times_every_length_and_batch_size() -> None:
    engine = Counting()
    job = a_job(batches=(1, 3), decode_steps=5, repeats=2)
    figures, found = measure(job, lambda: engine)
    assert found is engine
    assert set(figures["decode"]) == {"1", "3"}
    shapes = [(len(prompts), len(prompts[0])) for prompts in engine.starts]
    warmup = [(1, 16), (1, 512)]
    assert shapes == [*warmup, (1, 512), (1, 512), (1, 128), (1, 128), (1, 16), (3, 16)]
    assert engine.steps == 1 + 2 * (5 + 2)
    assert engine.running == 0


def test_no_two_prompts_of_a_run_begin_alike() -> None:
    engine = Counting()
    measure(a_job(repeats=3), lambda: engine)
    beginnings = [tuple(prompt[:16]) for prompts in engine.starts for prompt in prompts]
    assert len(set(beginnings)) == len(beginnings)


def test_prompts_are_the_same_for_every_engine_and_within_the_vocabulary() -> None:
    one, other = a_job(variant="auto:bf16"), a_job(variant="eager", threads=2)
    assert one.prompts(DECODE, 8, 16) == other.prompts(DECODE, 8, 16)
    assert one.prompts(DECODE, 1, 16) != one.prompts(PREFILL, 1, 16)
    ids = [token for prompt in one.prompts(DECODE, 8, 16) for token in prompt]
    assert min(ids) >= 300
    assert max(ids) < 1000


def test_the_best_third_leaves_out_slow_steps() -> None:
    found = rates([0.1] * 3 + [0.4] * 6, batch=8)
    assert found["tokens_per_s"] == pytest.approx(20)
    assert found["best_third_tokens_per_s"] == pytest.approx(80)


def test_a_job_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(batches=(1, 2), contexts=(64,))
    job.write(tmp_path / "job.json")
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "job.json"), "result.json"])
    assert Job.from_arguments() == (job, Path("result.json"))


def test_memory_is_at_least_what_a_python_takes() -> None:
    peak, anonymous = measuring.memory()
    if not Path("/proc/self/status").exists():
        assert (peak, anonymous) == (0, 0)
    else:
        assert peak >= anonymous > 1 << 20


def test_llama_bench_samples_are_found_by_prompt_length() -> None:
    rows = [
        {"n_prompt": 512, "n_gen": 0, "samples_ts": [590.0, 600.0]},
        {"n_prompt": 128, "n_gen": 0, "samples_ts": [500.0]},
    ]
    assert parse(json.dumps(rows)) == {512: [590.0, 600.0], 128: [500.0]}


def test_llama_batched_bench_lines_become_medians_by_batch() -> None:
    speeds = [(1, 90.0), (1, 100.0), (1, 80.0), (8, 240.0)]
    lines = [json.dumps({"pl": batch, "speed_tg": speed}) for batch, speed in speeds]
    # Its own log lines stand between, and may stand in front on the same line.
    text = "\n".join(["main: warming up", f"0.01 I {lines[0]}", *lines[1:], ""])
    found = parse_batched(text)
    assert found["1"] == {"tokens_per_s": 90.0, "best_third_tokens_per_s": 100.0}
    assert found["8"]["tokens_per_s"] == 240.0


def test_llama_programs_get_the_jobs_threads_and_enough_room() -> None:
    job = a_job(threads=3, batches=(1, 32), decode_steps=24)
    words = batched_command(job)
    assert words[words.index("-npl") + 1] == "1,1,1,32,32,32"
    assert int(words[words.index("-c") + 1]) == 32 * 256
    assert words[words.index("-t") + 1] == "3"
    alone = bench_command(job, "-p", "16")
    assert alone[alone.index("-t") + 1] == "3"
    assert alone[0].endswith("llama-bench")


def test_contenders_take_turns_ours_first() -> None:
    found = contenders(["auto:int4", "cpu:bf16"], ["llama_cpp", "vllm_cpu"])
    weights = {contender.name: contender.weights for contender in found}
    assert weights == {
        "mixfleet auto:int4": "int4",
        "mixfleet cpu:bf16": "bf16",
        "llama_cpp bf16": "bf16",
        "llama_cpp q8_0": "q8_0",
        "llama_cpp q4_0": "q4_0",
        "vllm_cpu eager": "bf16",
        "vllm_cpu compiled": "bf16",
    }


def test_llama_cpp_loads_gguf_files_and_everyone_else_the_checkpoint(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    ours, llama = contenders(["auto:bf16"], [])[0], contenders([], ["llama_cpp"])[1]
    assert place.model_of(ours, "demo") == tmp_path / "models" / "demo"
    assert place.model_of(llama, "demo") == tmp_path / "gguf" / "demo" / "q8_0.gguf"


def test_an_engine_that_fails_is_absent_with_its_last_words(tmp_path: Path) -> None:
    broken = Contender(name="no engine", module="benchmarks.nothing", variant="", weights="")
    with pytest.raises(PeerError, match=r"exit status 1: .*No module named benchmarks.nothing"):
        Workplace(tmp_path).measure(broken, "demo", a_job())


@pytest.mark.parametrize("peer", ["transformers", "vllm_cpu"])
def test_requirements_are_pinned_and_hold_nothing_for_graphics_cards(peer: str) -> None:
    lines = (PEERS / peer / "requirements.txt").read_text().split()
    assert "torch==2.13.0" in lines
    assert [line for line in lines if line.count("==") != 1] == []
    names = {line.partition("==")[0].lower() for line in lines}
    assert not names & {"triton", "torchvision", "torchaudio", "torchcodec"}
    assert not [name for name in names if name.startswith("nvidia")]


def test_what_is_complete_is_not_made_again_until_the_recipe_changes(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    needed = []
    for recipe in ("1", "1", "2"):
        with once(folder, recipe) as make:
            needed.append(make)
    assert needed == [True, False, True]


def test_an_interrupted_installation_is_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "peer"

    def interrupted() -> None:
        with once(folder, "1"):
            (folder / "half").touch()
            raise PeerError("the network is gone")

    with pytest.raises(PeerError):
        interrupted()
    with once(folder, "1") as needed:
        assert needed
        assert list(folder.iterdir()) == []


def test_a_failed_command_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import sys; print('no space left'); sys.exit(3)"
    with pytest.raises(PeerError, match="no space left"):
        run_quietly([sys.executable, "-c", script], log)
    with pytest.raises(PeerError):
        run_quietly([str(tmp_path / "missing-program")], log)


def test_last_line_skips_blank_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{word}\n\n" for word in ("one", "two", "three", "four")))
    assert last_line(log) == "two / three / four"
    log.write_text("\n")
    assert last_line(log) == "it printed nothing"


def test_vllm_preloads_the_libraries_that_are_there(tmp_path: Path) -> None:
    tcmalloc = tmp_path / "tcmalloc" / "usr" / "lib" / "libtcmalloc_minimal.so.4"
    openmp = tmp_path / "venv" / "lib" / "libiomp5.so"
    for file in (tcmalloc, openmp):
        file.parent.mkdir(parents=True)
        file.touch()
    assert preloads(tmp_path) == [tcmalloc, openmp]


def test_every_runner_names_its_peer_only_where_it_is_installed() -> None:
    sources = {path: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    wanted = [f"import {name}" for name in ("transformers", "vllm", "llama_cpp")]
    for (path, source), line in itertools.product(sources.items(), wanted):
        assert f"\n{line}" not in source, path.name
