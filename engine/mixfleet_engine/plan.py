"""What a model takes of a machine's memory and what that leaves for sequences, before loading.

All figures come from the model's sizes alone. Memory is counted per device: tensor parallelism
gives each device one rank, an equal share of the matrices and of the KV heads.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final, Self

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import ConfigError, DoesNotFitError
from mixfleet_engine.machines import Machine
from mixfleet_engine.packed_format import PackedFormat
from mixfleet_engine.weight_formats import (
    KV_BYTES,
    format_of,
    kind_name,
    output_kind,
    packed_bytes,
    stored_bytes,
    weight_kinds,
)

LEAST_TOKENS: Final = 1024
"""A KV cache of less is no use for a chat: the model counts as too big."""
_BESIDE_PACKED: Final = "bfloat16"
"""What is not packed is held so."""
_CUDA_SHARE: Final = 0.94
_CUDA_RESERVE_BYTES: Final = 2 << 30
_CPU_SHARE: Final = 0.90
_CPU_RESERVE_BYTES: Final = 512 << 20
_CPU_KV_BYTES: Final = 2 << 30
_TYPICAL_SHARE: Final = 4
_MAX_BATCH: Final = {"cuda": 256, "cpu": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How the memory of each device of a machine is shared out; all bytes are of one device."""

    machine: Machine
    """One rank on each of its devices."""
    weight_dtype: str
    kv_dtype: str
    weight_bytes: int
    reserve_bytes: int
    """Kept free for activations, graphs, the allocator's waste and the system."""
    kv_bytes_per_token: int

    @property
    def kv_bytes(self) -> int:
        """What is left for the KV cache; 0 where weights and reserve take all."""
        return max(0, self.machine.available_bytes - self.reserve_bytes - self.weight_bytes)

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that fit, the same ones on every rank."""
        return self.kv_bytes // self.kv_bytes_per_token

    @property
    def needed_bytes(self) -> int:
        """Weights, reserve and the smallest KV cache of use."""
        return self.weight_bytes + self.reserve_bytes + LEAST_TOKENS * self.kv_bytes_per_token

    @property
    def fits(self) -> bool:
        """Whether the model runs at all."""
        return self.kv_tokens >= LEAST_TOKENS

    def after_loading(self, free_bytes: int) -> Self:
        """Return the plan with the weights as big as they turned out.

        Args:
            free_bytes: What is left of a device's memory beside them, the reserve included.
        """
        return replace(self, weight_bytes=max(0, self.machine.available_bytes - free_bytes))

    def sequences(self, context: int) -> int:
        """Return how many sequences of ``context`` tokens fit at the same time, each full."""
        return self.kv_tokens // context if self.fits else 0


def num_parameters(model: ModelConfig) -> int:
    """Return how many numbers the checkpoint holds."""
    return sum(kind.count * math.prod(kind.shape) for kind in weight_kinds(model))


def weight_bytes(
    model: ModelConfig, weight_dtype: str, tp: int = 1, *, copies_output: bool = False
) -> int:
    """Return the bytes of all weights that one rank of ``tp`` holds.

    Routers count like other plain weights; that they are held in fp32 adds 0.005 GiB to the
    largest model, which the reserve covers.

    Args:
        model: Sizes.
        weight_dtype: float32, bfloat16, float16, fp8, int8 or int4; ``awq`` or ``gptq``: packed
            as in the model's own checkpoint.
        tp: Ranks.
        copies_output: Whether a tied model's output matrix is laid out anew, beside the embedding.

    Raises:
        ConfigError: No such dtype, or ``tp`` ranks cannot share the model.
    """
    _check_tp(model, tp)
    packed = model.packed if weight_dtype == packed_dtype(model) else None
    plain_dtype = _BESIDE_PACKED if packed else weight_dtype
    kinds = weight_kinds(model)
    quantised = format_of("output.weight", plain_dtype) != "plain"
    if model.tie_word_embeddings and (quantised or copies_output):
        kinds = (*kinds, output_kind(model))
    num_bytes = sum(
        kind.count * stored_bytes(kind.name, kind.rank_shape(tp), plain_dtype) for kind in kinds
    )
    return num_bytes - (_packing_saves(model, packed, tp) if packed else 0)


def packed_dtype(model: ModelConfig) -> str | None:
    """Return the weight dtype that means the form of the model's own checkpoint; None: plain."""
    return None if model.packed is None else model.packed.method


def _packing_saves(model: ModelConfig, packed: PackedFormat, tp: int) -> int:
    """Return by how much the packed weights are smaller than plain ones would be."""
    counts = Counter(kind_name(name) for name in packed.names)
    saved = 0
    for kind in weight_kinds(model):
        # A router is unpacked, because it is held in fp32.
        if counts[kind.name] and format_of(kind.name, "int4") != "plain":
            shape = kind.rank_shape(tp)
            plain = stored_bytes(kind.name, shape, _BESIDE_PACKED)
            saved += counts[kind.name] * (plain - packed_bytes(shape, packed))
    return saved


def kv_bytes_per_token(model: ModelConfig, kv_dtype: str, tp: int = 1) -> int:
    """Return the bytes that one token adds to the KV cache of one rank of ``tp``, all layers.

    Raises:
        ConfigError: No such dtype, or ``tp`` ranks cannot share the model.
    """
    _check_tp(model, tp)
    if kv_dtype not in KV_BYTES:
        raise ConfigError(f"kv_dtype={kv_dtype!r}: must be one of {', '.join(KV_BYTES)}")
    return model.kv_values_per_token * KV_BYTES[kv_dtype] // tp


