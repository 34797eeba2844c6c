"""What a model is (read from its checkpoint) and how this process runs it (settings).

Torch-free: dtype and device are plain words here, and the numeric files translate them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from mixfleet_engine.checkpoint_config import (
    DEFAULT_CONTEXT,
    DEFAULT_ROPE_THETA,
    config_fields,
    params_fields,
    read_json,
)
from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.packed_format import PackedFormat, packed_format

Layout = Literal["mistral", "hf"]
Backend = Literal["auto", "reference", "cpu", "native"]
WeightDtype = Literal["auto", "fp8", "int8", "int4"]
KvDtype = Literal["auto", "fp8"]


def checkpoint_layout(path: Path) -> Layout:
    """Return which of the two published layouts the folder has.

    A folder with both (full Hub snapshots have) counts as ``hf``: its weights are split into
    files that can be mapped one at a time.

    Raises:
        CheckpointError: It has neither.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors*")):
        return "hf"
    if (path / "params.json").is_file():
        return "mistral"
    if (path / "config.json").is_file():
        return "hf"
    raise CheckpointError(f"{path}: neither params.json nor config.json in it")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one Mixtral model; names as in Mistral's ``params.json``."""

    dim: int
    """Model width."""
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    """Width of one expert."""
    vocab_size: int
    num_experts: int
    experts_per_token: int
    rope_theta: float = DEFAULT_ROPE_THETA
    norm_eps: float = 1e-5
    context_length: int = DEFAULT_CONTEXT
    """Most tokens of prompt and answer together."""
    tie_word_embeddings: bool = False
    """The output matrix is the embedding."""
    shared_experts: bool = False
    """Only expert 0 is stored, and every expert is that one copy."""
    packed: PackedFormat | None = None
    """How AWQ or GPTQ packed the matrices of this checkpoint; None: they are plain."""

    def __post_init__(self) -> None:
        for name in _POSITIVE_SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be a whole number, at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads}: no multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: rotary embeddings need an even number")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token}: more than "
                f"num_experts={self.num_experts}"
            )

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache, all layers together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @classmethod
    def from_checkpoint(cls, path: Path) -> Self:
        """Read ``params.json`` or ``config.json`` of the checkpoint folder ``path``.

        Raises:
            CheckpointError: The file is missing or cannot be read.
            ConfigError: It describes a model that this engine does not run.
        """
        if checkpoint_layout(path) == "mistral":
            return cls(**params_fields(read_json(path / "params.json")))
        found = read_json(path / "config.json")
        fields = config_fields(found)
        return cls(**fields, packed=packed_format(found, path))


_POSITIVE_SIZES = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "num_experts",
    "experts_per_token",
    "context_length",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one process runs a model."""

    block_size: int = 16
    """Tokens of one sequence that share a block of KV cache."""
    num_blocks: int | None = None
    """KV cache in blocks; None: as ``kv_cache_bytes`` says."""
    kv_cache_bytes: int | None = None
    """KV cache of one device in bytes; None: what a full batch needs, see ``plan_blocks``."""
    max_batch_size: int | None = 8
    """Most sequences in one step; None: what the memory plan says."""
    max_step_tokens: int = 512
    """Most tokens in one step; a longer prompt is prefilled in chunks."""
    context_length: int | None = None
    """Shorter limit than the model's own; None: the model's."""
    dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16`` or ``float16``; auto: what the device computes fast."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; auto: cuda where there is one."""
    weight_dtype: WeightDtype = "auto"
    """How the large matrices are stored; auto: as in an AWQ or GPTQ checkpoint, else ``dtype``."""
    kv_dtype: KvDtype = "auto"
    """How keys and values are stored; auto: in ``dtype``. fp8 takes half of bf16, see KvCache."""
    backend: Backend = "auto"
    prefix_cache: bool = True
    """Whether requests share the KV cache of equal beginnings."""
    itl_target_s: float = 0.1
    """Longest time between two tokens of a running answer that prefilling another may cause."""
    pipelined: bool | None = None
    """Whether a step is launched before the tokens of the one before are read; None: on one GPU,
    where launching does not wait. Not for several ranks: only the first knows the tokens."""
    symmetric_memory: bool = False
    """Experimental: up to 8 GPUs of one machine sum up decode steps in memory that they share, in
    place of NCCL; where they cannot, a warning says why. torch calls its interface alpha."""
    threads: int | None = None
    """CPU threads; None: torch's own default, less one core for what runs beside the engine."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_step_tokens"):
            _check_at_least_one(name, getattr(self, name))
        for name in (*_OPTIONAL_COUNTS, "max_batch_size"):
            if getattr(self, name) is not None:
                _check_at_least_one(name, getattr(self, name))
        _check_threads(self.threads)
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ConfigError(
                f"num_blocks={self.num_blocks} and kv_cache_bytes={self.kv_cache_bytes}: set one"
            )
        if self.max_batch_size is not None and self.max_step_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens}: less than "
                f"max_batch_size={self.max_batch_size}, so a full batch could not step"
            )
        _check_word("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_word("backend", self.backend, get_args(Backend))
        _check_word("weight_dtype", self.weight_dtype, get_args(WeightDtype))
        _check_word("kv_dtype", self.kv_dtype, get_args(KvDtype))
        if not 0 < self.itl_target_s < math.inf:
            raise ConfigError(f"itl_target_s={self.itl_target_s}: must be above 0, and finite")
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: must be auto, cpu, cuda or cuda:N")

    def context_of(self, model: ModelConfig) -> int:
        """Return the context length in force for ``model``.

        Raises:
            ConfigError: The setting asks for more than the model has.
        """
        if self.context_length is None:
            return model.context_length
        if self.context_length > model.context_length:
            raise ConfigError(
                f"context_length={self.context_length}: the model has {model.context_length}"
            )
        return self.context_length


_MOST_THREADS = 1024
"""Systems refuse far more with less clear words, or none."""
_OPTIONAL_COUNTS = ("num_blocks", "kv_cache_bytes", "context_length", "threads")


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value}: must be at least 1")


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads > _MOST_THREADS:
        raise ConfigError(f"threads={threads}: must be at most {_MOST_THREADS}")


def _check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(words)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which slice of the weights this process holds."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ConfigError(f"world={self.world}: must be at least 1")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank={self.rank}: must be 0 to {self.world - 1}")
