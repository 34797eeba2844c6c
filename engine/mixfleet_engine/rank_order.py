"""The order in which the parts of a sum are added up: that of the ranks, in fp32.

A ring all-reduce, gloo's or NCCL's, cuts its buffer into as many pieces as there are ranks, and
each piece goes round the ring from another rank on. So the order in which an element is summed up
depends on where in the buffer it stands, that is on how many rows the step has, and a request's
last bits would depend on its neighbours. Here every rank gets all parts and adds them up itself,
always in the same order, however they came.

Shape letters: N ranks, T tokens, D model width.
"""

from collections.abc import Sequence

from torch import Tensor


def summed(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the sum of N parts in fp32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total


def add_parts(x: Tensor, parts: Tensor | Sequence[Tensor]) -> None:
    """Add the sum of N parts to the running sum ``x`` ``[T, D]`` fp32 in place.

    Args:
        x: Contiguous.
        parts: ``[N, T, D]``, or N tensors ``[T, D]``, all contiguous and of one floating dtype.
    """
    if not x.is_cuda:
        x += summed(parts)
        return
    # Imported here: a CPU needs no Triton.
    from mixfleet_engine.ops.cuda.rank_sum import add_gathered, add_spread

    if isinstance(parts, Tensor):
        add_gathered(x, parts)
    else:
        add_spread(x, parts)
