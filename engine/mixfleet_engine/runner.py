"""Runs the steps of one device: plan in, token ids out."""

from dataclasses import replace

import torch

from mixfleet_engine.batch import make_batch
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.launch import Computed, Launch
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import PlannedChunk, SampledToken, StepPlan


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
        self._last: list[SampledToken] = []
        """What the last launch sampled."""

    @property
    def waits(self) -> bool:
        """Whether a launch takes as long as its step, so that nothing is won by launching ahead."""
        return True

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
    def launch(self, plan: StepPlan) -> Launch:
        """Compute the plan at once.

        Its tokens are in the KV cache afterwards.
        """
        logits = self.logits(self._known(plan))
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        self._last = self._sampler.sample(logits, sampling) if len(logits) else []
        return Computed(self._last)

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Launch the plan and return the sampled tokens, one per chunk that samples, in plan order.

        A chunk whose logits are not finite gives ``NO_TOKEN``.
        """
        return self.launch(plan).read()

    def _known(self, plan: StepPlan) -> StepPlan:
        """Return the plan with its unread tokens, which are known here by now."""
        if all(chunk.unread_row is None for chunk in plan.chunks):
            return plan
        return replace(plan, chunks=tuple(self._with_token(chunk) for chunk in plan.chunks))

    def _with_token(self, chunk: PlannedChunk) -> PlannedChunk:
        if chunk.unread_row is None:
            return chunk
        # Where there is no token nobody will read what comes of it.
        token_id = max(0, self._last[chunk.unread_row].token_id)
        return replace(chunk, token_ids=(token_id,), unread_row=None)
