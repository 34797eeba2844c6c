import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from mixfleet_engine import loading
from mixfleet_engine.config import EngineConfig, Shard
from mixfleet_engine.errors import CheckpointError, ConfigError, DoesNotFitError
from mixfleet_engine.loading import (
    load_engine,
    load_runner,
    make_engine,
    resolve_device,
    resolve_dtype,
)
from mixfleet_engine.plan import kv_bytes_per_token, plan_memory
from mixfleet_engine.ranks import OneRank
from mixfleet_engine.request import GenerateRequest
from support.memory_machines import machine
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


@pytest.mark.parametrize(
    ("waits", "ranks", "ahead"),
    [(False, None, True), (True, None, False), (False, TwoRanks(), False)],
)
def test_an_engine_is_pipelined_where_one_rank_launches_without_waiting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: bool,
    ranks: OneRank | None,
    ahead: bool,
) -> None:
    runner = load_runner(write_hf_checkpoint(tmp_path, SMALL), CONFIG)
    monkeypatch.setattr(type(runner), "waits", waits)
    engine = make_engine(runner, SMALL, CONFIG, 2, ranks=ranks)
    engine.submit(GenerateRequest(request_id="a", prompt_token_ids=(5, 6, 7), max_tokens=9))
    engine.step()
    assert engine.abort("a")
    assert engine.has_work == ahead, "a second step runs"


class SharingRanks(OneRank):
    """Notes for what memory is to be shared."""

    def __init__(self) -> None:
        self.shared: list[tuple[int, int, torch.dtype]] = []

    def share_memory(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        self.shared.append((num_rows, width, dtype))


@pytest.mark.parametrize(("asked", "shared"), [(False, []), (True, [(8, 64, torch.float32)])])
def test_ranks_share_memory_for_the_largest_decode_step_if_told_to(
    tmp_path: Path, asked: bool, shared: list[tuple[int, int, torch.dtype]]
) -> None:
    ranks = SharingRanks()
    config = replace(CONFIG, symmetric_memory=asked, max_batch_size=5)
    load_runner(write_hf_checkpoint(tmp_path, SMALL), config, None, ranks)
    assert ranks.shared == shared


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


BLOCK_BYTES = 4 * kv_bytes_per_token(SMALL, "float32")


@dataclass
class OneOfTwo(OneRank):
    """Loads alone, but counts and answers as one of several ranks of which another has less."""

    others: dict[bool, int]
    """The least of the others, by whether it has loaded."""
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def lowest(self, number: int, *, is_loaded: bool = False) -> int:
        self.asked.append((number, is_loaded))
        return min(number, self.others[is_loaded])


@pytest.fixture
def gpu_of_8_gib(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Plan for a GPU while a CPU computes; then say how many blocks its free memory is good for."""
    reserve = plan_memory(
        SMALL, machine(8), weight_dtype="float32", kv_dtype="float32"
    ).reserve_bytes
    monkeypatch.setattr(loading, "machine_of", lambda *_: machine(8))

    def leave(num_blocks: float) -> None:
        free_bytes = reserve + int(num_blocks * BLOCK_BYTES)
        monkeypatch.setattr(loading, "measured_free_bytes", lambda _: free_bytes)

    return leave


def test_on_a_gpu_the_kv_cache_is_what_loading_left_less_the_reserve(
    tmp_path: Path, gpu_of_8_gib: Callable[[float], None]
) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    config = replace(CONFIG, num_blocks=None, max_batch_size=4)
    for left, expected in ((7.9, 7), (23.0, 23), (1e6, 4 * 64 // 4)):
        gpu_of_8_gib(left)
        assert load_runner(folder, config).num_blocks == expected


def test_every_rank_takes_the_least_that_any_has_left(
    tmp_path: Path, gpu_of_8_gib: Callable[[float], None]
) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    gpu_of_8_gib(30)
    ranks = OneOfTwo({False: 60, True: 21})
    runner = load_runner(folder, replace(CONFIG, num_blocks=None, max_batch_size=4), None, ranks)
    assert runner.num_blocks == 21
    assert ranks.asked == [(64, False), (30, True)]


def test_a_kv_cache_as_set_must_fit_what_loading_left(
    tmp_path: Path, gpu_of_8_gib: Callable[[float], None]
) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    gpu_of_8_gib(16)
    assert load_runner(folder, CONFIG).num_blocks == 16
    gpu_of_8_gib(15.9)
    with pytest.raises(DoesNotFitError, match="the KV cache as set does not fit"):
        load_runner(folder, CONFIG)


def test_on_a_cpu_the_kv_cache_is_what_was_planned(tmp_path: Path) -> None:
    ranks = OneOfTwo({False: 9})
    assert load_runner(write_hf_checkpoint(tmp_path, SMALL), CONFIG, None, ranks).num_blocks == 9
    assert ranks.asked == [(16, False)]


def test_an_fp8_kv_cache_holds_more_tokens_in_the_same_bytes(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, SMALL)
    config = replace(CONFIG, num_blocks=None, kv_cache_bytes=8 * BLOCK_BYTES)
    assert load_runner(folder, config).num_blocks == 8
    assert load_runner(folder, replace(config, kv_dtype="fp8")).num_blocks == 32


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
