"""A request's tokens are its own: alone, in any company, in any chunks, from any cache.

Where a back-end promises it, not only the tokens are equal but every bit of the logits: the
log-probabilities that come with each token are compared as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mixfleet_engine.config import Backend, EngineConfig, KvDtype, WeightDtype
from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.loading import load_engine
from mixfleet_engine.request import GenerateRequest, SamplingParams, TokenLogprobs
from support.engine_requests import make_request
from support.tiny_model import tiny_config, write_hf_checkpoint

Token = tuple[int, TokenLogprobs | None]
Answers = dict[str, list[Token]]

VOCAB_SIZE = 96
BLOCK_SIZE = 16
WARM = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=11)
PENALISED = replace(WARM, seed=5, repetition_penalty=1.2, presence_penalty=0.3)


@dataclass(frozen=True)
class Kind:
    """One way to compute, and how much it promises."""

    backend: Backend
    dtype: str
    weight_dtype: WeightDtype = "auto"
    kv_dtype: KvDtype = "auto"
    is_bitwise: bool = True

    def __str__(self) -> str:
        return f"{self.backend}-{self.dtype}-{self.weight_dtype}-{self.kv_dtype}"


KINDS = [
    Kind("reference", "float32", is_bitwise=False),
    Kind("cpu", "float32", is_bitwise=False),
    Kind("reference", "float32", kv_dtype="fp8", is_bitwise=False),
    Kind("cpu", "float32", kv_dtype="fp8", is_bitwise=False),
    Kind("native", "bfloat16"),
    Kind("native", "bfloat16", "int8"),
    Kind("native", "bfloat16", "int4"),
]


def requests() -> list[GenerateRequest]:
    """Greedy and sampled; shorter than a block, as long as one, and over many."""

    def prompt(length: int) -> list[int]:
        return [(7 * n * n + length) % VOCAB_SIZE for n in range(length)]

    return [
        make_request("greedy", prompt=prompt(5), max_tokens=24),
        make_request("warm", prompt=prompt(3), max_tokens=20, sampling=WARM),
        make_request("long", prompt=prompt(75), max_tokens=16),
        make_request("one token", prompt=prompt(1), max_tokens=18, sampling=WARM),
        make_request("penalised", prompt=prompt(30), max_tokens=20, sampling=PENALISED),
        make_request("a block", prompt=prompt(BLOCK_SIZE), max_tokens=9),
    ]


class Bench:
    """Engines of one kind on one checkpoint."""

    def __init__(self, kind: Kind, checkpoint: Path) -> None:
        self._kind = kind
        self._checkpoint = checkpoint
        self.alone: Answers = {}
        for request in self.requests():
            self.alone |= run(self.engine(prefix_cache=False), [request])

    def requests(self) -> list[GenerateRequest]:
        """The requests, asking for what this kind promises."""
        if not self._kind.is_bitwise:
            return requests()
        return [
            replace(request, sampling=replace(request.sampling, logprobs=5))
            for request in requests()
        ]

    def engine(self, **changes: Any) -> Engine:
        settings: dict[str, Any] = {"num_blocks": 96, "max_batch_size": 8}
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            device="cpu",
            backend=self._kind.backend,
            dtype=self._kind.dtype,
            weight_dtype=self._kind.weight_dtype,
            kv_dtype=self._kind.kv_dtype,
            **(settings | changes),
        )
        return load_engine(self._checkpoint, config)


def run(
    engine: Engine,
    submitted: Sequence[GenerateRequest],
    *,
    every_steps: int = 0,
    during: Callable[[int], None] = lambda _: None,
) -> Answers:
    """Run all to the end; with ``every_steps`` the requests come one by one."""
    waiting = list(submitted)
    answers: Answers = {request.request_id: [] for request in submitted}
    for step in range(2000):
        while waiting and (every_steps == 0 or step % every_steps == 0):
            engine.submit(waiting.pop(0))
            if every_steps:
                break
        if not waiting and not engine.has_work:
            return answers
        for output in engine.step():
            logprobs = output.logprobs or (None,) * len(output.token_ids)
            answers[output.request_id] += zip(output.token_ids, logprobs, strict=True)
        during(step)
    raise AssertionError("still at work after 2000 steps")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Widths of 128 and more, because int4 has groups of 128.
    config = tiny_config(vocab_size=VOCAB_SIZE, dim=128, hidden_dim=256, n_heads=8, head_dim=16)
    return write_hf_checkpoint(tmp_path_factory.mktemp("tiny"), config, seed=3)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def bench(request: pytest.FixtureRequest, checkpoint: Path) -> Bench:
    try:
        return Bench(request.param, checkpoint)
    except ConfigError as error:
        if request.param.backend == "native":
            pytest.skip(str(error))
        raise


def test_the_answers_are_worth_comparing(bench: Bench) -> None:
    answers = [tuple(token for token, _ in tokens) for tokens in bench.alone.values()]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 4 for answer in answers)


def test_company_and_its_order_change_nothing(bench: Bench) -> None:
    together = run(bench.engine(), bench.requests())
    assert together == bench.alone
    assert run(bench.engine(), bench.requests()[::-1]) == bench.alone


@pytest.mark.parametrize("max_step_tokens", [8, 13, 33])
def test_the_size_of_prefill_chunks_changes_nothing(bench: Bench, max_step_tokens: int) -> None:
    engine = bench.engine(max_step_tokens=max_step_tokens)
    assert run(engine, bench.requests()) == bench.alone


def test_joining_late_changes_nothing(bench: Bench) -> None:
    assert run(bench.engine(), bench.requests(), every_steps=4) == bench.alone


def test_a_prefix_hit_changes_nothing(bench: Bench) -> None:
    engine = bench.engine()
    run(engine, bench.requests())
    assert engine.prefix_hit_tokens == 0
    assert run(engine, bench.requests()) == bench.alone
    assert engine.prefix_hit_tokens >= 75 // BLOCK_SIZE * BLOCK_SIZE


def test_preemption_changes_nothing(bench: Bench) -> None:
    engine = bench.engine(num_blocks=9, prefix_cache=False)
    assert run(engine, bench.requests()) == bench.alone
    assert engine.num_preemptions > 0


def test_preemption_with_a_prefix_cache_changes_nothing(bench: Bench) -> None:
    engine = bench.engine(num_blocks=9)
    assert run(engine, bench.requests()) == bench.alone
    assert engine.num_preemptions > 0


@pytest.mark.parametrize("num_delivered", [1, 7])
def test_going_on_after_another_worker_changes_nothing(bench: Bench, num_delivered: int) -> None:
    continued = [
        replace(
            request,
            output_token_ids=tuple(
                token for token, _ in bench.alone[request.request_id][:num_delivered]
            ),
        )
        for request in bench.requests()
    ]
    rest = {name: tokens[num_delivered:] for name, tokens in bench.alone.items()}
    assert run(bench.engine(), continued) == rest


def test_the_number_of_threads_changes_nothing(bench: Bench) -> None:
    assert run(bench.engine(threads=2), bench.requests()) == bench.alone
