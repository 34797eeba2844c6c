"""The whole numeric path against the dense reference, with plans made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixfleet_engine.config import Backend, EngineConfig, KvDtype, ModelConfig
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.loading import load_runner
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.step import NO_TOKEN, UNREAD, PlannedChunk, SampledToken, StepPlan
from support.dense_mixtral import dense_greedy, dense_logits
from support.plans import chunk, plan, table
from support.tiny_model import (
    ExpertStorage,
    MistralFiles,
    hf_tensors,
    tiny_config,
    write_hf_checkpoint,
    write_mistral_checkpoint,
)

BLOCK_SIZE = 4
CONFIG = tiny_config(vocab_size=128, context_length=128)
TENSORS = hf_tensors(CONFIG)


def runner_of(folder: Path, backend: str = "cpu") -> ModelRunner:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=64,
        dtype="float32",
        device="cpu",
        backend=backend,  # type: ignore[arg-type]
    )
    return load_runner(folder, config)


@pytest.fixture(params=["reference", "cpu"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRunner:
    return runner_of(write_hf_checkpoint(tmp_path, CONFIG), request.param)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (num_tokens,), generator=generator).tolist()


class Answer:
    """One greedy answer, driven by hand: what the scheduler keeps in a real engine."""

    def __init__(self, prompt: Sequence[int], first_block: int, *, chunk_size: int = 999) -> None:
        self.prompt = list(prompt)
        self.output: list[int] = []
        self._num_cached = 0
        self._first_block = first_block
        self._chunk_size = chunk_size

    def next_chunk(self) -> PlannedChunk:
        pending = (self.prompt + self.output)[self._num_cached :][: self._chunk_size]
        end = self._num_cached + len(pending)
        planned = chunk(
            pending,
            start=self._num_cached,
            block_table=table(end, BLOCK_SIZE, first=self._first_block, stride=2),
            samples=end == len(self.prompt) + len(self.output),
            position=len(self.output),
        )
        self._num_cached = end
        return planned


def step(runner: ModelRunner, answers: Sequence[Answer]) -> None:
    chunks = [answer.next_chunk() for answer in answers]
    tokens = iter(runner.run(plan(*chunks)))
    for answer, planned in zip(answers, chunks, strict=True):
        if planned.samples:
            answer.output.append(next(tokens).token_id)
    assert next(tokens, None) is None


def assert_exact(*answers: Answer) -> None:
    for answer in answers:
        expected = dense_greedy(CONFIG, TENSORS, answer.prompt, answer.output)
        assert answer.output == expected


def test_a_single_answer_is_token_exact(runner: ModelRunner) -> None:
    answer = Answer(prompt(9), first_block=5)
    for _ in range(6):
        step(runner, [answer])
    assert len(set(answer.output)) > 2, "an answer of one repeated token would prove little"
    assert_exact(answer)


def test_a_batch_of_different_lengths_is_token_exact(runner: ModelRunner) -> None:
    answers = [Answer(prompt(n, seed=n), first_block=n) for n in (1, 12)]
    for _ in range(4):
        step(runner, answers)
    assert_exact(*answers)


def test_a_late_joiner_is_token_exact_and_disturbs_nobody(runner: ModelRunner) -> None:
    early, late = Answer(prompt(7), first_block=1), Answer(prompt(5, seed=1), first_block=30)
    step(runner, [early])
    step(runner, [early])
    step(runner, [early, late])
    step(runner, [late, early])
    assert (len(early.output), len(late.output)) == (4, 2)
    assert_exact(early, late)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8])
def test_a_prompt_in_chunks_is_token_exact(runner: ModelRunner, chunk_size: int) -> None:
    answer = Answer(prompt(11), first_block=3, chunk_size=chunk_size)
    other = Answer(prompt(4, seed=2), first_block=40)
    while len(answer.output) < 2:
        step(runner, [other, answer])
    other.output = other.output[:2]
    assert_exact(answer, other)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_logits_are_close_to_the_dense_reference(tmp_path: Path, tied: bool, shared: bool) -> None:
    config = tiny_config(
        vocab_size=128, n_layers=1, tie_word_embeddings=tied, shared_experts=shared
    )
    token_ids = prompt(8)
    expected = dense_logits(config, hf_tensors(config), token_ids)[-1:].float()
    folder = write_hf_checkpoint(tmp_path, config)
    for backend in ("reference", "cpu"):
        logits = runner_of(folder, backend).logits(plan(chunk(token_ids, block_table=[2, 0])))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def logits_of(folder: Path) -> torch.Tensor:
    return runner_of(folder).logits(plan(chunk(prompt(9), block_table=[1, 2, 3])))


@pytest.mark.parametrize("experts", ["per-expert", "stacked"])
@pytest.mark.parametrize("files", ["safetensors", "sharded-pth"])
def test_both_layouts_give_equal_logits(
    tmp_path: Path, files: MistralFiles, experts: ExpertStorage
) -> None:
    mistral = write_mistral_checkpoint(tmp_path / "m", CONFIG, files=files, experts=experts)
    hf = write_hf_checkpoint(tmp_path / "hf", CONFIG, num_files=2)
    assert torch.equal(logits_of(mistral), logits_of(hf))


def test_only_sampled_rows_get_logits(runner: ModelRunner) -> None:
    planned = plan(chunk([1, 2, 3], block_table=[0], samples=False), chunk([4, 5], block_table=[1]))
    assert runner.logits(planned).shape == (1, CONFIG.vocab_size)


def test_a_step_inside_a_long_prompt_samples_nothing(runner: ModelRunner) -> None:
    assert runner.run(plan(chunk([1, 2, 3], block_table=[0], samples=False))) == []


def test_an_empty_plan_samples_nothing(runner: ModelRunner) -> None:
    assert runner.run(plan()) == []


def test_the_same_step_again_gives_the_same_token(runner: ModelRunner) -> None:
    planned = plan(chunk(prompt(6), block_table=[4, 5]))
    assert runner.run(planned) == runner.run(planned)


def test_an_unread_token_is_what_the_launch_before_has_sampled(runner: ModelRunner) -> None:
    first, second = chunk(prompt(5), block_table=[0, 1]), chunk(prompt(6, 1), block_table=[2, 3])
    middle = chunk(prompt(3, 2), block_table=[4], samples=False)
    launched = runner.launch(plan(first, middle, second))
    unread = replace(chunk([UNREAD], start=6, block_table=[2, 3], position=1), unread_row=1)
    (ahead,) = runner.launch(plan(unread)).read()
    sampled = launched.read()[1].token_id
    known = replace(unread, token_ids=(sampled,), unread_row=None)
    assert runner.run(plan(known)) == [ahead]


def test_where_there_was_no_token_the_row_runs_on_and_hurts_no_other(tmp_path: Path) -> None:
    runner = runner_of(spoilt_checkpoint(tmp_path, 5))
    broken, good = chunk([1, 5], block_table=[3]), chunk([1, 2, 3], block_table=[2])
    runner.launch(plan(broken, good))
    after_broken = replace(chunk([UNREAD], start=2, block_table=[3]), unread_row=0)
    after_good = replace(chunk([UNREAD], start=3, block_table=[2]), unread_row=1)
    together = runner.launch(plan(after_broken, after_good)).read()
    runner.launch(plan(broken, good))
    assert together[1:] == runner.run(plan(after_good))


def test_each_row_is_sampled_by_its_own_settings(runner: ModelRunner) -> None:
    hot = SamplingParams(temperature=50.0, seed=3)
    chunks = [
        chunk(prompt(6), block_table=[2 * i, 2 * i + 1], sampling=sampling, position=i)
        for i, sampling in enumerate([SamplingParams(), hot, hot, SamplingParams()])
    ]
    together = runner.run(plan(*chunks))
    assert together[0] == together[3], "greedy does not look at seed and position"
    assert together == [token for c in chunks for token in runner.run(plan(c))]


def test_penalties_count_the_requests_own_tokens(runner: ModelRunner) -> None:
    """A greedy answer that may say nothing twice, and its twin whose bias says what comes."""
    history = TokenHistory(tuple(prompt(6)))
    once = SamplingParams(repetition_penalty=1e9, presence_penalty=2.0, logprobs=2)
    forced = SamplingParams(logit_bias=((7, 100.0),))
    for position in range(5):
        chunks = [
            replace(
                chunk(history.token_ids, block_table=table(6 + position, BLOCK_SIZE, first)),
                sampling=sampling,
                history=history,
                position=position,
            )
            for first, sampling in ((0, once), (20, forced))
        ]
        sampled, other = runner.run(plan(*chunks))
        assert other.token_id == 7
        assert sampled.logprobs is not None
        best = runner.logits(plan(chunks[0])).argmax().item()
        assert sampled.logprobs.top[0][0] == best, "logprobs are of the model's own logits"
        history.token_ids.append(sampled.token_id)
    assert len(set(history.token_ids[6:])) == 5
    assert not set(history.token_ids[6:]) & set(history.token_ids[:6])


def spoilt_checkpoint(folder: Path, token_id: int) -> Path:
    """Return a checkpoint in which one token's embedding is not a number."""
    file = write_hf_checkpoint(folder, CONFIG) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token_id] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_chunk_that_is_not_finite_gives_no_token_and_hurts_no_other(tmp_path: Path) -> None:
    runner = runner_of(spoilt_checkpoint(tmp_path, 5))
    good = chunk([1, 2, 3], block_table=[2], sampling=SamplingParams(logprobs=3))
    alone = runner.run(plan(good))
    together = runner.run(plan(good, chunk([1, 5], block_table=[3]), replace(good)))
    assert together[1] == SampledToken(NO_TOKEN)
    assert together[0] == together[2] == alone[0]


