"""Which back-end runs a model here: the setting ``backend`` on this device, in this dtype."""

import logging

import torch

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import ConfigError, NativeUnavailableError
from mixfleet_engine.ops.cpu import CpuOps
from mixfleet_engine.ops.door import Backend
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.ops.torch_backend import TorchBackend

logger = logging.getLogger(__name__)


def choose_backend(
    config: EngineConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> Backend:
    """Return the back-end that ``config`` means.

    ``auto`` on a CPU is the native one where it runs, and on a GPU the one of Triton kernels, else
    plain torch; the log says why.

    Raises:
        ConfigError: What was asked for by name does not run here.
    """
    name = config.backend
    if name in ("cpu", "native") and device.type != "cpu":
        raise ConfigError(f"backend={name!r}: does not run on device={str(device)!r}")
    if name == "reference":
        return TorchBackend(ReferenceOps())
    if name == "cuda" or device.type != "cpu":
        return _cuda_or_plain(config, model, dtype, device)
    if name == "cpu":
        return TorchBackend(CpuOps(dtype))
    try:
        return _native(config, model, dtype, threads)
    except NativeUnavailableError as error:
        if name == "native":
            raise ConfigError(f"backend='native': {error}") from error
        logger.info("plain torch computes, for the native back-end is not available: %s", error)
        return TorchBackend(CpuOps(dtype))


def _cuda_or_plain(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Backend:
    try:
        return _cuda(config, model, dtype, device)
    except (ConfigError, ImportError) as error:
        if config.backend == "cuda":
            raise ConfigError(f"backend='cuda': {error}") from error
        logger.warning("plain torch computes, which is slow on a GPU: %s", error)
        return TorchBackend(ReferenceOps())


def _cuda(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Backend:
    # Imported here: other back-ends need no Triton, and importing it decides how kernels run.
    from mixfleet_engine.ops.cuda.backend import CudaBackend, check_runs

    with_fp8 = "fp8" in (config.weight_dtype, config.kv_dtype)
    check_runs(device, dtype, head_dim=model.head_dim, with_fp8=with_fp8)
    return CudaBackend(
        dtype, device, batch_invariant=config.batch_invariant, tuning_s=config.tuning_s
    )


def _native(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, threads: int) -> Backend:
    # Imported here: other back-ends need no compiler.
    from mixfleet_engine.ops.native.attention import check_cache, check_head_dim
    from mixfleet_engine.ops.native.backend import NativeBackend
    from mixfleet_engine.ops.native.library import load_native

    check_head_dim(model.head_dim)
    check_cache(dtype, config.block_size)
    if config.kv_dtype == "fp8":
        raise NativeUnavailableError("kv_dtype='fp8': its KV cache is bf16")
    if config.weight_dtype == "fp8":
        raise NativeUnavailableError("weight_dtype='fp8': it takes bf16, int8 and int4")
    if config.weight_dtype == "auto" and model.packed is not None and model.packed.has_zeros:
        raise NativeUnavailableError(
            "int4 weights with zero points, as this checkpoint has: it takes symmetric ones; "
            "weight_dtype=int8 converts them"
        )
    return NativeBackend(load_native(), threads)
