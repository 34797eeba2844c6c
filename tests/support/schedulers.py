"""Small schedulers, and the tokens that they are told."""

from typing import Any

from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import SampledToken


def make_scheduler(**changes: Any) -> Scheduler:
    """A small scheduler without a prefix cache, so that prompts may look alike."""
    sizes: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": 4,
        "max_batch_size": 4,
        "max_step_tokens": 8,
        "context_length": 64,
        "vocab_size": 100,
        "prefix_cache": False,
    }
    return Scheduler(**{**sizes, **changes})


def tokens(*token_ids: int) -> list[SampledToken]:
    return [SampledToken(token_id) for token_id in token_ids]
