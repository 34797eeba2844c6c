"""The weights of the model's parts, as read from a checkpoint: what a back-end makes blocks of.

All sizes are this rank's own: what its part of the weights has.

Shape letters: D model width, H query heads, G KV heads, A head dimension, F expert width,
E experts, V vocabulary.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.quantise import Weight
from mixfleet_engine.sharding import share_of
from mixfleet_engine.weight_loader import WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """The attention half of layer ``layer``."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm: Tensor
    """``[D]`` weight of the RMS norm in front."""
    norm_eps: float
    wqkv: Weight
    """``[(H + 2G) * A, D]``: queries, then keys, then values."""
    wo: Weight
    """``[D, H * A]``."""

    @classmethod
    def load(cls, loader: WeightLoader, layer: int, config: ModelConfig) -> Self:
        """Read the rank's weights of one layer of the whole model ``config``."""
        name = f"layers.{layer}.attention"
        own = share_of(config, loader.shard)
        return cls(
            layer=layer,
            n_heads=own.n_heads,
            n_kv_heads=own.n_kv_heads,
            head_dim=config.head_dim,
            norm=loader.tensor(f"layers.{layer}.attention_norm.weight"),
            norm_eps=config.norm_eps,
            wqkv=loader.matrix(*(f"{name}.{part}.weight" for part in ("wq", "wk", "wv"))),
            wo=loader.matrix(f"{name}.wo.weight"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One SwiGLU feed-forward network."""

    w13: Weight
    """``[2F, D]``: the gate, then what it gates."""
    w2: Weight
    """``[D, F]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """The experts' half of a layer."""

    norm: Tensor
    """``[D]`` weight of the RMS norm in front."""
    norm_eps: float
    gate: Tensor
    """``[E, D]`` fp32: the choice of experts should not hang on the rounding of its scores."""
    experts: tuple[ExpertWeights, ...]
    """E of them; shared experts are E times the same object."""
    experts_per_token: int

    @classmethod
    def load(cls, loader: WeightLoader, layer: int, config: ModelConfig) -> Self:
        """Read the rank's weights of one layer of the whole model ``config``."""
        name = f"layers.{layer}.feed_forward"

        def load_expert(number: int) -> ExpertWeights:
            prefix = f"{name}.experts.{number}"
            return ExpertWeights(
                w13=loader.matrix(f"{prefix}.w1.weight", f"{prefix}.w3.weight"),
                w2=loader.matrix(f"{prefix}.w2.weight"),
            )

        if config.shared_experts:
            experts = (load_expert(0),) * config.num_experts
        else:
            experts = tuple(load_expert(number) for number in range(config.num_experts))
        return cls(
            norm=loader.tensor(f"layers.{layer}.ffn_norm.weight"),
            norm_eps=config.norm_eps,
            gate=loader.tensor(f"{name}.gate.weight", torch.float32),
            experts=experts,
            experts_per_token=config.experts_per_token,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputWeights:
    """The last norm and the output matrix."""

    norm: Tensor
    """``[D]``."""
    norm_eps: float
    weight: Weight
    """``[V, D]``."""

    @classmethod
    def load(cls, loader: WeightLoader, config: ModelConfig, embedding: Tensor) -> Self:
        """Read the rank's part; tied weights have ``embedding`` as their output matrix."""
        tied = config.tie_word_embeddings
        return cls(
            norm=loader.tensor("norm.weight"),
            norm_eps=config.norm_eps,
            weight=loader.stored("output.weight", embedding)
            if tied
            else loader.matrix("output.weight"),
        )
