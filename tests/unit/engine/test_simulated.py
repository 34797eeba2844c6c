import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.errors import ConfigError, InvalidRequestError, PromptTooLongError
from mixfleet_engine.request import SamplingParams, TokenLogprobs
from mixfleet_engine.simulated import SimulatedEngine
from mixfleet_worker.simulated_words import SimulatedWords
from support.engine_requests import make_request, run_to_end


def make_engine(**changes: Any) -> SimulatedEngine:
    settings_: dict[str, Any] = {"token_ids": range(100, 200), "vocab_size": 256}
    return SimulatedEngine(**{**settings_, **changes})


def answer(engine: SimulatedEngine, **fields: Any) -> tuple[int, ...]:
    ((token_ids, _),) = run_to_end(engine, [make_request(**fields)]).values()
    return token_ids


def test_the_simulated_engine_fits_the_door() -> None:
    engine: GenerationEngine = make_engine(context_length=64, max_batch_size=3)
    assert (engine.context_length, engine.free_slots, engine.free_tokens) == (64, 3, 192)
    assert not engine.has_work


def test_importing_it_needs_no_torch() -> None:
    program = "import sys, mixfleet_engine.simulated; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_answer_is_made_of_the_given_tokens() -> None:
    engine = make_engine(token_ids=(7, 9))
    assert set(answer(engine, max_tokens=40)) == {7, 9}


def test_the_same_request_gets_the_same_answer_on_any_worker() -> None:
    assert answer(make_engine(), max_tokens=20) == answer(make_engine(), max_tokens=20)


@pytest.mark.parametrize(
    "changes", [{"prompt": (1, 2, 4)}, {"prompt": (1, 2)}, {"sampling": SamplingParams(seed=1)}]
)
def test_another_prompt_or_seed_gets_another_answer(changes: dict[str, Any]) -> None:
    other = answer(make_engine(), max_tokens=20, **changes)
    assert other != answer(make_engine(), max_tokens=20)


def test_max_tokens_only_cuts_the_answer() -> None:
    assert answer(make_engine(), max_tokens=5) == answer(make_engine(), max_tokens=9)[:5]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    delivered=st.integers(0, 29),
    num_blocks=st.integers(10, 20),
    max_step_tokens=st.integers(4, 12),
    lengths=st.one_of(st.none(), st.builds(range, st.integers(1, 9), st.integers(10, 40))),
    pipelined=st.booleans(),
)
def test_a_crowd_gets_the_answers_foretold_whole_or_continued(
    delivered: int, num_blocks: int, max_step_tokens: int, lengths: range | None, *, pipelined: bool
) -> None:
    engine = make_engine(
        answer_lengths=lengths,
        num_blocks=num_blocks,
        block_size=4,
        max_batch_size=4,
        max_step_tokens=max_step_tokens,
        pipelined=pipelined,
    )
    whole = [make_request(f"r{n}", prompt=(n,), max_tokens=30, stops=(150,)) for n in range(6)]
    foretold = {request.request_id: engine.answer(request) for request in whole}
    requests = []
    for request in whole:
        head = foretold[request.request_id][: min(delivered, len(foretold[request.request_id]) - 1)]
        requests.append(
            make_request(
                request.request_id,
                prompt=request.prompt_token_ids,
                output=head,
                max_tokens=30,
                stops=(150,),
            )
        )
    answers = run_to_end(engine, requests)
    for request in requests:
        token_ids, reason = answers[request.request_id]
        assert (*request.output_token_ids, *token_ids) == foretold[request.request_id]
        assert reason == ("stop" if token_ids[-1] == 150 else "length")
    assert engine.free_tokens == num_blocks * 4


def test_an_answer_has_no_stop_token_before_its_end() -> None:
    token_ids = answer(make_engine(), max_tokens=500, stops=range(100, 199))
    assert token_ids == (199,) * 500


@pytest.mark.parametrize("length", [1, 2, 7])
def test_an_answer_ends_with_the_lowest_stop_token_at_the_given_length(length: int) -> None:
    engine = make_engine(answer_lengths=range(length, length + 1))
    request = make_request(max_tokens=50, stops=(2, 150))
    ((token_ids, reason),) = run_to_end(engine, [request]).values()
    assert (len(token_ids), token_ids[-1], reason) == (length, 2, "stop")
    assert not {2, 150} & set(token_ids[:-1])


def test_lengths_differ_from_prompt_to_prompt_within_the_given_range() -> None:
    engine = make_engine(answer_lengths=range(5, 9))
    lengths = {len(answer(engine, prompt=(n,), max_tokens=99, stops=(2,))) for n in range(40)}
    assert lengths == {5, 6, 7, 8}


def test_without_stop_tokens_the_answer_goes_on_to_max_tokens() -> None:
    assert len(answer(make_engine(answer_lengths=range(2, 3)), max_tokens=11)) == 11


