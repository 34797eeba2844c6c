import logging
from typing import Any

import pytest
import torch

from mixfleet_engine import backend_choice
from mixfleet_engine.config import Backend, EngineConfig
from mixfleet_engine.errors import ConfigError, NativeUnavailableError
from mixfleet_engine.ops.native import library
from support.tiny_model import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = tiny_config()


def chosen(
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **settings: Any,
) -> str:
    config = EngineConfig(backend=backend, **settings)
    return backend_choice.choose_backend(config, MODEL, dtype=dtype, device=device, threads=1).name


def test_the_back_end_is_the_one_that_was_asked_for() -> None:
    assert chosen("cpu") == "cpu"
    assert chosen("reference") == "reference"
    assert chosen("auto", torch.bfloat16, CUDA) == "reference"


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_a_cpu_back_end_does_not_run_on_a_gpu(backend: Backend) -> None:
    with pytest.raises(ConfigError, match=f"backend='{backend}': does not run on device='cuda'"):
        chosen(backend, torch.bfloat16, CUDA)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NativeUnavailableError("no compiler: no cc here")

    monkeypatch.setattr(library, "load_native", fail)


@pytest.mark.usefixtures("no_compiler")
def test_auto_falls_back_to_plain_torch_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen("auto", torch.bfloat16) == "cpu"
    assert "no compiler: no cc here" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_native_by_name_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="backend='native': no compiler: no cc here"):
        chosen("native", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "settings", "reason"),
    [
        (torch.float32, {}, "KV cache in torch.float32"),
        (torch.bfloat16, {"block_size": 8}, "block_size=8"),
        (torch.bfloat16, {"weight_dtype": "fp8"}, "weight_dtype='fp8'"),
        (torch.bfloat16, {"kv_dtype": "fp8"}, "kv_dtype='fp8'"),
    ],
)
def test_native_refuses_what_it_does_not_compute_and_auto_takes_torch(
    dtype: torch.dtype, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        chosen("native", dtype, **settings)
    assert chosen("auto", dtype, **settings) == "cpu"
