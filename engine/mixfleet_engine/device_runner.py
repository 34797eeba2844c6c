"""Runs the steps of a device that works on its own: it is told what to do, and asked later.

Decodes run in buckets (`decode_step`), all else step by step as it comes. Where all rows can be
sampled on the device, a launch waits for nothing; the tokens stay there for the next launch and
travel to the host meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixfleet_engine.batch import make_batch, on_device
from mixfleet_engine.capture import Recorder
from mixfleet_engine.decode_step import DecodeSteps, Sampling, StepShape
from mixfleet_engine.device_draw import (
    draw_greedy,
    draw_tokens,
    draws_on_device,
    is_greedy,
    row_settings,
)
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.launch import Computed, Launch
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.step import PlannedChunk, SampledToken, StepPlan


@dataclass(frozen=True, slots=True)
class TokensOnTheirWay:
    """Implements :class:`~mixfleet_engine.launch.Launch`."""

    tokens: Tensor
    """``[R]`` on the host, good once ``arrived``."""
    arrived: torch.cuda.Event | None
    """None: they are there."""

    def read(self) -> list[SampledToken]:
        """See :class:`~mixfleet_engine.launch.Launch`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [SampledToken(token_id) for token_id in self.tokens.tolist()]


class DeviceRunner(ModelRunner):
    """A model and its KV cache on a device that works on its own.

    Args:
        model: The weights; its back-end must do without a look at the host.
        cache: Its KV cache; nobody else writes to it.
        device: Where both are.
        recorder: Records decode steps.
        max_rows: Most sequences of a step; the same on all ranks.
        context_length: Most tokens of a sequence.
    """

    def __init__(
        self,
        model: MixtralModel,
        cache: KvCache,
        device: torch.device,
        recorder: Recorder,
        *,
        max_rows: int,
        context_length: int,
    ) -> None:
        super().__init__(model, cache, device)
        self._samples = model.ranks.shard.rank == 0
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """What the last launch sampled, in the plan's order."""
        self._steps = DecodeSteps(
            lambda batch: model.forward(batch, cache),
            recorder,
            self._tokens,
            max_rows=max_rows,
            context_length=context_length,
            block_size=cache.block_size,
            vocab_size=model.config.vocab_size,
            device=device,
            is_shared=model.ranks.shard.world > 1,
        )
        model.ranks.on_end(self._steps.forget)

    @property
    def waits(self) -> bool:
        """See :class:`~mixfleet_engine.runner.ModelRunner`."""
        return self._device.type != "cuda"

    @property
    def recorded(self) -> tuple[StepShape, ...]:
        """The decode steps that have been recorded so far."""
        return self._steps.shapes

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launch:
        """Enqueue the plan; it waits where a row cannot be sampled on the device.

        Its tokens are in the KV cache for whatever is enqueued after it.
        """
        if plan.clear_blocks:
            # A masked slot counts as 0 times its value, and what was there may be a NaN.
            self._cache.clear(plan.clear_blocks)
        if not plan.chunks:
            return Computed([])
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        found = self._run(plan, sampling, self._ending(sampling))
        if not self._samples or not sampling:
            return Computed([])
        if found.dim() == 2:
            tokens = self._sampler.sample(found, sampling)
            self._keep(on_device(torch.tensor([t.token_id for t in tokens]), self._device))
            return Computed(tokens)
        self._keep(found)
        return self._on_their_way(found)

    def _ending(self, sampling: Sequence[PlannedChunk]) -> Sampling:
        if not self._samples or not all(draws_on_device(chunk) for chunk in sampling):
            return "none"
        return "greedy" if is_greedy(sampling) else "drawn"

    def _run(self, plan: StepPlan, sampling: Sequence[PlannedChunk], ending: Sampling) -> Tensor:
        """Return tokens ``[R]``, or logits ``[R, V]`` where the step ends with ``none``."""
        chunks = plan.chunks
        is_decode = len(sampling) == len(chunks) and all(len(c.token_ids) == 1 for c in chunks)
        if is_decode and self._steps.takes(len(chunks)):
            return self._steps.run(chunks, [_row(chunk) for chunk in chunks], ending)
        logits = self._logits_of(plan)
        if ending == "none" or len(logits) == 0:
            return logits
        if ending == "greedy":
            return draw_greedy(logits)
        vocab_size = self._model.config.vocab_size
        settings = [row_settings(c.sampling, c.position, vocab_size) for c in sampling]
        columns = torch.tensor(settings, dtype=torch.float64).T.contiguous()
        return draw_tokens(logits, on_device(columns, self._device))

    def _logits_of(self, plan: StepPlan) -> Tensor:
        batch = make_batch(plan, self.block_size, self._device)
        pairs = [
            (first, _row(chunk))
            for first, chunk in zip(batch.firsts, batch.plan_chunks, strict=True)
            if chunk.unread_row is not None
        ]
        if pairs:
            rows, unread = on_device(torch.tensor(pairs).T.contiguous(), self._device)
            # What was no token has ended its sequence; its row runs on for nobody.
            carried = self._tokens[unread].clamp_min(0)
            batch = replace(batch, token_ids=batch.token_ids.index_copy(0, rows, carried))
        return self._model.forward(batch, self._cache)

    def _keep(self, token_ids: Tensor) -> None:
        self._tokens[: len(token_ids)] = token_ids

    def _on_their_way(self, token_ids: Tensor) -> Launch:
        if self._device.type != "cuda":
            return TokensOnTheirWay(token_ids.clone(), None)
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return TokensOnTheirWay(host, arrived)


def _row(chunk: PlannedChunk) -> int:
    return -1 if chunk.unread_row is None else chunk.unread_row