def logprobs(
    engine: SimulatedEngine, num_top: int | None, output: Iterable[int] = (), **fields: Any
) -> list[TokenLogprobs]:
    """What it says of 12 tokens, or of the rest of them."""
    sampling = SamplingParams(logprobs=num_top)
    engine.submit(make_request(output=output, max_tokens=12, sampling=sampling, **fields))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert all(len(output.token_ids) == 1 for output in outputs)
    return [found for output in outputs for found in output.logprobs]


def test_nobody_hears_of_logprobs_who_does_not_ask() -> None:
    assert logprobs(make_engine(), None) == []
    assert [found.top for found in logprobs(make_engine(), 0)] == [()] * 12


def test_its_logprobs_could_be_a_models() -> None:
    token_ids = answer(make_engine(), max_tokens=12)
    for token_id, found in zip(token_ids, logprobs(make_engine(), 20), strict=True):
        assert found.top[0] == (token_id, found.logprob)
        assert len({other for other, _ in found.top}) == len(found.top) == 20
        values = [value for _, value in found.top]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1.0
        assert {other for other, _ in found.top} <= set(range(100, 200))


def test_its_logprobs_differ_from_token_to_token_and_not_from_worker_to_worker() -> None:
    once, again = logprobs(make_engine(), 3), logprobs(make_engine(), 3)
    assert once == again
    assert len({found.logprob for found in once}) == 12
    assert logprobs(make_engine(), 3, prompt=(5,)) != once


def test_its_logprobs_go_on_where_another_worker_continues() -> None:
    token_ids = answer(make_engine(), max_tokens=12)
    continued = logprobs(make_engine(), 3, output=token_ids[:5])
    assert len(continued) == 7
    assert continued == logprobs(make_engine(), 3)[5:]


def test_it_reports_no_more_tokens_than_it_has() -> None:
    found = logprobs(make_engine(token_ids=(7, 9, 9)), 5)
    assert {len(one.top) for one in found} == {2}


def test_every_step_takes_its_time_and_every_token_too() -> None:
    slept: list[float] = []
    engine = make_engine(step_s=0.5, token_s=0.25, sleep=slept.append)
    answer(engine, prompt=(1, 2, 3), max_tokens=3)
    assert slept == [1.25, 0.75, 0.75]


def test_a_beginning_that_was_computed_takes_no_time_again() -> None:
    slept: list[float] = []
    engine = make_engine(token_s=1.0, sleep=slept.append)
    for _ in range(2):
        answer(engine, prompt=range(40), max_tokens=1)
    assert slept == [40.0, 8.0]
    assert (engine.prefix_queried_tokens, engine.prefix_hit_tokens) == (80, 32)


def test_without_the_prefix_cache_every_prompt_takes_its_time() -> None:
    slept: list[float] = []
    engine = make_engine(token_s=1.0, sleep=slept.append, prefix_cache=False)
    for _ in range(2):
        answer(engine, prompt=range(40), max_tokens=1)
    assert slept == [40.0, 40.0]


def test_a_target_keeps_prompts_from_holding_up_answers() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    engine = make_engine(token_s=0.01, sleep=sleep, clock=lambda: now[0], itl_target_s=0.2)
    engine.submit(make_request("chat", max_tokens=300))
    engine.step()
    for number in range(4):
        engine.submit(make_request(f"long {number}", prompt=[number] * 500, max_tokens=1))
    gaps = []
    while engine.has_work:
        before = now[0]
        engine.step()
        gaps.append(now[0] - before)
    # The first two prefills are made before anything is known of their cost.
    assert max(gaps[2:]) <= 0.26
    assert max(gaps[2:]) >= 0.15


def test_without_latency_it_never_sleeps() -> None:
    slept: list[float] = []
    answer(make_engine(sleep=slept.append))
    assert slept == []


def test_a_step_without_work_takes_no_time() -> None:
    slept: list[float] = []
    assert make_engine(step_s=1.0, sleep=slept.append).step() == []
    assert slept == []


def test_aborted_and_finished_requests_can_come_again() -> None:
    engine = make_engine()
    expected = answer(engine)
    engine.submit(make_request())
    engine.step()
    assert engine.abort("r")
    assert not engine.abort("r")
    assert answer(engine) == expected


def test_a_request_can_be_aborted_while_the_step_takes_its_time() -> None:
    def abort_a(_: float) -> None:
        assert engine.abort("a")

    engine = make_engine(step_s=1.0, sleep=abort_a)
    for name in "ab":
        engine.submit(make_request(name))
    assert [output.request_id for output in engine.step()] == ["b"]


