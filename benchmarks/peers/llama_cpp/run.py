"""Measures llama.cpp with its own programs, llama-bench and llama-batched-bench.

They compute the same passes as an answer does but sample nothing, which favours them a little.
Their decode steps are timed in groups, so medians are over groups.
"""

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import Job

GROUP = 8
"""Decode steps that llama-batched-bench times together."""
_KIB = 1024


def bench_command(job: Job, *arguments: str) -> list[str]:
    """Return a call of llama-bench that answers in JSON."""
    program = str(Path(job.folder) / "build" / "tree" / "bin" / "llama-bench")
    return [program, "-m", job.model_path, "-t", str(job.threads), "-o", "json", *arguments]


def batched_command(job: Job) -> list[str]:
    """Return the call of llama-batched-bench that times every batch size several times."""
    program = str(Path(job.folder) / "build" / "tree" / "bin" / "llama-batched-bench")
    repeats = max(1, job.decode_steps // GROUP)
    steps = min(GROUP, job.decode_steps)
    batches = [str(batch) for batch in job.batches for _ in range(repeats)]
    # llama.cpp gives every sequence an equal part, a multiple of 256.
    room = max(job.batches) * -(-(job.prompt_tokens + steps) // 256) * 256
    command = [program, "-m", job.model_path, "-t", str(job.threads), "-c", str(room)]
    command += ["-b", "2048", "-ub", "512", "-npp", str(job.prompt_tokens), "-ntg", str(steps)]
    return [*command, "-npl", ",".join(batches), "--output-format", "jsonl"]


def parse_bench(text: str) -> dict[int, list[float]]:
    """Return tokens per second of each repeat, by length of the prompt; 0 is a decode of one."""
    return {row["n_prompt"]: row["samples_ts"] for row in json.loads(text)}


def parse_batched(text: str) -> dict[str, dict[str, float]]:
    """Return decode rates by batch size from the lines of llama-batched-bench."""
    groups: dict[str, list[float]] = {}
    for line in text.splitlines():
        start = line.find("{")
        if start >= 0:
            row = json.loads(line[start:])
            groups.setdefault(str(row["pl"]), []).append(row["speed_tg"])
    return {batch: rates(speeds) for batch, speeds in groups.items()}


def rates(speeds: Sequence[float]) -> dict[str, float]:
    """Return the median and the middle of the best third of tokens per second."""
    best = sorted(speeds, reverse=True)[: max(1, len(speeds) // 3)]
    return {
        "tokens_per_s": statistics.median(speeds),
        "best_third_tokens_per_s": statistics.median(best),
    }


def call(command: Sequence[str]) -> str:
    """Return what ``command`` prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(job: Job) -> dict[str, Any]:
    """Return the figures of one model file."""
    started = time.perf_counter()
    version = json.loads(
        call(bench_command(job, "-p", str(job.prompt_tokens), "-n", "0", "-r", "1", "--no-warmup"))
    )[0]["build_commit"]
    startup_s = time.perf_counter() - started
    lengths = f"{job.prefill_tokens},{job.ttft_tokens}"
    repeats = ("-r", str(job.repeats))
    prompts = parse_bench(call(bench_command(job, "-p", lengths, "-n", "0", *repeats)))
    steps = str(min(GROUP, job.decode_steps))
    repeats = ("-r", str(max(1, job.decode_steps // GROUP)))
    single = parse_bench(call(bench_command(job, "-p", "0", "-n", steps, *repeats)))
    decode = parse_batched(call(batched_command(job)))
    if "1" in decode:
        # Two programs time the same thing: the faster one counts.
        decode["1"] = max(decode["1"], rates(single[0]), key=lambda found: found["tokens_per_s"])
    return {
        "startup_s": startup_s,
        "prefill_tokens_per_s": statistics.median(prompts[job.prefill_tokens]),
        "ttft_s": job.ttft_tokens / statistics.median(prompts[job.ttft_tokens]),
        "decode": decode,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _KIB,
        "versions": {"llama.cpp": version},
    }


def main() -> None:
    """Measure and write the result."""
    job, result = Job.from_arguments()
    result.write_text(json.dumps(measure(job)))


if __name__ == "__main__":
    main()
