"""Drives an engine step by step and looks at the clock: what the parts of the benchmark share."""

import random
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.measuring import Prompt
from mixfleet_engine.engine import Engine
from mixfleet_engine.request import GenerateRequest

Figures = dict[str, Any]


class Driver:
    """Submits prompts to an engine and keeps the answers' tokens. No request ever ends by itself.

    Args:
        engine: Nobody else steps it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[str, list[int]] = {}
        """Tokens by request, of those that run or have ended."""
        self._num_submitted = 0

    def submit(self, prompt: Prompt, max_tokens: int) -> str:
        """Queue one; its name."""
        name = f"request-{self._num_submitted}"
        self._num_submitted += 1
        self.engine.submit(
            GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), max_tokens=max_tokens)
        )
        self.answers[name] = []
        return name

    def step(self) -> list[str]:
        """Run one step; who got tokens.

        Raises:
            RuntimeError: An answer ended for another reason than its length.
        """
        outputs = self.engine.step()
        for output in outputs:
            if output.finish_reason not in (None, "length"):
                raise RuntimeError(f"{output.request_id} ended: {output.finish_reason}")
            self.answers[output.request_id].extend(output.token_ids)
        return [output.request_id for output in outputs]

    def prefill(self, prompts: Sequence[Prompt]) -> float:
        """Return the seconds until each prompt has one token; nothing decodes meanwhile."""
        started = time.perf_counter()
        for prompt in prompts:
            self.submit(prompt, max_tokens=1)
        self.drain()
        return time.perf_counter() - started

    def start(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Run prompts until each has its first token; their names."""
        names = [self.submit(prompt, max_tokens) for prompt in prompts]
        waiting = set(names)
        while waiting:
            waiting -= set(self.step())
        return names

    def step_times(self, num_steps: int, num_running: int) -> list[float]:
        """Return the seconds of each of so many steps, every one of which must serve all.

        Raises:
            RuntimeError: A step served fewer.
        """
        times = []
        for _ in range(num_steps):
            started = time.perf_counter()
            served = self.step()
            times.append(time.perf_counter() - started)
            if len(served) != num_running:
                raise RuntimeError(f"{len(served)} of {num_running} requests in the step")
        return times

    def stop(self) -> None:
        """Abort all and wait for what runs."""
        for name in self.answers:
            self.engine.abort(name)
        self.drain()
        self.answers.clear()

    def drain(self) -> None:
        """Step until there is nothing left to do."""
        while self.engine.has_work:
            self.step()


def random_prompts(key: str, count: int, length: int, vocab_size: int) -> list[Prompt]:
    """Return prompts of random tokens, no two alike, the same each time for one ``key``."""
    source = random.Random(f"{key} {length}")
    return [source.choices(range(3, vocab_size), k=length) for _ in range(count)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that no less than ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]
