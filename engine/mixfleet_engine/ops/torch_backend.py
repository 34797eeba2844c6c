"""A back-end of plain torch: the blocks of the model with somebody's operations."""

from collections.abc import Sequence

from mixfleet_engine.attention import Attention
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.moe import MoeLayer
from mixfleet_engine.ops.door import (
    AttentionBlock,
    Layer,
    MoeBlock,
    Ops,
    OutputBlock,
    RunLayers,
    in_turn,
)
from mixfleet_engine.output import OutputLayer
from mixfleet_engine.rotary import RotaryTable


class TorchBackend:
    """Implements :class:`~mixfleet_engine.ops.door.Backend`."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        return self._ops.name

    def attention(self, weights: AttentionWeights, rotary: RotaryTable) -> AttentionBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return Attention.make(weights, rotary, self._ops)

    def moe(self, weights: MoeWeights) -> MoeBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return MoeLayer.make(weights, self._ops)

    def layers(self, layers: Sequence[Layer]) -> RunLayers:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return in_turn(layers)

    def output(self, weights: OutputWeights) -> OutputBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return OutputLayer.make(weights, self._ops)
