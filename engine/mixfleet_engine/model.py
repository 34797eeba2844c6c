"""The Mixtral transformer: a step's tokens in, logits of the rows to sample out.

Shape letters: T tokens in the step, D model width, V vocabulary, R rows to sample.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.attention import Attention
from mixfleet_engine.batch import Batch
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.moe import MoeLayer
from mixfleet_engine.ops.door import Linear, Ops
from mixfleet_engine.rotary import RotaryTable
from mixfleet_engine.weights import WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One transformer layer: attention, then experts, each after its own norm."""

    attention_norm: Tensor
    attention: Attention
    ffn_norm: Tensor
    moe: MoeLayer

    @classmethod
    def load(cls, loader: WeightLoader, number: int, config: ModelConfig, ops: Ops) -> Self:
        """Read the weights of layer ``number``."""
        return cls(
            attention_norm=loader.tensor(f"layers.{number}.attention_norm.weight"),
            attention=Attention.load(loader, number, config, ops),
            ffn_norm=loader.tensor(f"layers.{number}.ffn_norm.weight"),
            moe=MoeLayer.load(loader, number, config, ops),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralModel:
    """All weights of one model. It holds no state of any sequence."""

    config: ModelConfig
    embedding: Tensor
    """``[V, D]``."""
    layers: tuple[Layer, ...]
    norm: Tensor
    output: Linear
    """``[R, D] -> [R, V]``."""
    rotary: RotaryTable
    ops: Ops

    @classmethod
    def load(cls, loader: WeightLoader, config: ModelConfig, ops: Ops, context_length: int) -> Self:
        """Read all weights, one tensor after the other.

        Args:
            loader: Where from.
            config: Sizes of the model.
            ops: The back-end that runs it.
            context_length: Positions that sequences may reach.
        """
        embedding = loader.tensor("tok_embeddings.weight")
        tied = config.tie_word_embeddings
        return cls(
            config=config,
            embedding=embedding,
            layers=tuple(Layer.load(loader, n, config, ops) for n in range(config.n_layers)),
            norm=loader.tensor("norm.weight"),
            output=ops.linear(embedding if tied else loader.tensor("output.weight")),
            rotary=RotaryTable(
                head_dim=config.head_dim,
                context_length=context_length,
                theta=config.rope_theta,
                device=loader.device,
            ),
            ops=ops,
        )

    def forward(self, batch: Batch, cache: KvCache) -> Tensor:
        """Return the logits ``[R, V]`` in fp32 of the batch's ``sample_rows``.

        The keys and values of all T tokens are in ``cache`` afterwards.
        """
        eps = self.config.norm_eps
        # The running sum stays fp32: rounded at each of its many additions, it would be the main
        # error of a bf16 model.
        x = F.embedding(batch.token_ids, self.embedding).float()  # [T, D]
        rotary = self.rotary.at(batch.positions)
        for layer in self.layers:
            normed = self.ops.rms_norm(x, layer.attention_norm, eps)
            x = x + layer.attention(normed, rotary, batch, cache)
            x = x + layer.moe(self.ops.rms_norm(x, layer.ffn_norm, eps))
        if len(batch.sample_rows) == 0:  # in the middle of a long prompt
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        # The vocabulary is wide: only the rows that are sampled pay for it.
        last = self.ops.rms_norm(x[batch.sample_rows], self.norm, eps)  # [R, D]
        return self.output(last).float()
