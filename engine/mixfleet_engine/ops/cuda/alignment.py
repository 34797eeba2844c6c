"""Which row goes to which expert, in an order in which every tile of rows has one expert."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The (token, choice) pairs of a step, grouped by expert.

    Shape letters: T tokens, K experts per token, P slots with those that pad.
    """

    sorted_slots: Tensor
    """``[P]`` int32: pairs ``t * K + k``, each expert's in rising order and filled up with
    ``num_pairs`` to whole tiles."""
    tile_experts: Tensor
    """``[P / block_t]`` int32: the expert of each tile; -1: nothing is in it."""
    num_pairs: int
    """``T * K``."""
    top_k: int
    block_t: int
    """Slots of a tile."""
