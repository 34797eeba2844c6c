"""Token-exact against `transformers`' own MixtralForCausalLM, fp32, through the engine's door.

Run with `-s` to see a line per case. Importing transformers takes seconds, so all of it is slow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mixfleet_engine.config import Backend, EngineConfig
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import load_engine, load_runner
from mixfleet_engine.request import GenerateRequest
from support.plans import chunk, plan, table
from support.tiny_model import tiny_config, write_hf_checkpoint, write_mistral_checkpoint

pytestmark = pytest.mark.slow

CONFIG = tiny_config()
NUM_TOKENS = 32
BLOCK_SIZE = 8


@dataclass(frozen=True)
class Oracle:
    """The model as transformers runs it."""

    model: Any

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits

    def greedy(self, prompt: list[int], output: list[int]) -> list[int]:
        """Return the most likely token at each place of `output`, given all before it.

        It equals `output` if and only if `output` is the greedy answer.
        """
        tokens: list[int] = self.logits(prompt + output)[len(prompt) - 1 : -1].argmax(-1).tolist()
        return tokens

    def generate(self, prompt: list[int]) -> list[int]:
        """Return the greedy answer by transformers' own generation loop."""
        with torch.no_grad():
            whole = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = whole[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {
        "hf": write_hf_checkpoint(root / "hf", CONFIG),
        "hf-sharded": write_hf_checkpoint(root / "hf-sharded", CONFIG, num_files=3),
        "mistral": write_mistral_checkpoint(root / "mistral", CONFIG),
        "mistral-pth-stacked": write_mistral_checkpoint(
            root / "stacked", CONFIG, files="sharded-pth", experts="stacked"
        ),
    }


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> Oracle:
    return oracle_of(folders["hf"])


def oracle_of(folder: Path) -> Oracle:
    from transformers import MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Oracle(model.train(False))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    return name


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, CONFIG.vocab_size, (num_tokens,), generator=generator).tolist()


def engine_of(folder: Path, backend: Backend, **settings: Any) -> Engine:
    defaults = {"block_size": BLOCK_SIZE, "num_blocks": 128, "max_step_tokens": 512}
    config = EngineConfig(dtype="float32", device="cpu", backend=backend, **(defaults | settings))
    return load_engine(folder, config)


def submit(engine: Engine, name: str, token_ids: list[int]) -> None:
    engine.submit(
        GenerateRequest(request_id=name, prompt_token_ids=tuple(token_ids), max_tokens=NUM_TOKENS)
    )


def steps(engine: Engine, answers: dict[str, list[int]]) -> Iterator[int]:
    """Step until all is answered; yields the number of steps so far."""
    count = 0
    while engine.has_work:
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        count += 1
        yield count


def assert_exact(
    case: str, oracle: Oracle, prompts: dict[str, list[int]], answers: dict[str, list[int]]
) -> None:
    expected = {name: oracle.greedy(prompt, answers[name]) for name, prompt in prompts.items()}
    assert all(len(tokens) == NUM_TOKENS for tokens in answers.values())
    pairs = [
        pair
        for name, tokens in expected.items()
        for pair in zip(tokens, answers[name], strict=True)
    ]
    equal = sum(theirs == ours for theirs, ours in pairs)
    distinct = len({theirs for theirs, _ in pairs})
    say(f"{case}: {equal} of {len(pairs)} greedy tokens equal, {distinct} distinct")
    assert answers == expected


def say(line: str) -> None:
    print(f"\n{line}", end=" ")  # noqa: T201 - seen with -s only


def test_logits_are_close_in_every_layout(
    oracle: Oracle, folders: dict[str, Path], backend: Backend
) -> None:
    token_ids = prompt(61)
    expected = oracle.logits(token_ids)[-1:]
    planned = plan(chunk(token_ids, block_table=table(61, BLOCK_SIZE, first=20, stride=-2)))
    for layout, folder in folders.items():
        config = EngineConfig(
            dtype="float32", device="cpu", backend=backend, block_size=BLOCK_SIZE, num_blocks=32
        )
        found = load_runner(folder, config).logits(planned)
        difference = (found - expected).abs().max().item()
        spread = expected.std().item()
        say(f"logits, {backend}, {layout}: off by {difference:.1e}, spread {spread:.2f}")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 57])
