"""The native CPU back-end: half a layer in one call of the compiled library."""

from collections.abc import Sequence
from typing import Final

from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.ops.door import (
    AttentionBlock,
    Layer,
    MoeBlock,
    OutputBlock,
    RunLayers,
    in_turn,
)
from mixfleet_engine.ops.native.attention import AttentionWorkspace, NativeAttention
from mixfleet_engine.ops.native.library import NativeLibrary
from mixfleet_engine.ops.native.moe import NativeMoe
from mixfleet_engine.ops.native.output import NativeOutput
from mixfleet_engine.rotary import RotaryTable

NAME: Final = "native"


class NativeBackend:
    """Implements :class:`~mixfleet_engine.ops.door.Backend`.

    Bit for bit, a row's result depends on that row and its own context only: on no neighbour, no
    cut of the prompt into chunks and no number of threads.

    Args:
        library: What packs and computes.
        threads: How many compute.
    """

    def __init__(self, library: NativeLibrary, threads: int) -> None:
        self._library = library
        self._threads = threads
        self._workspace = AttentionWorkspace()

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        return NAME

    def attention(self, weights: AttentionWeights, rotary: RotaryTable) -> AttentionBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return NativeAttention(
            weights, self._library, rotary.cos, rotary.sin, self._threads, self._workspace
        )

    def moe(self, weights: MoeWeights) -> MoeBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return NativeMoe(weights, self._library, self._threads, self._workspace.scratch)

    def layers(self, layers: Sequence[Layer]) -> RunLayers:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return in_turn(layers)

    def output(self, weights: OutputWeights) -> OutputBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return NativeOutput(weights, self._library, self._threads, self._workspace.scratch)
