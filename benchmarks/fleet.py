"""What the queue costs: the same answers from the engine alone and through the whole fleet.

One process holds the engine and generates N answers at once; then a worker process with the same
model, behind an embedded Redis, generates the same N answers for N client threads. The ratio of
the two rates is what claim, lease, detokenising, streams, Redis and clients cost together.

    python -m benchmarks.fleet [--model-path DIR] [--rounds 5]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from mixfleet import Client
from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.settings import resolve
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.demo_model import ensure_demo_model
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer

PROMPT = "Tell a long story: Once upon a time"
NUM_TOKENS = 96
BATCHES = (1, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of N answers."""

    tokens_per_s: float
    ttft_s: float
    """Median over the answers, submit to first token."""


def engine_round(engine: GenerationEngine, tokenizer: Tokenizer, batch: int) -> Round:
    """Generate ``batch`` answers at once with nothing between us and the engine."""
    prompt = tuple(tokenizer.encode(PROMPT))
    started = time.perf_counter()
    for row in range(batch):
        engine.submit(
            GenerateRequest(request_id=f"row-{row}", prompt_token_ids=prompt, max_tokens=NUM_TOKENS)
        )
    first: dict[str, float] = {}
    num_tokens = 0
    while engine.has_work:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - started)
            num_tokens += len(output.token_ids)
    duration = time.perf_counter() - started
    return Round(tokens_per_s=num_tokens / duration, ttft_s=statistics.median(first.values()))


def fleet_round(client: Client, batch: int) -> Round:
    """Generate ``batch`` answers at once for as many client threads."""

    def answer(_: int) -> tuple[int, float]:
        with client.complete(PROMPT, max_tokens=NUM_TOKENS, temperature=0) as stream:
            result = stream.result()
        return result.usage.completion_tokens, result.ttft_s or 0.0

    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=batch) as pool:
        answers = list(pool.map(answer, range(batch)))
    duration = time.perf_counter() - started
    return Round(
        tokens_per_s=sum(tokens for tokens, _ in answers) / duration,
        ttft_s=statistics.median(ttft for _, ttft in answers),
    )


def measure(model_path: Path, rounds: int) -> list[dict[str, object]]:
    """Return one row of figures a batch size; the two sides take turns."""
    engine = load_engine(model_path, EngineConfig(max_batch_size=max(BATCHES)))
    tokenizer = load_tokenizer(model_path)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as server:
        environment = {**os.environ, "MIXFLEET_DATA_DIR": folder}
        command = [sys.executable, "-m", "mixfleet_worker", "--model-path", str(model_path)]
        worker = subprocess.Popen([*command, "--redis", server.url], env=environment)
        try:
            with Client(server.url, model=model_path.name) as client:
                fleet_round(client, max(BATCHES))  # waits for the worker, and warms it
                engine_round(engine, tokenizer, max(BATCHES))
                for batch in BATCHES:
                    alone = [engine_round(engine, tokenizer, batch) for _ in range(rounds)]
                    fleet = [fleet_round(client, batch) for _ in range(rounds)]
                    rows.append(_row(batch, alone, fleet))
        finally:
            worker.terminate()
            worker.wait(timeout=60)
    return rows


def _row(batch: int, alone: list[Round], fleet: list[Round]) -> dict[str, object]:
    engine_rate = statistics.median(r.tokens_per_s for r in alone)
    fleet_rate = statistics.median(r.tokens_per_s for r in fleet)
    return {
        "batch": batch,
        "engine_tokens_per_s": round(engine_rate, 1),
        "fleet_tokens_per_s": round(fleet_rate, 1),
        "ratio": round(fleet_rate / engine_rate, 3),
        "engine_ttft_ms": round(1000 * statistics.median(r.ttft_s for r in alone), 1),
        "fleet_ttft_ms": round(1000 * statistics.median(r.ttft_s for r in fleet), 1),
    }


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = arguments.model_path or ensure_demo_model(resolve({}).data_dir, print)
    rows = measure(path, arguments.rounds)
    print(*rows[0], sep="\t")
    for row in rows:
        print(*row.values(), sep="\t")
    print(report.write("fleet", {"model": path.name, "tokens": NUM_TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