def sharing_problem(model: ModelConfig, tp: int) -> str | None:
    """Return why ``tp`` ranks cannot share the model, with the numbers; None: they can."""
    for name in ("n_heads", "n_kv_heads", "hidden_dim"):
        size = getattr(model, name)
        if tp < 1 or size % tp:
            return f"tp={tp}: {tp} ranks cannot share {name}={size} equally"
    return None


def _check_tp(model: ModelConfig, tp: int) -> None:
    problem = sharing_problem(model, tp)
    if problem is not None:
        raise ConfigError(problem)


def plan_memory(
    model: ModelConfig, machine: Machine, *, weight_dtype: str, kv_dtype: str
) -> MemoryPlan:
    """Return the plan for ``model`` on all devices of ``machine``, whether it fits or not.

    Raises:
        ConfigError: No such dtype, or so many devices cannot share the model.
    """
    tp = machine.num_devices
    return MemoryPlan(
        machine=machine,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        weight_bytes=weight_bytes(model, weight_dtype, tp, copies_output=machine.kind == "cpu"),
        reserve_bytes=_reserve_bytes(model, machine),
        kv_bytes_per_token=kv_bytes_per_token(model, kv_dtype, tp),
    )


def auto_batch_size(plan: MemoryPlan, context: int) -> int:
    """Return the ``max_batch_size`` that the memory allows: what the setting ``auto`` means.

    A typical sequence is taken to fill a quarter of ``context``; when more come together than
    that, the scheduler admits by free KV tokens and preempts, so nothing breaks. At most 256 on
    GPUs, where a step of that many sequences takes at most twice as long as one of eight. At most
    32 on a CPU: from there on its arithmetic is the limit and not its memory, so that more
    sequences only make each other slower. At least 1.
    """
    typical = max(1, context // _TYPICAL_SHARE)
    return max(1, min(_MAX_BATCH[plan.machine.kind], plan.kv_tokens // typical))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """What the settings come to on a machine, wherever they leave it to the plan."""

    max_batch_size: int
    num_blocks: int


def engine_sizes(plan: MemoryPlan, config: EngineConfig, model: ModelConfig) -> EngineSizes:
    """Return the batch and the KV cache that ``config`` means under ``plan``, which fits.

    Raises:
        ConfigError: See `plan_blocks`.
    """
    context = config.context_of(model)
    max_batch_size = config.max_batch_size
    if max_batch_size is None:
        max_batch_size = min(auto_batch_size(plan, context), config.max_step_tokens)
    num_blocks = plan_blocks(
        plan,
        block_size=config.block_size,
        context=context,
        max_batch_size=max_batch_size,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
    )
    return EngineSizes(max_batch_size=max_batch_size, num_blocks=num_blocks)


def plan_blocks(
    plan: MemoryPlan,
    *,
    block_size: int,
    context: int,
    max_batch_size: int,
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
) -> int:
    """Return how many blocks of KV cache each rank makes.

    Without a setting: enough for ``max_batch_size`` sequences of full context, but no more than
    fits. A CPU's memory has other uses, so there it is also at most the largest of 2 GiB, one
    full context, and ``max_batch_size`` sequences that fill a quarter of the context.

    Args:
        plan: One that fits.
        block_size: Tokens of a block.
        context: Most tokens of a sequence.
        max_batch_size: Most sequences at the same time.
        num_blocks: As set; then this many.
        kv_cache_bytes: As set, of one device; then as many as it holds.

    Raises:
        DoesNotFitError: The setting asks for more than fits.
        ConfigError: It holds not even one block.
    """
    block_bytes = block_size * plan.kv_bytes_per_token
    if num_blocks is not None:
        asked = num_blocks * block_bytes
    elif kv_cache_bytes is not None:
        asked = kv_cache_bytes
    else:
        full = max_batch_size * -(-context // block_size) * block_bytes
        asked = min(full, _default_kv_bytes(plan, context, max_batch_size))
    if asked > plan.kv_bytes:
        raise DoesNotFitError(
            f"the KV cache as set does not fit {plan.machine.label} beside the weights",
            needed_bytes=asked,
            available_bytes=plan.kv_bytes,
            nearest=None,
        )
    if asked < block_bytes:
        raise ConfigError(
            f"{asked} bytes of KV cache hold no block, which takes {block_bytes} bytes"
        )
    return asked // block_bytes


def _default_kv_bytes(plan: MemoryPlan, context: int, max_batch_size: int) -> int:
    if plan.machine.kind != "cpu":
        return plan.kv_bytes
    useful_tokens = max(context, max_batch_size * context // _TYPICAL_SHARE)
    return min(plan.kv_bytes, max(_CPU_KV_BYTES, useful_tokens * plan.kv_bytes_per_token))


def _reserve_bytes(model: ModelConfig, machine: Machine) -> int:
    """Return what must stay free of one device's available memory.

    GPU: 6 % and 2 GiB, for activations, graphs and the allocator's waste. CPU: 10 %, because a
    full machine kills the process and the files being read need room too; 0.5 GiB for torch and
    the activations; and twice the largest matrix, which stands beside its packed form for a
    moment.
    """
    if machine.kind == "cuda":
        share, fixed = _CUDA_SHARE, _CUDA_RESERVE_BYTES
    else:
        share, fixed = _CPU_SHARE, _CPU_RESERVE_BYTES + 2 * _largest_bytes(model)
    return machine.available_bytes - int(share * machine.available_bytes) + fixed


def _largest_bytes(model: ModelConfig) -> int:
    """Return the bytes of the largest matrix in bf16; w1 and w3 of an expert are one."""
    return 2 * model.dim * max(model.vocab_size, 2 * model.hidden_dim)
