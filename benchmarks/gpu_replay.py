"""The decode step that a device runs again and again, without the engine around it.

**The host gap.** A pipelined engine hides its work behind the device's: it plans and enqueues a
step while the one before runs. Where that succeeds, a step takes as long as its kernels. So the
recorded step of a batch that has just run is enqueued again many times, back to back, and timed by
the device's own clock. What a step of the engine takes beyond that is the gap: host work that did
not hide, the copies that tell the device where the sequences stand, and the tokens' way back.

Replaying is harmless: a step reads its tokens and positions from tensors that only the host
writes, so it stores the same keys and values in the same slots again.
"""

from typing import Any, Final

import torch

from benchmarks.gpu_load import Loaded, NotMeasurableError
from benchmarks.gpu_timing import device_seconds
from mixfleet_engine.capture import Work
from mixfleet_engine.decode_step import DecodeSteps, buckets
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import PlannedChunk

_REPEATS: Final = 5
_AT_ONCE: Final = 16


@torch.inference_mode()
def replayed_seconds(loaded: Loaded, batch: int, context: int) -> float | None:
    """Return the device's seconds of the greedy step that has just served so many sequences.

    None where the runner of this device has recorded no such step.

    Args:
        loaded: What ran it.
        batch: Sequences.
        context: Tokens of the longest of them.
    """
    steps = decode_steps(loaded)
    if steps is None:
        return None
    fitting = [
        shape
        for shape in steps.shapes
        if shape.sampling == "greedy"
        and shape.num_rows == buckets(batch)[-1]
        and shape.max_context >= context
    ]
    if not fitting:
        return None
    work = steps._work[min(fitting, key=lambda shape: shape.max_context)]
    work()
    return device_seconds(work, loaded.device, repeats=_REPEATS, at_once=_AT_ONCE)


class _KeepingRecorder:
    """Implements :class:`~mixfleet_engine.capture.Recorder`: keeps the work as it is."""

    work: Work

    def record(self, work: Work) -> Work:
        """Return ``work`` itself."""
        self.work = work
        return work


@torch.inference_mode()
def unrecorded_step(loaded: Loaded, batch: int) -> Work:
    """Return what runs a greedy step of ``batch`` sequences, launched kernel by kernel.

    Each sequence has the decode table's context. No engine may go on with the KV cache after it.

    Raises:
        NotMeasurableError: The runner of this device has no such steps, or its cache no room.
    """
    if decode_steps(loaded) is None:
        raise NotMeasurableError("the runner of this device has no steps to record")
    runner, recorder = loaded.runner, _KeepingRecorder()
    steps = DecodeSteps(
        lambda placed: runner._model.forward(placed, runner._cache),
        recorder,
        torch.zeros(batch, dtype=torch.int64, device=loaded.device),
        max_rows=batch,
        context_length=loaded.scale.model.context_length,
        block_size=runner.block_size,
        vocab_size=loaded.scale.model.vocab_size,
        device=loaded.device,
    )
    steps.run(decode_chunks(loaded, batch), [-1] * batch, "greedy")
    work: Work = torch.inference_mode()(recorder.work)
    return work


def decode_chunks(
    loaded: Loaded, batch: int, context: int | None = None
) -> tuple[PlannedChunk, ...]:
    """Return decodes of so many sequences, each with its own blocks.

    Args:
        loaded: What is to run them.
        batch: Sequences.
        context: Tokens that each has; None: as in the decode table.

    Raises:
        NotMeasurableError: The KV cache has no room for them.
    """
    size, context = loaded.runner.block_size, context or loaded.scale.context
    width = context // size + 1
    if batch * width > loaded.runner.num_blocks:
        raise NotMeasurableError(f"no KV cache for {batch} sequences of {context} tokens")
    return tuple(
        PlannedChunk(
            request_id=str(row),
            token_ids=(3 + row,),
            start=context,
            block_table=tuple(range(row * width, (row + 1) * width)),
            samples=True,
            sampling=SamplingParams(),
            history=TokenHistory((1,)),
            position=0,
        )
        for row in range(batch)
    )


def decode_steps(loaded: Loaded) -> DecodeSteps | None:
    """Return what runs the decode steps inside a device's runner; None: it has no such thing."""
    found: Any = getattr(loaded.runner, "_steps", None)
    return found if isinstance(found, DecodeSteps) else None
