"""Runs the steps of one device: plan in, token ids out."""

import torch

from mixfleet_engine.batch import make_batch
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import SampledToken, StepPlan


class ModelRunner:
    """A model and its KV cache. Which blocks are whose, only the plans know.

    Args:
        model: The weights.
        cache: Its KV cache; nobody else writes to it.
        device: Where both are.
    """

    def __init__(self, model: MixtralModel, cache: KvCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._sampler = Sampler()

    @property
    def num_blocks(self) -> int:
        """Blocks of KV cache."""
        return self._cache.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._cache.block_size

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Run the model and return ``[R, V]`` fp32 logits, a row per chunk that samples."""
        if plan.clear_blocks:
            # A masked slot counts as 0 times its value, and what was there may be a NaN.
            self._cache.clear(plan.clear_blocks)
        if not plan.chunks:
            return torch.empty(0, self._model.config.vocab_size)
        batch = make_batch(plan, self.block_size, self._device)
        return self._model.forward(batch, self._cache)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Return the sampled tokens, one per chunk that samples, in plan order.

        A chunk whose logits are not finite gives ``NO_TOKEN``.

        The plan's tokens are in the KV cache afterwards.
        """
        logits = self.logits(plan)
        if len(logits) == 0:
            return []
        return self._sampler.sample(logits, [chunk for chunk in plan.chunks if chunk.samples])
