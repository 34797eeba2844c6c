"""Where kernels run in tests, and how near they must come to the plain computation."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A GPU where there is one; else the CPU, where Triton's interpreter runs them."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers, the same ones on every device."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def randint(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Return random whole numbers from ``low`` to below ``high``, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE)


def off(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected number.

    The bound on it does not depend on the size of a sum, as one on plain differences would.
    """
    assert found.shape == expected.shape, (found.shape, expected.shape)
    wide, wanted = found.double(), expected.double()
    assert torch.isfinite(wide).all()
    scale = wanted.abs().max().item()
    return (wide - wanted).abs().max().item() / max(scale, 1e-30)
