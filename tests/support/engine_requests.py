"""Short ways to write requests and to run an engine to its end."""

from collections.abc import Iterable

from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.request import FinishReason, GenerateRequest, SamplingParams

Answers = dict[str, tuple[tuple[int, ...], FinishReason | None]]
"""New tokens and finish reason by request id."""


def make_request(
    request_id: str = "r",
    *,
    prompt: Iterable[int] = (1, 2, 3),
    output: Iterable[int] = (),
    max_tokens: int = 4,
    stops: Iterable[int] = (),
    sampling: SamplingParams | None = None,
    priority: int = 0,
    deadline: float | None = None,
    grammar: str | None = None,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(output),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stops),
        sampling=sampling or SamplingParams(),
        priority=priority,
        deadline=deadline,
        grammar=grammar,
    )


def step_into(answers: Answers, engine: GenerationEngine) -> None:
    """Run one step and add what it brought to ``answers``."""
    for output in engine.step():
        token_ids, finish_reason = answers.get(output.request_id, ((), None))
        assert finish_reason is None, f"{output.request_id} went on after its end"
        assert output.token_ids or output.finish_reason not in (None, "length")
        answers[output.request_id] = (*token_ids, *output.token_ids), output.finish_reason


def run_to_end(
    engine: GenerationEngine, requests: Iterable[GenerateRequest] = (), *, max_steps: int = 10_000
) -> Answers:
    """Submit ``requests`` and step until nothing is left, at most ``max_steps`` times."""
    for request in requests:
        engine.submit(request)
    answers: Answers = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return answers
        step_into(answers, engine)
    raise AssertionError(f"still at work after {max_steps} steps")