def test_a_single_request(
    oracle: Oracle, folders: dict[str, Path], backend: Backend, num_tokens: int
) -> None:
    prompts = {"a": prompt(num_tokens)}
    engine, answers = engine_of(folders["hf"], backend), dict[str, list[int]]()
    submit(engine, "a", prompts["a"])
    list(steps(engine, answers))
    assert_exact(f"single, {backend}, prompt of {num_tokens}", oracle, prompts, answers)
    assert answers["a"] == oracle.generate(prompts["a"])


def test_a_batch(oracle: Oracle, folders: dict[str, Path], backend: Backend) -> None:
    prompts = {str(n): prompt(n, seed=n) for n in (1, 3, 16, 17, 40, 80)}
    engine, answers = engine_of(folders["mistral"], backend), dict[str, list[int]]()
    for name, token_ids in prompts.items():
        submit(engine, name, token_ids)
    list(steps(engine, answers))
    assert_exact(f"batch of {len(prompts)}, {backend}", oracle, prompts, answers)


def test_late_joiners(oracle: Oracle, folders: dict[str, Path], backend: Backend) -> None:
    prompts = {str(n): prompt(5 * n + 2, seed=n) for n in range(5)}
    engine, answers = engine_of(folders["hf"], backend), dict[str, list[int]]()
    submit(engine, "0", prompts["0"])
    for count in steps(engine, answers):
        if count % 6 == 0 and count // 6 < len(prompts):
            submit(engine, str(count // 6), prompts[str(count // 6)])
    assert_exact(f"late joiners, {backend}", oracle, prompts, answers)


@pytest.mark.parametrize("max_step_tokens", [4, 7, 16])
def test_chunked_prefill(
    oracle: Oracle, folders: dict[str, Path], backend: Backend, max_step_tokens: int
) -> None:
    prompts = {str(n): prompt(n, seed=n) for n in (33, 50, 5)}
    engine = engine_of(folders["hf"], backend, max_step_tokens=max_step_tokens, max_batch_size=3)
    answers: dict[str, list[int]] = {}
    for name, token_ids in prompts.items():
        submit(engine, name, token_ids)
    list(steps(engine, answers))
    case = f"chunks within {max_step_tokens} tokens a step, {backend}"
    assert_exact(case, oracle, prompts, answers)


def test_preemption(oracle: Oracle, folders: dict[str, Path], backend: Backend) -> None:
    prompts = {str(n): prompt(20, seed=n) for n in range(4)}
    engine, answers = engine_of(folders["hf"], backend, num_blocks=16), dict[str, list[int]]()
    for name, token_ids in prompts.items():
        submit(engine, name, token_ids)
    list(steps(engine, answers))
    assert engine.num_preemptions > 0
    assert_exact(f"{engine.num_preemptions} preemptions, {backend}", oracle, prompts, answers)


def test_a_continuation(oracle: Oracle, folders: dict[str, Path], backend: Backend) -> None:
    """What another worker does after the first one died."""
    prompts = {"a": prompt(12)}
    whole = oracle.generate(prompts["a"])
    engine, answers = engine_of(folders["hf"], backend), dict[str, list[int]]()
    engine.submit(
        GenerateRequest(
            request_id="a",
            prompt_token_ids=tuple(prompts["a"]),
            output_token_ids=tuple(whole[:13]),
            max_tokens=NUM_TOKENS,
        )
    )
    list(steps(engine, answers))
    answers["a"] = whole[:13] + answers["a"]
    assert_exact(f"continuation, {backend}", oracle, prompts, answers)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_that_transformers_saved(tmp_path: Path, backend: Backend, tied: bool) -> None:
    """Its newest config.json and tensor names, which are not the ones of the older files."""
    config = tiny_config(tie_word_embeddings=tied)
    oracle = oracle_of(write_hf_checkpoint(tmp_path / "ours", config))
    oracle.model.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    prompts = {"a": prompt(10)}
    engine, answers = engine_of(tmp_path / "theirs", backend), dict[str, list[int]]()
    submit(engine, "a", prompts["a"])
    list(steps(engine, answers))
    assert_exact(f"saved by transformers, tied={tied}, {backend}", oracle, prompts, answers)
