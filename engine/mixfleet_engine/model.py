"""The Mixtral transformer: a step's tokens in, logits of the rows to sample out.

Under tensor parallelism every rank runs this on its part of the weights: what a block returns is a
partial sum, and the ranks add theirs up once per block.

Shape letters: T tokens in the step, D model width, V vocabulary, R rows to sample.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.batch import Batch
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.ops.door import Backend, Layer, OutputBlock, RunLayers
from mixfleet_engine.ranks import OneRank, Ranks
from mixfleet_engine.rotary import RotaryTable
from mixfleet_engine.sharding import part_of
from mixfleet_engine.weight_loader import WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralModel:
    """One rank's weights of one model. It holds no state of any sequence."""

    config: ModelConfig
    """Sizes of the whole model."""
    embedding: Tensor
    """``[V, D]``, or the rank's part of the V tokens."""
    layers: tuple[Layer, ...]
    run_layers: RunLayers
    """All of them, where nobody else holds a part of the model."""
    output: OutputBlock
    ranks: Ranks

    @classmethod
    def load(
        cls,
        loader: WeightLoader,
        config: ModelConfig,
        backend: Backend,
        context_length: int,
        ranks: Ranks | None = None,
    ) -> Self:
        """Read all weights, one tensor after the other.

        Args:
            loader: Where from.
            config: Sizes of the model.
            backend: What runs it.
            context_length: Positions that sequences may reach.
            ranks: Who else holds a part of the model; None: nobody.

        Raises:
            ConfigError: So many ranks cannot share the model.
        """
        rotary = RotaryTable(
            head_dim=config.head_dim,
            context_length=context_length,
            theta=config.rope_theta,
            device=loader.device,
        )

        def load_layer(number: int) -> Layer:
            # The raw weights end with this call; only what the back-end made of them stays.
            attention = AttentionWeights.load(loader, number, config)
            return Layer(
                attention=backend.attention(attention, rotary),
                moe=backend.moe(MoeWeights.load(loader, number, config)),
            )

        embedding = loader.tensor("tok_embeddings.weight")
        layers = tuple(load_layer(number) for number in range(config.n_layers))
        return cls(
            config=config,
            embedding=embedding,
            layers=layers,
            run_layers=backend.layers(layers),
            output=backend.output(OutputWeights.load(loader, config, embedding)),
            ranks=ranks or OneRank(),
        )

    def forward(self, batch: Batch, cache: KvCache) -> Tensor:
        """Return the logits ``[R, V]`` in fp32 of the batch's ``sample_rows``.

        On other ranks than the first ``[0, V]``. The keys and values of all T tokens are in
        ``cache`` afterwards.
        """
        # The running sum stays fp32: rounded at each of its many additions, it would be the main
        # error of a bf16 model.
        x = self._embed(batch.token_ids)
        if self.ranks.shard.world == 1:
            self.run_layers(x, batch, cache)
        else:
            for layer in self.layers:
                self.ranks.add_sum(x, layer.attention(x, batch, cache))
                self.ranks.add_sum(x, layer.moe(x))
        if len(batch.sample_rows) == 0:  # in the middle of a long prompt
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        # The vocabulary is wide: only the rows that are sampled pay for it.
        logits = self.output(x[batch.sample_rows])
        return self.ranks.gather_columns(logits, self.config.vocab_size)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Return ``[T, D]`` fp32."""
        if self.ranks.shard.world == 1:
            return F.embedding(token_ids, self.embedding).float()
        places = token_ids - part_of(self.config.vocab_size, self.ranks.shard).start
        is_own = (places >= 0) & (places < len(self.embedding))
        found = F.embedding(places.where(is_own, 0), self.embedding)
        # One rank has the token's row and the others add zeros, which is exact.
        return self.ranks.sum(found * is_own[:, None]).float()
