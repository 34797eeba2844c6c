"""The engine on the CUDA back-end: the reference's tokens, in any company, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixfleet_engine.batch import make_batch
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.device_runner import DeviceRunner
from mixfleet_engine.engine import Engine
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.loading import load_engine, load_runner
from mixfleet_engine.ops.door import in_turn
from mixfleet_engine.request import GenerateRequest, SamplingParams, TokenLogprobs
from support.engine_requests import make_request
from support.kernels import DEVICE, off, randn
from support.plans import chunk, plan, table
from support.tiny_model import tiny_config, write_hf_checkpoint

CONFIG = tiny_config(n_layers=2, hidden_dim=64, vocab_size=96, num_experts=4, context_length=128)
PROMPTS = [list(range(3, 3 + length)) for length in (1, 9, 16, 21)]
DTYPE = "float32" if DEVICE.type == "cpu" else "bfloat16"
"""What the reference computes in; the interpreter can do the same."""
WARM = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=3)
COUNTED = SamplingParams(temperature=0.7, presence_penalty=0.5, logprobs=2, seed=5)
Answers = dict[str, list[tuple[int, TokenLogprobs | None]]]


def settings(backend: str = "cuda", dtype: str = DTYPE, **more: Any) -> EngineConfig:
    sizes: dict[str, Any] = {"num_blocks": 40, "max_step_tokens": 64, "max_batch_size": 8}
    named: dict[str, Any] = {"backend": backend, "dtype": dtype, "device": DEVICE.type}
    return EngineConfig(**(named | sizes | {"tuning_s": 0.0} | more))


def requests(sampling: SamplingParams = SamplingParams()) -> list[GenerateRequest]:  # noqa: B008
    return [
        make_request(str(number), prompt=prompt, max_tokens=3, sampling=sampling)
        for number, prompt in enumerate(PROMPTS)
    ]


def answers(engine: Engine, *submitted: GenerateRequest) -> Answers:
    for request in submitted:
        engine.submit(request)
    found: Answers = {}
    while engine.has_work:
        for output in engine.step():
            logprobs = output.logprobs or (None,) * len(output.token_ids)
            found.setdefault(output.request_id, []).extend(
                zip(output.token_ids, logprobs, strict=True)
            )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("model"), CONFIG)


PLAN = plan(
    chunk([5], block_table=table(1, 16, first=30)),
    chunk(range(40, 62), block_table=table(22, 16, first=3)),
)


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        ({"dtype": "float32"}, 1e-5),
        ({"dtype": "float32", "weight_dtype": "int8"}, 1e-5),
        ({"dtype": "float32", "weight_dtype": "int4"}, 1e-5),
        ({"dtype": "float32", "kv_dtype": "fp8"}, 1e-5),
        ({"dtype": "bfloat16"}, 0.03),
        ({"dtype": "bfloat16", "weight_dtype": "int8"}, 0.03),
        ({"dtype": "bfloat16", "weight_dtype": "int4"}, 0.03),
    ],
)
def test_logits_are_the_references(folder: Path, more: dict[str, Any], allowed: float) -> None:
    if DEVICE.type == "cuda" and more["dtype"] == "float32":
        pytest.skip("kernels multiply in bf16 or fp16")
    expected = load_runner(folder, settings("reference", **more)).logits(PLAN)
    assert off(load_runner(folder, settings(**more)).logits(PLAN), expected) < allowed


def test_answers_are_the_references(folder: Path) -> None:
    expected = answers(load_engine(folder, settings("reference")), *requests())
    found = answers(load_engine(folder, settings()), *requests())
    if DEVICE.type == "cpu":
        assert found == expected
    assert {name: len(tokens) for name, tokens in found.items()} == dict.fromkeys("0123", 3)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_tokens_are_in_fp8_too_where_weights_are(tmp_path: Path, batch_invariant: bool) -> None:
    # Both experts are always chosen: else a rounding more would now and then choose another one.
    both = tiny_config(n_layers=1, hidden_dim=64, vocab_size=96, num_experts=2, context_length=128)
    folder = write_hf_checkpoint(tmp_path, both)
    more: dict[str, Any] = {
        "dtype": "bfloat16",
        "weight_dtype": "fp8",
        "batch_invariant": batch_invariant,
    }
    expected = load_runner(folder, settings("reference", **more)).logits(PLAN)
    assert 0.003 < off(load_runner(folder, settings(**more)).logits(PLAN), expected) < 0.12


@pytest.mark.parametrize("weight_dtype", ["int8", "int4", "fp8"])
def test_few_tokens_may_pass_by_the_matrix_units(folder: Path, weight_dtype: str) -> None:
    one = plan(chunk([5], block_table=table(1, 16, first=30)), chunk([7], block_table=[3]))
    more: dict[str, Any] = {"weight_dtype": weight_dtype, "batch_invariant": False}
    expected = load_runner(folder, settings("reference", **more)).logits(one)
    assert off(load_runner(folder, settings(**more)).logits(one), expected) < 0.03


@pytest.mark.parametrize("sampling", [SamplingParams(), WARM, COUNTED])
def test_an_answer_is_the_same_to_the_bit_in_any_company(
    folder: Path, sampling: SamplingParams
) -> None:
    asked = requests(sampling)
    expected: Answers = {}
    for request in asked:
        engine = load_engine(folder, settings(dtype="bfloat16", prefix_cache=False))
        expected |= answers(engine, request)
    ways: list[dict[str, Any]] = [
        {"pipelined": True},
        {"max_step_tokens": 8, "pipelined": True},
        {"num_blocks": 8, "max_batch_size": 3, "max_step_tokens": 16},
    ]
    for more in ways:
        engine = load_engine(folder, settings(dtype="bfloat16", **more))
        assert answers(engine, *asked) == expected, more


def test_layers_run_together_as_one_after_the_other(folder: Path) -> None:
    model = load_runner(folder, settings(dtype="bfloat16"))._model
    cache = KvCache(CONFIG, num_blocks=40, block_size=16, dtype=torch.bfloat16, device=DEVICE)
    batch = make_batch(PLAN, 16, DEVICE)
    together = randn(len(batch.token_ids), CONFIG.dim)
    alone = together.clone()
    model.run_layers(together, batch, cache)
    in_turn(model.layers)(alone, batch, cache)
    assert torch.equal(together, alone)


def test_decodes_run_in_buckets(folder: Path) -> None:
    runner = load_runner(folder, settings(dtype="bfloat16"))
    assert isinstance(runner, DeviceRunner)
    for count in (1, 3, 3):
        decodes = [chunk([n], block_table=[n], position=0) for n in range(1, count + 1)]
        tokens = runner.run(plan(*decodes))
        assert len(tokens) == count
    assert [shape.num_rows for shape in runner.recorded] == [1, 4]


def test_experts_that_are_one_are_computed_once(tmp_path: Path) -> None:
    shared = tiny_config(
        n_layers=1, hidden_dim=64, vocab_size=96, num_experts=4, shared_experts=True,
        tie_word_embeddings=True, context_length=128,
    )  # fmt: skip
    folder = write_hf_checkpoint(tmp_path, shared)
    expected = load_runner(folder, settings("reference", dtype="float32")).logits(PLAN)
    for invariant in (True, False):
        runner = load_runner(
            folder,
            settings(dtype="bfloat16", weight_dtype="int8", batch_invariant=invariant),
        )
        assert off(runner.logits(PLAN), expected) < 0.03


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_a_cpu_interprets_kernels_only_by_name(folder: Path) -> None:
    assert not isinstance(load_runner(folder, settings("auto")), DeviceRunner)