def test_blocks_to_be_cleared_are_as_new(tmp_path: Path) -> None:
    """What a spoilt request left behind does not reach the next owner of its block."""
    runner = runner_of(spoilt_checkpoint(tmp_path, 5))
    fresh = runner.run(plan(chunk([1], block_table=[6])))
    runner.run(plan(chunk([5, 5, 5, 5], block_table=[3])))
    owner = chunk([1], block_table=[3])
    assert runner.run(StepPlan(chunks=(owner,), clear_blocks=(3,))) == fresh
    assert runner.run(plan(owner)) == fresh


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp8_kv_cache_stays_near_a_plain_one(
    backend: Backend, dtype: str, tmp_path: Path
) -> None:
    folder = write_hf_checkpoint(tmp_path, tiny_config(n_layers=1))
    found = {}
    for kv_dtype in get_args(KvDtype):
        settings = EngineConfig(
            dtype=dtype, device="cpu", num_blocks=4, kv_dtype=kv_dtype, backend=backend
        )
        runner = load_runner(folder, settings)
        # A prefill of 32, then a decode that reads all of it.
        runner.run(plan(chunk(prompt(32), block_table=[2, 1])))
        found[kv_dtype] = runner.logits(plan(chunk([5], start=32, block_table=[2, 1, 3])))
    difference = (found["fp8"] - found["auto"]).norm() / found["auto"].norm()
    # Random weights make attention sharp, so that a score's rounding counts far more than in a
    # trained model.
    assert 0.001 < difference < 0.15


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    config: ModelConfig = tiny_config(n_layers=1)
    folder = write_hf_checkpoint(tmp_path, config)
    planned = plan(chunk(prompt(9), block_table=[0]))
    exact = load_runner(folder, EngineConfig(dtype="float32", device="cpu", num_blocks=4))
    rounded = load_runner(folder, EngineConfig(dtype="bfloat16", device="cpu", num_blocks=4))
    difference = (exact.logits(planned) - rounded.logits(planned)).abs().max().item()
    assert difference < 0.1 * exact.logits(planned).std().item()
