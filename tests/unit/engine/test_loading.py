import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixfleet_engine import loading
from mixfleet_engine.config import EngineConfig, Shard
from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.loading import load_engine, resolve_device, resolve_dtype
from mixfleet_engine.ranks import OneRank
from mixfleet_engine.request import GenerateRequest
from support.tiny_model import tiny_config, write_hf_checkpoint, write_mistral_checkpoint

CPU = torch.device("cpu")
SMALL = tiny_config(n_layers=1, vocab_size=128, context_length=64)
CONFIG = EngineConfig(dtype="float32", device="cpu", num_blocks=16, block_size=4)


def test_a_loaded_engine_answers(tmp_path: Path) -> None:
    engine = load_engine(write_mistral_checkpoint(tmp_path, SMALL), CONFIG)
    engine.submit(GenerateRequest(request_id="a", prompt_token_ids=(5, 6, 7), max_tokens=4))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert sum(len(output.token_ids) for output in outputs) == 4
    assert outputs[-1].finish_reason == "length"
    assert engine.free_tokens == 64


def test_the_engines_context_is_the_setting_or_the_models(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    assert load_engine(folder, CONFIG).context_length == 64
    shorter = EngineConfig(dtype="float32", device="cpu", num_blocks=16, context_length=20)
    assert load_engine(folder, shorter).context_length == 20


@pytest.mark.parametrize(("setting", "ahead"), [(None, False), (False, False), (True, True)])
def test_an_engine_on_a_cpu_is_pipelined_only_if_told_to(
    tmp_path: Path, setting: bool | None, *, ahead: bool
) -> None:
    engine = load_engine(write_hf_checkpoint(tmp_path, SMALL), replace(CONFIG, pipelined=setting))
    engine.submit(GenerateRequest(request_id="a", prompt_token_ids=(5, 6, 7), max_tokens=9))
    engine.step()
    assert engine.abort("a")
    assert engine.has_work == ahead, "a second step runs"


class TwoRanks(OneRank):
    """The first of two."""

    shard = Shard(rank=0, world=2)


def test_several_ranks_cannot_be_pipelined(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="pipelined=True: not with 2 ranks"):
        load_engine(folder, replace(CONFIG, pipelined=True), ranks=TwoRanks())


@pytest.mark.parametrize(("world", "pipelined"), [(1, True), (2, False)])
def test_an_engine_on_one_gpu_is_pipelined(
    monkeypatch: pytest.MonkeyPatch, world: int, *, pipelined: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading._is_pipelined(EngineConfig(), world) == pipelined


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = write_hf_checkpoint(tmp_path, SMALL)
    load_engine(folder, CONFIG, lambda done, total: calls.append((done, total)))
    assert len(calls) > 10
    assert calls[-1][0] == calls[-1][1]


def test_what_was_loaded_is_logged_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mixfleet_engine.loading")
    load_engine(write_hf_checkpoint(tmp_path, SMALL), CONFIG)
    (message,) = (r.getMessage() for r in caplog.records if r.name == "mixfleet_engine.loading")
    assert "backend=cpu dtype=torch.float32 weight_dtype=auto device=cpu" in message
    assert message.endswith("num_blocks=16 block_size=4")


def test_threads_are_set_when_asked_for(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    folder = write_hf_checkpoint(tmp_path, SMALL)
    try:
        load_engine(folder, EngineConfig(dtype="float32", device="cpu", num_blocks=4, threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("torchs_own", "num_cores", "expected"), [(3, 3, 2), (1, 3, 1), (1, 1, 1)])
def test_without_a_setting_one_core_is_left_to_others(
    torchs_own: int,
    num_cores: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    try:
        torch.set_num_threads(torchs_own)
        load_engine(write_hf_checkpoint(tmp_path, SMALL), CONFIG)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_broken_setting_is_found_before_the_weights_are_opened(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="context_length=65"):
        load_engine(folder, EngineConfig(context_length=65))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_engine(folder, CONFIG)


def test_auto_device_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda:99", "cuda:x"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        resolve_device(name)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_bf16_where_the_cpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "bfloat16_is_fast", lambda: fast)
    assert resolve_dtype("auto", CPU) == dtype
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_dtypes_are_taken_by_name_but_never_fp16_on_a_cpu() -> None:
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(ConfigError, match="float16"):
        resolve_dtype("float16", CPU)


def test_a_cache_smaller_than_the_context_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    load_engine(folder, EngineConfig(dtype="float32", device="cpu", num_blocks=3))
    assert "the KV cache holds 48 tokens, so no request can use the context of 64" in caplog.text
    caplog.clear()
    load_engine(folder, CONFIG)
    assert "KV cache" not in caplog.text
