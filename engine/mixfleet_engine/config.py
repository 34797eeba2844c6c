"""What a model is (read from its checkpoint) and how this process runs it (settings).

Torch-free: dtype and device are plain words here, and the numeric files translate them.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from mixfleet_engine.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

Layout = Literal["mistral", "hf"]
Backend = Literal["auto", "reference", "cpu", "native"]
WeightDtype = Literal["auto", "fp8", "int8", "int4"]

_DEFAULT_ROPE_THETA = 1_000_000.0
"""What both layouts mean when the file does not say."""
_DEFAULT_CONTEXT = 32_768
_TRAINED_CONTEXT = {(4096, 32): 32_768, (6144, 56): 65_536}
"""Published ``(dim, n_layers)`` -> context. Mistral's own ``params.json`` leaves it out."""


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
    rope_theta: float = _DEFAULT_ROPE_THETA
    norm_eps: float = 1e-5
    context_length: int = _DEFAULT_CONTEXT
    """Most tokens of prompt and answer together."""
    tie_word_embeddings: bool = False
    """The output matrix is the embedding."""
    shared_experts: bool = False
    """Only expert 0 is stored, and every expert is that one copy."""

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
            return cls(**_from_params_json(_read_json(path / "params.json")))
        return cls(**_from_config_json(_read_json(path / "config.json")))


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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def _required(found: dict[str, Any], name: str, file: str) -> Any:
    value = found.get(name)
    if value is None:
        raise ConfigError(f"{file} lacks {name}")
    return value


def _from_params_json(params: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`ModelConfig` that Mistral's ``params.json`` means."""
    if not isinstance(params.get("moe"), dict):
        raise ConfigError("params.json has no `moe`: a dense model, this engine runs Mixtral only")
    fields = {
        name: _required(params, name, "params.json")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
    }
    moe = params["moe"]
    fields["num_experts"] = _required(moe, "num_experts", "moe in params.json")
    fields["experts_per_token"] = _required(moe, "num_experts_per_tok", "moe in params.json")
    fields["head_dim"] = params.get("head_dim") or fields["dim"] // fields["n_heads"]
    fields["norm_eps"] = params.get("norm_eps") or 1e-5
    fields["rope_theta"] = params.get("rope_theta") or _DEFAULT_ROPE_THETA
    context = params.get("max_seq_len") or _TRAINED_CONTEXT.get((fields["dim"], fields["n_layers"]))
    if context is None:
        logger.warning("params.json states no max_seq_len, taking %d", _DEFAULT_CONTEXT)
    fields["context_length"] = context or _DEFAULT_CONTEXT
    fields["tie_word_embeddings"] = bool(params.get("tied_embeddings", False))
    return fields


def _from_config_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`ModelConfig` that Hugging Face's ``config.json`` means."""
    if config.get("model_type") != "mixtral":
        raise ConfigError(f"config.json: model_type={config.get('model_type')!r}, not 'mixtral'")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act={config['hidden_act']!r}, not 'silu'")
    if config.get("sliding_window") is not None:
        raise ConfigError(
            f"config.json: sliding_window={config['sliding_window']}: only full attention is known"
        )
    fields = {ours: _required(config, theirs, "config.json") for ours, theirs in _HF_NAMES.items()}
    fields["head_dim"] = config.get("head_dim") or fields["dim"] // fields["n_heads"]
    fields["norm_eps"] = config.get("rms_norm_eps") or 1e-5
    fields["rope_theta"] = _hf_rope_theta(config)
    fields["context_length"] = config.get("max_position_embeddings") or _DEFAULT_CONTEXT
    fields["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    fields["shared_experts"] = bool((config.get("mixfleet") or {}).get("shared_experts", False))
    return fields


_HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}


def _hf_rope_theta(config: dict[str, Any]) -> float:
    # transformers 5 moved rope_theta into rope_parameters; older ones have rope_scaling beside it.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"config.json: rope_type={kind!r}: only 'default' is known")
    return float(rope.get("rope_theta") or config.get("rope_theta") or _DEFAULT_ROPE_THETA)


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
    """How the large matrices are stored; auto: like all else, in ``dtype``."""
    backend: Backend = "auto"
    prefix_cache: bool = True
    """Whether requests share the KV cache of equal beginnings."""
    itl_target_s: float = 0.1
    """Longest time between two tokens of a running answer that prefilling another may cause."""
    pipelined: bool | None = None
    """Whether a step is launched before the tokens of the one before are read; None: on one GPU,
    where launching does not wait. Not for several ranks: only the first knows the tokens."""
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
