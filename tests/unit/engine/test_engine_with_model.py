"""The scheduler and the model together: how a request is run never changes its tokens.

What is compared with is the slow obvious loop: one request alone, its whole text prefilled into an
empty cache for every single token.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixfleet_engine.config import Backend, EngineConfig
from mixfleet_engine.engine import Engine
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.loading import load_engine, load_runner
from mixfleet_engine.request import FinishReason, GenerateRequest, SamplingParams
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.scheduler import Scheduler
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.plans import chunk, plan, table
from support.tiny_model import tiny_config, write_hf_checkpoint

WARM = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=11)
COUNTING = SamplingParams(temperature=0.7, presence_penalty=0.8, repetition_penalty=1.2, seed=4)
BLOCK_SIZE = 4
BACKENDS: tuple[Backend, ...] = ("reference", "cpu")
both = pytest.mark.parametrize("pipelined", [False, True])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=96)
    return write_hf_checkpoint(tmp_path_factory.mktemp("tiny"), config, seed=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def settings_for(backend: Backend) -> EngineConfig:
    return EngineConfig(
        backend=backend, dtype="float32", device="cpu", block_size=BLOCK_SIZE, num_blocks=64
    )


@pytest.fixture(scope="module", params=BACKENDS)
def runner(checkpoint: Path, request: pytest.FixtureRequest) -> ModelRunner:
    """Shared by all tests, so that each finds the leftovers of the others in its blocks."""
    return load_runner(checkpoint, settings_for(request.param))


@pytest.fixture(scope="module")
def foretold(checkpoint: Path) -> Answers:
    """The whole answer to each of the requests, by the slow loop."""
    alone = load_runner(checkpoint, settings_for("reference"))
    return {request.request_id: slow_answer(alone, request) for request in requests()}


def slow_answer(
    runner: ModelRunner, request: GenerateRequest
) -> tuple[tuple[int, ...], FinishReason]:
    answer: list[int] = []
    while True:
        text = [*request.prompt_token_ids, *answer]
        whole = chunk(
            text,
            block_table=table(len(text), BLOCK_SIZE),
            position=len(answer),
            sampling=request.sampling,
        )
        whole = replace(whole, history=TokenHistory(request.prompt_token_ids, tuple(answer)))
        answer += [token.token_id for token in runner.run(plan(whole))]
        if answer[-1] in request.stop_token_ids:
            return tuple(answer), "stop"
        if len(answer) == request.max_tokens:
            return tuple(answer), "length"


def requests() -> list[GenerateRequest]:
    """Greedy and sampled, short and long, stopping and not."""
    return [
        make_request("greedy", prompt=(1, 2, 3), max_tokens=14),
        make_request("warm", prompt=(1, 2, 3), max_tokens=14, sampling=WARM),
        make_request("long", prompt=[n * n % 96 for n in range(37)], max_tokens=12),
        make_request("one token", prompt=(7,), max_tokens=16, sampling=WARM),
        make_request("stops", prompt=(5, 6), max_tokens=30, stops=range(10), sampling=WARM),
        make_request("a block", prompt=(9,) * BLOCK_SIZE, max_tokens=9),
        make_request("counts", prompt=(1, 2, 3, 4, 5), max_tokens=9, sampling=COUNTING),
    ]


def make_engine(
    runner: ModelRunner,
    *,
    max_batch_size: int = 8,
    max_step_tokens: int = 64,
    context_length: int = 128,
    pipelined: bool = False,
) -> Engine:
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        context_length=context_length,
        vocab_size=96,
    )
    return Engine(runner, scheduler, pipelined=pipelined)


def test_the_foretold_answers_are_worth_comparing(foretold: Answers) -> None:
    greedy, reason = foretold["greedy"]
    assert (len(greedy), reason) == (14, "length")
    assert len(set(greedy)) > 5
    assert foretold["warm"][0] != greedy
    stopping, reason = foretold["stops"]
    assert reason == "stop"
    assert 1 < len(stopping) < 30


@both
def test_a_request_alone_gets_its_answer(
    runner: ModelRunner, foretold: Answers, *, pipelined: bool
) -> None:
    for request in requests():
        answer = run_to_end(make_engine(runner, pipelined=pipelined), [request])
        assert answer == {request.request_id: foretold[request.request_id]}


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_a_batch_gets_the_same_answers_in_any_order(
    runner: ModelRunner, foretold: Answers, *, reverse: bool, pipelined: bool
) -> None:
    together = requests()[::-1] if reverse else requests()
    assert run_to_end(make_engine(runner, pipelined=pipelined), together) == foretold


@both
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 5, 7])
def test_the_chunk_size_changes_no_answer(
    runner: ModelRunner, foretold: Answers, max_step_tokens: int, *, pipelined: bool
) -> None:
    engine = make_engine(
        runner,
        max_batch_size=min(6, max_step_tokens),
        max_step_tokens=max_step_tokens,
        pipelined=pipelined,
    )
    assert run_to_end(engine, requests()) == foretold


def test_requests_that_join_late_get_the_same_answers(
    runner: ModelRunner, foretold: Answers
) -> None:
    engine = make_engine(runner, max_step_tokens=11)
    answers: Answers = {}
    for request in requests():
        engine.submit(request)
        step_into(answers, engine)
        step_into(answers, engine)
    while engine.has_work:
        step_into(answers, engine)
    assert answers == foretold


@both
@pytest.mark.parametrize("num_blocks", [13, 16, 20])
def test_preemption_changes_no_answer(
    checkpoint: Path, foretold: Answers, num_blocks: int, *, pipelined: bool
) -> None:
    config = EngineConfig(
        backend="reference",
        dtype="float32",
        device="cpu",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_step_tokens=9,
        pipelined=pipelined,
    )
    engine = load_engine(checkpoint, config)
    assert run_to_end(engine, requests()) == foretold
    assert engine.num_preemptions > 0
    assert engine.free_tokens == num_blocks * BLOCK_SIZE


def continued(request: GenerateRequest, delivered: Sequence[int]) -> GenerateRequest:
    return make_request(
        request.request_id,
        prompt=request.prompt_token_ids,
        output=delivered,
        max_tokens=request.max_tokens,
        stops=request.stop_token_ids,
        sampling=request.sampling,
    )


@pytest.mark.parametrize("num_delivered", [1, 2, 5, 8])
def test_another_worker_continues_each_answer_as_if_it_had_never_stopped(
    runner: ModelRunner, foretold: Answers, num_delivered: int
) -> None:
    heads = {name: token_ids[:num_delivered] for name, (token_ids, _) in foretold.items()}
    unfinished = [r for r in requests() if len(foretold[r.request_id][0]) > num_delivered]
    assert len(unfinished) >= 5
    rests = run_to_end(
        make_engine(runner, max_step_tokens=13),
        [continued(request, heads[request.request_id]) for request in unfinished],
    )
    for name, (rest, reason) in rests.items():
        assert ((*heads[name], *rest), reason) == foretold[name]


def test_an_abort_leaves_the_neighbours_answers_as_they_are(
    runner: ModelRunner, foretold: Answers
) -> None:
    engine = make_engine(runner, max_step_tokens=8)
    for request in requests():
        engine.submit(request)
    answers: Answers = {}
    for name in ("greedy", "long"):
        step_into(answers, engine)
        assert engine.abort(name)
        answers.pop(name, None)
    while engine.has_work:
        step_into(answers, engine)
    assert answers == {name: foretold[name] for name in foretold if name not in ("greedy", "long")}


@both
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_cache_chunks_arrivals_and_losses_gives_the_same_answers(
    checkpoint: Path, foretold: Answers, seed: int, *, pipelined: bool
) -> None:
    random = Random(seed)
    block_size = random.choice([1, 3, 8, 16])
    max_batch_size = random.randint(1, 6)
    config = EngineConfig(
        backend=random.choice(BACKENDS),
        dtype="float32",
        device="cpu",
        block_size=block_size,
        num_blocks=random.randint(50, 90) // block_size + 1,  # the longest text has 49 tokens
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size + random.randint(0, 12),
        pipelined=pipelined,
    )
    engine = load_engine(checkpoint, config)
    whole = {request.request_id: request for request in requests()}
    waiting = random.sample(requests(), k=len(whole))
    delivered: dict[str, tuple[int, ...]] = dict.fromkeys(whole, ())
    reasons: dict[str, FinishReason] = {}
    while waiting or engine.has_work:
        if waiting and random.random() < 0.3:
            engine.submit(waiting.pop())
        lost = random.choice(list(whole))
        if random.random() < 0.1 and engine.abort(lost):
            waiting.append(continued(whole[lost], delivered[lost]))
        for output in engine.step():
            delivered[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    assert {name: (delivered[name], reasons[name]) for name in whole} == foretold
    assert engine.free_slots == max_batch_size


POISON = 95


@pytest.fixture(params=[(backend, ahead) for backend in BACKENDS for ahead in (False, True)])
def poisoned_engine(checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Engine:
    """A model in which one token's embedding overflows everything that sees it."""
    folder = tmp_path / "poisoned"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    # Blocks for one request at a time only, so that the next one gets the poisoned ones.
    backend, pipelined = request.param
    config = replace(settings_for(backend), num_blocks=8, pipelined=pipelined)
    return load_engine(folder, config)


def test_numbers_that_overflow_end_their_own_request_and_no_other(
    poisoned_engine: Engine, runner: ModelRunner
) -> None:
    sound = make_request("sound", prompt=[5, 6, 7, 8, 9], max_tokens=12)
    poison = make_request("poison", prompt=[5, 6, POISON, 8, 9, 10], max_tokens=12)
    expected = slow_answer(runner, sound)

    poisoned_engine.submit(poison)
    poisoned_engine.submit(sound)
    answers = run_to_end(poisoned_engine)
    assert answers == {"poison": ((), "error"), "sound": expected}

    poisoned_engine.submit(sound)
    assert run_to_end(poisoned_engine) == {"sound": expected}
