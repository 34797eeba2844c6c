"""The engine on a CUDA device, by plain torch operations: the same tokens as on a CPU."""

from pathlib import Path

import pytest
import torch

from mixfleet_engine.config import EngineConfig
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest, SamplingParams
from support.dense_mixtral import dense_greedy
from support.tiny_model import hf_tensors, tiny_config, write_hf_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = tiny_config(vocab_size=128, context_length=128)
PROMPTS = [list(range(3, 3 + n)) for n in (2, 9, 23)]


def load(folder: Path, device: str, dtype: str = "float32") -> Engine:
    config = EngineConfig(dtype=dtype, device=device, num_blocks=64, max_step_tokens=16)
    return load_engine(write_hf_checkpoint(folder, CONFIG), config)


def answers(engine: Engine, sampling: SamplingParams) -> dict[str, list[int]]:
    for number, prompt in enumerate(PROMPTS):
        engine.submit(
            GenerateRequest(
                request_id=str(number),
                prompt_token_ids=tuple(prompt),
                max_tokens=8,
                sampling=sampling,
            )
        )
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def test_greedy_answers_are_token_exact(tmp_path: Path) -> None:
    found = answers(load(tmp_path, "cuda"), SamplingParams())
    for number, prompt in enumerate(PROMPTS):
        output = found[str(number)]
        assert len(output) == 8
        assert output == dense_greedy(CONFIG, hf_tensors(CONFIG), prompt, output)


def test_sampled_answers_are_the_ones_of_a_cpu(tmp_path: Path) -> None:
    sampling = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=7)
    on_gpu = answers(load(tmp_path, "cuda"), sampling)
    assert on_gpu == answers(load(tmp_path, "cpu"), sampling)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_half_precision_runs(tmp_path: Path, dtype: str) -> None:
    found = answers(load(tmp_path, "cuda", dtype), SamplingParams())
    assert [len(tokens) for tokens in found.values()] == [8, 8, 8]


def test_the_default_cache_fits_what_is_free(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, CONFIG)
    engine = load_engine(folder, EngineConfig(device="cuda"))
    assert engine.free_tokens == 8 * 128
