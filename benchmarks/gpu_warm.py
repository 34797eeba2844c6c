"""Runs every decode step once that a run of many requests will meet, as a server soon has.

The first step of a shape makes, tunes and records its kernels. A server does that once in its life,
a benchmark of half a minute would pay for it all the time.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Final

import torch

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_load import Loaded, NotMeasurableError
from benchmarks.gpu_replay import decode_chunks, decode_steps
from benchmarks.gpu_requests import Figures
from mixfleet_engine.decode_step import buckets

CONTEXTS: Final = (512, 1024, 2048)
_LEAST_LEFT_S: Final = 100.0
"""Time that is left to what comes after it."""


@torch.inference_mode()
def warm_up(
    loaded: Loaded, budget: Budget, found: Figures, contexts: Sequence[int] = CONTEXTS
) -> None:
    """Run greedy steps of all buckets; fill ``found`` with how many shapes there are now.

    The largest batches come last, and are left out where the time is short.

    Raises:
        NotMeasurableError: The runner of this device has no such steps.
    """
    steps = decode_steps(loaded)
    if steps is None:
        raise NotMeasurableError("the runner of this device has no steps to record")
    sizes, size = buckets(loaded.scale.max_batch_size), loaded.runner.block_size
    limit = min(loaded.scale.model.context_length, loaded.runner.num_blocks * size)
    for rows, context in product(sizes, (c for c in contexts if c <= limit)):
        if found_shortage := budget.shortage(_LEAST_LEFT_S):
            found["skipped_batches"] = f"{rows} and more: {found_shortage}"
            break
        first, *others = decode_chunks(loaded, rows, context=1)
        table = tuple(range(-(-context // size)))
        longest = replace(first, start=context - 1, block_table=table)
        steps.run([longest, *others], [-1] * rows, "greedy")
    found["shapes"] = len(steps.shapes)
