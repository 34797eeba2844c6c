"""How a model's makers want its tokens chosen when a request does not say."""

from dataclasses import dataclass
from pathlib import Path

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.tokenizer_settings import read_json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What counts where a request leaves a setting open; ours where the model has no opinion."""

    temperature: float = 0.7
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0


def sampling_defaults(checkpoint: Path) -> SamplingDefaults:
    """Return what ``generation_config.json`` in ``checkpoint`` says, ours where it says nothing.

    Raises:
        CheckpointError: The file is broken or a value in it is out of range.
    """
    path = checkpoint / "generation_config.json"
    found = read_json_object(path)
    ours = SamplingDefaults()
    top_k = found.get("top_k", ours.top_k)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise CheckpointError(f"{path}: top_k={top_k!r}: must be a whole number, 0 or more")
    return SamplingDefaults(
        temperature=_number(path, "temperature", found.get("temperature", ours.temperature), 2.0),
        top_k=top_k,
        top_p=_number(path, "top_p", found.get("top_p", ours.top_p), 1.0) or ours.top_p,
    )


def _number(path: Path, name: str, value: object, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise CheckpointError(f"{path}: {name}={value!r}: must be a number from 0 to {high:g}")
    return float(value)