def test_an_overdue_request_ends_and_can_come_again() -> None:
    now = [0.0]
    engine = make_engine(clock=lambda: now[0])
    expected = engine.answer(make_request())
    engine.submit(make_request(deadline=1.0))
    engine.step()
    now[0] = 1.0
    (output,) = engine.step()
    assert (output.token_ids, output.finish_reason) == ((), "deadline")
    assert answer(engine) == expected


def test_a_better_priority_goes_first() -> None:
    engine = make_engine(max_batch_size=1)
    for name, priority in (("worse", 1), ("better", 0)):
        engine.submit(make_request(name, max_tokens=2, priority=priority))
    assert ids(engine, 4) == ["better", "better", "worse", "worse"]


@pytest.mark.parametrize("pipelined", [False, True])
def test_requests_leave_nothing_behind_in_memory(*, pipelined: bool) -> None:
    # Few blocks, each of which is soon in doubt or has been: that is remembered as well.
    engine = make_engine(pipelined=pipelined, num_blocks=16)
    sizes = []
    for turn in range(5):
        run_to_end(engine, [make_request(f"finished {turn} {n}") for n in range(20)])
        for number in range(20):
            engine.submit(make_request(f"aborted {turn} {number}"))
        engine.step()
        for number in range(20):
            engine.abort(f"aborted {turn} {number}")
        run_to_end(engine)
        sizes.append(len(pickle.dumps(engine)))
    # The counters alone grow, by a byte or two.
    assert sizes[-1] <= sizes[1] + 16


def test_it_refuses_what_a_real_engine_refuses() -> None:
    engine = make_engine(context_length=16)
    with pytest.raises(PromptTooLongError):
        engine.submit(make_request(max_tokens=14))
    with pytest.raises(InvalidRequestError, match="prompt_token_ids holds 256"):
        engine.submit(make_request(prompt=(256,)))
    with pytest.raises(InvalidRequestError, match="seed=-1"):
        engine.submit(make_request(sampling=SamplingParams(seed=-1)))
    with pytest.raises(InvalidRequestError, match="prompt_token_ids is empty"):
        engine.submit(make_request(prompt=()))
    assert not engine.has_work


def test_a_second_request_with_a_live_id_leaves_the_first_as_it_was() -> None:
    engine = make_engine()
    first = make_request(max_tokens=6)
    engine.submit(first)
    with pytest.raises(InvalidRequestError, match="request_id='r'"):
        engine.submit(make_request(prompt=(9, 9)))
    assert run_to_end(engine)["r"][0] == engine.answer(first)


def test_a_request_whose_stop_tokens_are_all_it_could_say_is_refused() -> None:
    engine = make_engine(token_ids=(7, 8))
    with pytest.raises(InvalidRequestError, match="all 2 tokens"):
        engine.submit(make_request(stops=(7, 8, 9)))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_ids": ()}, "token_ids"),
        ({"token_ids": (-1, 3)}, "token_ids"),
        ({"answer_lengths": range(0)}, "answer_lengths"),
        ({"answer_lengths": range(3)}, "answer_lengths"),
        ({"step_s": -0.1}, "step_s=-0.1"),
        ({"token_s": float("nan")}, "token_s=nan"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_step_tokens": 0}, "max_step_tokens=0"),
        ({"context_length": 0}, "context_length=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_engine(**changes)


def ids(engine: SimulatedEngine, steps: int) -> Iterable[str]:
    return [output.request_id for _ in range(steps) for output in engine.step()]


def test_no_more_requests_run_at_once_than_the_batch_holds() -> None:
    engine = make_engine(max_batch_size=2)
    for name in "abc":
        engine.submit(make_request(name, max_tokens=2))
    assert ids(engine, 3) == ["a", "b", "a", "b", "c"]


def test_a_simulated_answer_follows_its_grammar_and_goes_on_alike_elsewhere() -> None:
    words = SimulatedWords()
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"enum": [1, 2]}}},
        "required": ["a", "b"],
    }
    for seed in range(20):
        request = make_request(
            prompt=(1, 2),
            max_tokens=400,
            stops=[words.eos_id],
            sampling=SamplingParams(seed=seed),
            grammar=f"start: %json {json.dumps(schema)}",
        )
        engine = make_engine(token_ids=words.word_ids, vocab_size=words.vocab_size, tokenizer=words)
        token_ids, reason = run_to_end(engine, [request])["r"]
        assert reason == "stop"
        value = json.loads(b"".join(map(words.token_bytes, token_ids)))
        assert isinstance(value["a"], str)
        assert set(value["b"]) <= {1, 2}
        begun = replace(request, output_token_ids=token_ids[:7])
        assert run_to_end(engine, [begun])["r"] == (token_ids[7:], "stop")


def test_a_simulated_engine_without_a_tokenizer_refuses_a_grammar() -> None:
    with pytest.raises(InvalidRequestError, match="without a tokenizer"):
        make_engine().submit(make_request(grammar='start: "a"'))
