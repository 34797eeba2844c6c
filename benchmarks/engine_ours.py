"""Measures this project's engine in a process of its own: scheduler and sampler included.

    python -m benchmarks.engine_ours JOB.json RESULT.json

The job's variant is ``backend:weights``, ``auto:int8`` for example.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import OVERHEAD, Job, Prompt, decode_times, measure, rates
from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.detokenizer import AnswerText
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.tokenizer import load_tokenizer

OVERHEAD_BATCH = 8
CONTEXT_BATCHES = (1, 8)
CONTEXT_STEPS = 12
SAMPLED_BATCHES = (1, 8, 32)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
_ROOM = 512
"""Longest answer, and tokens of KV cache beyond the counted ones, per sequence."""
_NO_ITL_TARGET_S = 60.0
_BF16_BYTES = 2


class Ours:
    """The engine as :class:`~benchmarks.measuring.Subject`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sampling = SamplingParams()
        self.tokens: list[int] = []
        """Every token since the start."""
        self._running: list[str] = []
        self._num_started = 0

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Submit all and step until each has a token."""
        self._running = []
        for prompt in prompts:
            self._num_started += 1
            name = f"row-{self._num_started}"
            self._running.append(name)
            room = self.engine.context_length - len(prompt)
            request = GenerateRequest(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                max_tokens=min(room, _ROOM),
                sampling=self.sampling,
            )
            self.engine.submit(request)
        waiting = set(self._running)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}

    def step(self) -> None:
        """Run one step, which must serve every request."""
        outputs = self.engine.step()
        if len(outputs) != len(self._running):
            raise RuntimeError(f"{len(outputs)} of {len(self._running)} requests in the step")
        for output in outputs:
            self.tokens.extend(output.token_ids)

    def finish(self) -> None:
        """Abort all."""
        for name in self._running:
            self.engine.abort(name)
        self._running = []


def engine_config(job: Job, model: ModelConfig) -> EngineConfig:
    """Return the settings that the job's variant means.

    Raises:
        ConfigError: This version of the engine does not know them.
    """
    backend, _, weights = job.variant.partition(":")
    settings: dict[str, Any] = {"backend": backend, "dtype": "bfloat16"}
    # All prompts of a batch go first, in whole chunks, as with the peers: the pace of answers that
    # run beside a prefill is not measured here.
    settings["itl_target_s"] = _NO_ITL_TARGET_S
    if weights == "fp32":
        settings["dtype"] = "float32"
    elif weights != "bf16":
        settings["weight_dtype"] = weights
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise RuntimeError(f"this version of the engine has no setting {unknown[0]}")
    longest = [job.prompt_tokens + job.decode_steps, *job.contexts]
    num_tokens = max(
        max(job.batches) * (longest[0] + _ROOM),
        max(CONTEXT_BATCHES) * (max(longest) + _ROOM),
        2 * job.prefill_tokens,
    )
    return EngineConfig(
        **settings,
        num_blocks=-(-num_tokens // 16),
        max_batch_size=max(*job.batches, *CONTEXT_BATCHES),
        context_length=min(model.context_length, num_tokens // 16 * 16),
        threads=job.threads,
    )


def load(job: Job) -> Ours:
    """Return the engine, ready to run."""
    path = Path(job.model_path)
    return Ours(load_engine(path, engine_config(job, ModelConfig.from_checkpoint(path))))


class Stopwatch:
    """Adds up the seconds inside a function of an object by standing in for it."""

    def __init__(self, owner: object, name: str) -> None:
        self.seconds = 0.0
        self._function: Callable[..., Any] = getattr(owner, name)
        setattr(owner, name, self._timed)

    def _timed(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


def overhead(job: Job, ours: Ours) -> dict[str, float]:
    """Return what share of a step at batch 8 is scheduler, sampler and detokeniser.

    The runner's ``logits`` is the model, the rest of its ``launch`` the sampler, and the rest of a
    step the scheduler. The detokeniser runs in the worker; here it gets the same tokens.
    """
    runner = ours.engine._runner
    model, run = Stopwatch(runner, "logits"), Stopwatch(runner, "launch")
    ours.start(job.prompts(OVERHEAD, OVERHEAD_BATCH, job.prompt_tokens))
    ours.step()
    ours.tokens.clear()
    model.seconds = run.seconds = 0.0
    started = time.perf_counter()
    for _ in range(job.decode_steps):
        ours.step()
    total = time.perf_counter() - started
    ours.finish()
    answer = AnswerText(load_tokenizer(Path(job.model_path)), ["</never>"])
    started = time.perf_counter()
    for token_id in ours.tokens:
        answer.push(token_id)
    detokenizer = time.perf_counter() - started
    total += detokenizer
    return {
        "step_s": total / job.decode_steps,
        "scheduler_share": (total - detokenizer - run.seconds) / total,
        "sampler_share": (run.seconds - model.seconds) / total,
        "detokenizer_share": detokenizer / total,
        "outside_model_share": 1 - model.seconds / total,
    }


def context_rows(job: Job, ours: Ours, model: ModelConfig) -> list[dict[str, float]]:
    """Return the time of a decode step against the context, beside the bytes of KV it reads.

    The time is of the fastest third: what is looked for is smaller than what a busy machine adds.
    """
    rows = []
    for batch in CONTEXT_BATCHES:
        for context in job.contexts:
            times = decode_times(job, ours, batch, context, CONTEXT_STEPS)
            read = batch * context * model.kv_values_per_token * _BF16_BYTES
            seconds = batch / rates(times, batch)["best_third_tokens_per_s"]
            rows.append({"batch": batch, "context": context, "step_s": seconds, "kv_bytes": read})
    return rows


class _Loaded(logging.Handler):
    """Keeps the line that says what was loaded: which back-end and dtype really ran."""

    line = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("loaded "):
            self.line = text.partition(": ")[2]


def main() -> None:
    """Measure and write the result."""
    job, result = Job.from_arguments()
    loaded = _Loaded()
    logger = logging.getLogger("mixfleet_engine")
    logger.addHandler(loaded)
    logger.setLevel(logging.INFO)
    figures, subject = measure(job, lambda: load(job))
    assert isinstance(subject, Ours)
    subject.sampling = SAMPLED
    figures["decode_sampled"] = {
        str(batch): rates(decode_times(job, subject, batch), batch)
        for batch in job.batches
        if batch in SAMPLED_BATCHES
    }
    figures["overhead_sampled"] = overhead(job, subject)
    subject.sampling = SamplingParams()
    figures["overhead"] = overhead(job, subject)
    model = ModelConfig.from_checkpoint(Path(job.model_path))
    figures["contexts"] = context_rows(job, subject, model)
    figures["loaded"] = loaded.line
    figures["versions"] = {"torch": torch.__version__}
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
