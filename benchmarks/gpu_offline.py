"""Throughput with all requests queued at once, and how evenly tokens come beside a long prompt."""

import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_load import Loaded
from benchmarks.gpu_requests import Driver, Figures, percentile, random_prompts
from benchmarks.gpu_scale import Traffic

_SIGMA: Final = {"prompt": 0.8, "output": 0.9}
"""Spread of the logarithms of drawn lengths."""
_MOST_OF_MEAN: Final = 6
"""No drawn length is more than so many times the mean."""
_WARM_UP: Final = 8
_LEARNING_TOKENS: Final = 4
"""Prefills of one step's tokens, so many of them, from which the engine learns what they cost."""
_MOST_RUN_S: Final = 25.0
"""Of one setting: with a small target the long prompt may take minutes."""
ITL_TARGETS: Final = (2.5, 1.3)
"""As multiples of the idle ITL: a little less than the goals, for a target is what is aimed at."""
DEFAULT_ITL_TARGET_S: Final = 0.1


def lengths(traffic: Traffic) -> list[tuple[int, int]]:
    """Return prompt and answer length of each request, the same each time."""
    if not traffic.is_drawn:
        return [(traffic.prompt_tokens, traffic.output_tokens)] * traffic.num_requests
    source = random.Random(traffic.name)
    return [
        (
            _drawn(source, traffic.prompt_tokens, _SIGMA["prompt"]),
            _drawn(source, traffic.output_tokens, _SIGMA["output"]),
        )
        for _ in range(traffic.num_requests)
    ]


def _drawn(source: random.Random, mean: int, sigma: float) -> int:
    """Return a log-normal length; without the limit at the top its mean would be ``mean``."""
    found = source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return max(1, min(round(found), _MOST_OF_MEAN * mean))


def offline(loaded: Loaded, traffic: Traffic, budget: Budget, found: Figures) -> None:
    """Fill ``found`` with the rates of ``traffic``; cut off where the time is over."""
    vocab_size = loaded.scale.model.vocab_size
    source = random.Random(f"prompts of {traffic.name}")
    driver = Driver(loaded.engine())
    wanted = lengths(traffic)
    for prompt_tokens, output_tokens in wanted:
        driver.submit(source.choices(range(3, vocab_size), k=prompt_tokens), output_tokens)
    started = time.perf_counter()
    while driver.engine.has_work and not budget.shortage(1.0):
        driver.step()
    seconds = time.perf_counter() - started
    if driver.engine.has_work:
        found["cut_after_s"] = seconds
    num_tokens = sum(map(len, driver.answers.values()))
    found |= {
        "requests": traffic.num_requests,
        "mean_prompt_tokens": statistics.fmean(prompt for prompt, _ in wanted),
        "mean_output_tokens": statistics.fmean(output for _, output in wanted),
        "seconds": seconds,
        "output_tokens": num_tokens,
        "output_tokens_per_s": num_tokens / seconds,
        "preemptions": driver.engine.num_preemptions,
    }
    driver.stop()


def itl_beside_prefill(loaded: Loaded, budget: Budget, found: Figures) -> Iterator[None]:
    """Fill ``found``: ITL of running answers alone, and while one long prompt is prefilled.

    Once with the default target for a step's time, and once each with targets near to the idle
    ITL. The smaller the target, the longer the long prompt waits for its first token, so that is
    measured too. Yields after each.
    """
    idle = _beside(loaded, None, budget)
    found |= {"idle_p50_s": idle["p50_s"], "idle_p99_s": idle["p99_s"]}
    runs: list[Figures] = found.setdefault("runs", [])
    targets = [DEFAULT_ITL_TARGET_S, *(share * idle["p50_s"] for share in ITL_TARGETS)]
    for target_s in targets:
        row = _beside(loaded, target_s, Budget(min(budget.deadline, time.time() + _MOST_RUN_S)))
        row["p99_of_idle"] = row["p99_s"] / idle["p50_s"]
        runs.append(row)
        yield


def _beside(loaded: Loaded, target_s: float | None, budget: Budget) -> Figures:
    """Return the ITL of running answers beside a long prompt; without a target beside nothing."""
    scale = loaded.scale
    vocab_size = scale.model.vocab_size
    driver = Driver(loaded.engine(*([] if target_s is None else [target_s])))
    prompts = random_prompts("itl", scale.itl_decoders, scale.context, vocab_size)
    names = driver.start(prompts, max_tokens=scale.long_prompt // 8)
    driver.step_times(_WARM_UP, len(names))
    if target_s is None:
        gaps = driver.step_times(scale.steps, len(names))
        driver.stop()
        return _gap_figures(gaps)
    learning = random_prompts("learn", _LEARNING_TOKENS, scale.max_step_tokens // 8, vocab_size)
    for prompt in learning:
        driver.start([prompt], max_tokens=1)
    (long_prompt,) = random_prompts("long", 1, scale.long_prompt, vocab_size)
    started = time.perf_counter()
    long_name = driver.submit(long_prompt, max_tokens=1)
    gaps = _gaps_until(driver, long_name, names, budget)
    ttft_s = time.perf_counter() - started
    is_done = bool(driver.answers[long_name])
    driver.stop()
    return _gap_figures(gaps) | {
        "target_s": target_s,
        "prefill_s": ttft_s,
        "is_cut": not is_done,
    }


def _gaps_until(driver: Driver, awaited: str, names: Sequence[str], budget: Budget) -> list[float]:
    """Return the times between neighbouring tokens of all answers until ``awaited`` has one."""
    last = dict.fromkeys(names, time.perf_counter())
    gaps = []
    while not driver.answers[awaited] and not budget.shortage(1.0):
        served, now = driver.step(), time.perf_counter()
        for name in served:
            if name in last:
                gaps.append(now - last[name])
                last[name] = now
    return gaps


def _gap_figures(gaps: Sequence[float]) -> Figures:
    return {
        "p50_s": percentile(gaps, 0.5),
        "p99_s": percentile(gaps, 0.99),
        "longest_s": max(gaps),
        "tokens": len(gaps),
    }
