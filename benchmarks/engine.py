"""The engine beside its peers: this project, transformers, llama.cpp and vLLM, in one run.

    python -m benchmarks engine [--rounds 3] [--threads N] [--models demo random]
                                [--ours auto:bf16 auto:int8] [--peers transformers llama_cpp]

The first run makes two models and installs the peers, 10 GB in the user's cache folder and a
quarter of an hour. Every engine runs in a process of its own, one at a time, and they take turns,
so that a machine that slows down slows all of them. What cannot run is named with the reason and
left out.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from benchmarks import engine_report, plot, report
from benchmarks.engine_runs import Contender, Workplace, contenders
from benchmarks.floor import Sizes
from benchmarks.measuring import BATCHES, DECODE_STEPS, Job
from benchmarks.models import NAMES, num_weights
from benchmarks.peers.installing import PeerError
from benchmarks.report import say
from mixfleet_engine.config import ModelConfig

OURS = ("auto:bf16", "auto:int8", "auto:int4", "cpu:bf16")
PEERS = ("transformers", "llama_cpp", "vllm_cpu")
CONTEXTS = (64, 512, 2048, 4096)
SLOW_START_S = 30.0
"""Who takes longer to start, a compiler for example, runs in every other round only."""
MACHINE = Contender(name="machine", module="benchmarks.floor", variant="", weights="")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options; ``--peers`` and ``--ours`` without a word mean none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores, help="the same for all engines")
    parser.add_argument("--models", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ours", nargs="*", default=list(OURS), help="backend:weights")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=DECODE_STEPS, help="decode steps timed")
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--work-dir", type=Path, help="default: in the user's cache folder")
    return parser.parse_args(arguments)


def prepare(arguments: argparse.Namespace, place: Workplace) -> dict[str, str]:
    """Make models and peers, and return why a peer is absent, by its name."""
    say("models: making those that are missing")
    place.python("benchmarks.models", place.models)
    absent: dict[str, str] = {}
    for peer in arguments.peers:
        say(f"{peer}: installing it where it is missing")
        try:
            maker = importlib.import_module(f"benchmarks.peers.{peer}.make")
            made = maker.make(place.peer(peer), say)
            if peer == "llama_cpp":
                for model in arguments.models:
                    say(f"llama_cpp: converting {model} where it is missing")
                    place.python(
                        "benchmarks.peers.llama_cpp.convert",
                        *(place.models / model, place.gguf(model), made),
                    )
        except PeerError as error:
            absent[peer] = str(error)
            say(f"{peer}: absent: {error}")
    return absent


def run_rounds(
    arguments: argparse.Namespace, place: Workplace, absent: dict[str, str]
) -> list[dict[str, Any]]:
    """Run every engine once a round and return all figures; ``absent`` gets what failed."""
    runs: list[dict[str, Any]] = []
    slow: dict[str, str] = {}
    engines = contenders(arguments.ours, [p for p in arguments.peers if p not in absent])
    for number in range(arguments.rounds):
        for model in arguments.models:
            first = [MACHINE] if model == arguments.models[0] else []
            for engine in [*first, *engines]:
                if f"{model} {engine.name}" in absent | (slow if number % 2 else {}):
                    continue
                job = _job(arguments, place, model, engine, first=number == 0)
                started = time.perf_counter()
                try:
                    figures = place.measure(engine, model, job)
                except PeerError as error:
                    absent[f"{model} {engine.name}"] = str(error)
                    say(f"{model} {engine.name}: absent: {error}")
                    continue
                runs.append({"round": number, "model": model, "engine": engine.name, **figures})
                if figures.get("startup_s", 0.0) > SLOW_START_S:
                    slow[f"{model} {engine.name}"] = "every other round"
                seconds = time.perf_counter() - started
                say(f"round {number + 1} {model} {engine.name}: {seconds:.0f} s")
    return runs


def _job(
    arguments: argparse.Namespace, place: Workplace, model: str, engine: Contender, *, first: bool
) -> Job:
    config = ModelConfig.from_checkpoint(place.models / model)
    with_contexts = first and engine.name in [f"mixfleet {one}" for one in arguments.ours[:1]]
    return Job(
        variant=engine.variant,
        model_path=str(place.model_of(engine, model)),
        vocab_size=config.vocab_size,
        threads=arguments.threads,
        started_at=time.time(),
        batches=tuple(arguments.batches),
        decode_steps=arguments.steps,
        contexts=tuple(arguments.contexts) if with_contexts else (),
        folder=str(place.peer(engine.peer)),
    )


def sizes_of(path: Path) -> Sizes:
    """Return what a decode step of the checkpoint at ``path`` reads."""
    config = ModelConfig.from_checkpoint(path)
    return Sizes(
        **num_weights(config),
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
    )


def main() -> None:
    """Prepare, measure, print the tables, and write JSON and plot."""
    arguments = parse_arguments(sys.argv[1:])
    place = Workplace(arguments.work_dir or user_cache_path("mixfleet") / "benchmarks")
    absent = prepare(arguments, place)
    runs = run_rounds(arguments, place, absent)
    sizes = {model: sizes_of(place.models / model) for model in arguments.models}
    figures = engine_report.summarise(runs, sizes)
    print(engine_report.text(figures, absent))
    settings = {name: getattr(arguments, name) for name in ("rounds", "threads", "steps")}
    # The last line of what a failed engine printed is its error; those before name folders.
    reasons = {name: reason.rpartition(" / ")[2] for name, reason in absent.items()}
    record = {**settings, **figures, "absent": reasons, "each_run": runs}
    written = report.write("engine", record)
    plot.write(figures["models"], written.with_suffix(".svg"))
    print(written, written.with_suffix(".svg"), sep="\n")


if __name__ == "__main__":
    main()
