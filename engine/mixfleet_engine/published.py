"""Sizes of the published Mixtral models, so that questions about them need no file."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mixfleet_engine.config import ModelConfig

PUBLISHED: Final[Mapping[str, ModelConfig]] = MappingProxyType(
    {
        "mixtral-8x7b": ModelConfig(
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            hidden_dim=14_336,
            vocab_size=32_000,
            num_experts=8,
            experts_per_token=2,
            context_length=32_768,
        ),
        # The instruct model's; the base model has 32,000 words, 0.02 GiB less.
        "mixtral-8x22b": ModelConfig(
            dim=6144,
            n_layers=56,
            n_heads=48,
            n_kv_heads=8,
            head_dim=128,
            hidden_dim=16_384,
            vocab_size=32_768,
            num_experts=8,
            experts_per_token=2,
            context_length=65_536,
        ),
    }
)
"""Name -> sizes, as in Mistral's ``params.json``."""


def published_name(name: str) -> str | None:
    """Return the full name of the published model that ``name`` means: ``8x7b``, ``Mixtral-8x7B``.

    None if it means none of them.
    """
    full = name.lower() if name.lower().startswith("mixtral-") else f"mixtral-{name.lower()}"
    return full if full in PUBLISHED else None
