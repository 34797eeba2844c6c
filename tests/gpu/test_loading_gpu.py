"""Weights read ahead and made on a CUDA device are those made on a CPU, and the KV cache fits."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixfleet_engine.config import EngineConfig, ModelConfig, WeightDtype
from mixfleet_engine.devices import measured_free_bytes
from mixfleet_engine.loading import load_runner
from mixfleet_engine.quantise import dequantise
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import open_checkpoint, weight_shapes
from support.packed_checkpoints import Packing, write_packed_checkpoint
from support.plans import chunk, plan
from support.tiny_model import tiny_config, write_hf_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = torch.device("cuda", 0)
PACKINGS = [Packing(method="awq"), Packing(method="gptq", symmetric=True)]


def matrices(folder: Path, device: torch.device, weight_dtype: WeightDtype) -> dict[str, Tensor]:
    config = ModelConfig.from_checkpoint(folder)
    loader = WeightLoader(
        open_checkpoint(folder, config),
        config,
        dtype=torch.float32,
        device=device,
        weight_dtype=weight_dtype,
    )
    found = {}
    with closing(loader):
        for name in weight_shapes(config):
            if ".experts." in name or ".attention.w" in name:
                weight = loader.matrix(name)
                values = weight if isinstance(weight, Tensor) else weight.values
                assert values.device == device
                found[name] = dequantise(weight, torch.float32).cpu()
    return found


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("weight_dtype", ["auto", "int8"])
def test_packed_weights_are_those_of_a_cpu(
    packing: Packing, weight_dtype: WeightDtype, tmp_path: Path
) -> None:
    write_packed_checkpoint(tmp_path, packing)
    here = matrices(tmp_path, torch.device("cpu"), weight_dtype)
    there = matrices(tmp_path, GPU, weight_dtype)
    assert here.keys() == there.keys()
    for name, expected in here.items():
        torch.testing.assert_close(there[name], expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_the_kv_cache_leaves_the_reserve_free(kv_dtype: str, tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, tiny_config(n_layers=8, context_length=1 << 20))
    config = EngineConfig(
        device="cuda",
        dtype="bfloat16",
        max_batch_size=256,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
    )
    runner = load_runner(folder, config)
    assert len(runner.run(plan(chunk([1, 2, 3], block_table=[runner.num_blocks - 1])))) == 1
    free = measured_free_bytes(GPU)
    assert free is not None
    assert free > 2 << 30
