"""The fields of a model's sizes out of ``params.json`` or ``config.json``.

Torch-free.
"""

import json
import logging
from pathlib import Path
from typing import Any, Final

from mixfleet_engine.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

DEFAULT_ROPE_THETA: Final = 1_000_000.0
"""What both layouts mean when the file does not say."""
DEFAULT_CONTEXT: Final = 32_768
_TRAINED_CONTEXT: Final = {(4096, 32): 32_768, (6144, 56): 65_536}
"""Published ``(dim, n_layers)`` -> context. Mistral's own ``params.json`` leaves it out."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that the file holds.

    Raises:
        CheckpointError: It cannot be read, or is no JSON object.
    """
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


def params_fields(params: dict[str, Any]) -> dict[str, Any]:
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
    fields["rope_theta"] = params.get("rope_theta") or DEFAULT_ROPE_THETA
    context = params.get("max_seq_len") or _TRAINED_CONTEXT.get((fields["dim"], fields["n_layers"]))
    if context is None:
        logger.warning("params.json states no max_seq_len, taking %d", DEFAULT_CONTEXT)
    fields["context_length"] = context or DEFAULT_CONTEXT
    fields["tie_word_embeddings"] = bool(params.get("tied_embeddings", False))
    return fields


def config_fields(config: dict[str, Any]) -> dict[str, Any]:
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
    fields["context_length"] = config.get("max_position_embeddings") or DEFAULT_CONTEXT
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
    return float(rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA)
