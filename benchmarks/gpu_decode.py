"""Decode and prefill through the engine: tokens per second, time between tokens, share of floor.

The prompts of a batch are random and share nothing with one another. A larger batch has those of
the smaller one among its own, and the prefix cache keeps each for the next batch, so every prompt
is prefilled once; what is prefilled for a batch is timed.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_floor import Rates, decode_work, prefill_seconds, step_seconds
from benchmarks.gpu_load import Loaded
from benchmarks.gpu_replay import replayed_seconds
from benchmarks.gpu_requests import Driver, Figures, percentile, random_prompts

_WARM_UP: Final = 8
_COMPARED_TOKENS: Final = 32
_LEAST_S: Final = 10.0
"""A batch is not begun with less time left."""


def decode_table(
    loaded: Loaded, batches: Sequence[int], rates: Rates | None, budget: Budget, found: Figures
) -> Iterator[None]:
    """Fill ``decode``, ``prefill`` and ``same_answers`` of ``found``; yield after each batch.

    ``same_answers`` is whether every answer that ran in several batches began with the same tokens
    in all of them. The rate of the prefill is that of the largest share that was prefilled at once.
    """
    scale = loaded.scale
    driver = Driver(loaded.engine())
    prompts = random_prompts("decode", max(batches), scale.context, scale.model.vocab_size)
    rows: Figures = found.setdefault("decode", {})
    answers: dict[int, list[int]] = {}
    num_prefilled = 0
    for batch in batches:
        if shortage := budget.shortage(_LEAST_S):
            found["skipped_batches"] = f"{batch} and more: {shortage}"
            return
        new = prompts[num_prefilled:batch]
        seconds = driver.prefill(new)
        num_prefilled = batch
        found["prefill"] = prefill_row(loaded, len(new), seconds, rates)
        rows[str(batch)] = _decode(loaded, driver, prompts[:batch], rates, answers, found)
        yield
        driver.stop()


def _decode(
    loaded: Loaded,
    driver: Driver,
    prompts: Sequence[list[int]],
    rates: Rates | None,
    answers: dict[int, list[int]],
    found: Figures,
) -> Figures:
    """Return the row of one batch, whose prompts are in the prefix cache."""
    scale, batch = loaded.scale, len(prompts)
    names = driver.start(prompts, max_tokens=scale.room)
    driver.step_times(_WARM_UP, batch)
    times = driver.step_times(scale.steps, batch)
    context = scale.context + _WARM_UP + scale.steps // 2
    row = decode_row(loaded, batch, context, times, rates)
    device_s = replayed_seconds(loaded, batch, scale.context + _WARM_UP + scale.steps)
    if device_s is not None:
        row["device_step_s"] = device_s
        row["host_gap"] = 1 - device_s / row["step_s"]
    same = [
        answers.setdefault(number, answer) == answer
        for number, name in enumerate(names)
        for answer in [driver.answers[name][:_COMPARED_TOKENS]]
    ]
    found["same_answers"] = found.get("same_answers", True) and all(same)
    return row


def decode_row(
    loaded: Loaded, batch: int, context: int, times: Sequence[float], rates: Rates | None
) -> Figures:
    """Return the figures of timed steps; a sequence gets one token in each."""
    step_s = statistics.median(times)
    row: Figures = {
        "tokens_per_s": batch / step_s,
        "step_s": step_s,
        "itl_p50_s": percentile(times, 0.5),
        "itl_p99_s": percentile(times, 0.99),
        "mean_context": context,
    }
    if rates:
        work = decode_work(
            loaded.scale.model,
            batch=batch,
            context=context,
            weight_dtype=loaded.weight_dtype,
            kv_dtype=loaded.kv_dtype,
        )
        row["floor_s"] = step_seconds(work, rates)
        row["of_floor"] = row["floor_s"] / step_s
    return row


def prefill_row(loaded: Loaded, count: int, seconds: float, rates: Rates | None) -> Figures:
    """Return the figures of ``count`` prompts of the table's context, prefilled at once."""
    length = loaded.scale.context
    row: Figures = {"tokens": count * length, "tokens_per_s": count * length / seconds}
    if rates:
        floor_s = prefill_seconds(
            loaded.scale.model,
            num_prompts=count,
            length=length,
            weight_dtype=loaded.weight_dtype,
            rates=rates,
        )
        row["of_floor"] = floor_s / seconds
    return row


def invariance_cost(
    invariant: Mapping[str, Figures], free: Mapping[str, Figures]
) -> dict[str, float]:
    """Return by batch how much longer a step takes with batch invariance than without."""
    return {
        batch: invariant[batch]["step_s"] / row["step_s"] - 1
        for batch, row in free.items()
        if batch in invariant
    }
