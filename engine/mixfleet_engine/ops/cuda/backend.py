"""The CUDA back-end: a layer is a dozen launches of Triton kernels."""

from collections.abc import Sequence
from typing import Final, cast

import torch

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.ops.cuda.attention import check_head_dim
from mixfleet_engine.ops.cuda.blocks import CudaAttention, CudaMoe, CudaOutput, run_layers
from mixfleet_engine.ops.cuda.chunks import ChunkPlacer
from mixfleet_engine.ops.cuda.dialect import INTERPRETED
from mixfleet_engine.ops.cuda.products import Products
from mixfleet_engine.ops.cuda.tuning import Tuner
from mixfleet_engine.ops.door import AttentionBlock, Layer, MoeBlock, OutputBlock, RunLayers
from mixfleet_engine.rotary import RotaryTable

NAME: Final = "cuda"
_LEAST_CAPABILITY: Final = (8, 0)
_FP8_CAPABILITY: Final = (8, 9)
_INTERPRETED_SHARED_BYTES: Final = 227 << 10


class CudaBackend:
    """Implements :class:`~mixfleet_engine.ops.door.Backend`.

    With ``batch_invariant`` a row's result depends, bit for bit, on that row and its own context
    only.

    Args:
        dtype: What is computed in.
        device: A GPU; the CPU where kernels are interpreted.
        batch_invariant: Whether to pass by the ways that are faster for few tokens only.
        tuning_s: Seconds that may be spent on the choice of tiles; what was chosen before is read.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = True,
        tuning_s: float = 0.0,
    ) -> None:
        self.products = Products(
            dtype=dtype,
            tuner=_tuner(device, tuning_s),
            shared_bytes=_shared_bytes(device),
            batch_invariant=batch_invariant,
        )
        self._placer = ChunkPlacer()

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        return NAME

    def attention(self, weights: AttentionWeights, rotary: RotaryTable) -> AttentionBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return CudaAttention(weights, rotary, self.products, self._placer)

    def moe(self, weights: MoeWeights) -> MoeBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return CudaMoe(weights, self.products)

    def layers(self, layers: Sequence[Layer]) -> RunLayers:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return run_layers(
            [(cast("CudaAttention", one.attention), cast("CudaMoe", one.moe)) for one in layers]
        )

    def output(self, weights: OutputWeights) -> OutputBlock:
        """See :class:`~mixfleet_engine.ops.door.Backend`."""
        return CudaOutput(weights, self.products)


def check_runs(device: torch.device, dtype: torch.dtype, *, head_dim: int, with_fp8: bool) -> None:
    """Raise ConfigError if the back-end does not run a model on this device.

    Args:
        device: Where.
        dtype: What would be computed in.
        head_dim: The model's.
        with_fp8: Whether weights or KV cache are in fp8.
    """
    check_head_dim(head_dim)
    if INTERPRETED.value:
        if device.type != "cpu":
            raise ConfigError("TRITON_INTERPRET=1 is set, so kernels run on the CPU only")
        return
    if device.type != "cuda":
        raise ConfigError(
            f"it does not run on device={str(device)!r} (TRITON_INTERPRET=1 has a CPU interpret "
            "its kernels, slowly)"
        )
    if dtype == torch.float32:
        raise ConfigError("dtype='float32': its kernels multiply in bf16 or fp16")
    capability = torch.cuda.get_device_capability(device)
    needed = _FP8_CAPABILITY if with_fp8 else _LEAST_CAPABILITY
    if capability < needed:
        raise ConfigError(
            f"compute capability {capability[0]}.{capability[1]}: "
            f"{'fp8 needs' if with_fp8 else 'it needs'} {needed[0]}.{needed[1]}"
            + ("; use weight_dtype=int8 and kv_dtype=auto" if with_fp8 else "")
        )


def _tuner(device: torch.device, tuning_s: float) -> Tuner:
    if device.type != "cuda":
        return Tuner(None, lambda _launch: 0.0, enabled=False, capturing=lambda: False)
    return Tuner.of_device(device, budget_s=tuning_s)


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SHARED_BYTES
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 99 << 10))
