"""How large a step may be, so that running answers keep their pace while prompts are prefilled.

The seconds of a step are predicted as a sum of non-negative shares, fitted online to the steps
that were measured::

    seconds = base + a * decodes + b * (1 if it prefills else 0) + c * prefill tokens
            + d * attended positions

The share ``b`` is there because a few decodes use few of a layer's experts, a prefill uses all.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace

from mixfleet_engine.step import StepPlan

_CAUTIOUS_TOKENS = 128
"""Prefill tokens in a step with decodes as long as nobody knows what a prefill costs."""
_ENOUGH_PREFILLS = 3
"""So many steps with a prefill must have been measured before a prediction counts; the first is
not learnt from."""
_MEMORY = 0.98
"""What a step counts for after each later one of its kind: about 50 are remembered."""
_OUTLIER = 3.0
"""A step counts less the more it is off by more than so many times what is usual."""
_CHANGED = 3
"""So many outliers in a row are no accident: the machine has changed, and its past is forgotten."""
_LEAST_NOISE = 0.02
"""Share of a step's time that is taken for usual even where measurements agree better."""
_SWEEPS = 8
"""Rounds of coordinate descent after each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What one step has to do."""

    num_decodes: int = 0
    """Chunks of one token."""
    num_prefill_tokens: int = 0
    """Tokens of all longer chunks."""
    num_attended: int = 0
    """Positions that the tokens look at, themselves included, added up over all tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return self.num_decodes + self.num_prefill_tokens

    def with_decode(self, start: int) -> "StepLoad":
        """This and one token after ``start`` cached ones."""
        return replace(
            self, num_decodes=self.num_decodes + 1, num_attended=self.num_attended + start + 1
        )

    def with_prefill(self, start: int, num_tokens: int) -> "StepLoad":
        """This and ``num_tokens`` prompt tokens after ``start`` cached ones."""
        attended = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return replace(
            self,
            num_prefill_tokens=self.num_prefill_tokens + num_tokens,
            num_attended=self.num_attended + attended,
        )

    @classmethod
    def of_decodes(cls, starts: Iterable[int]) -> "StepLoad":
        """The load of one token each after so many cached ones."""
        load = cls()
        for start in starts:
            load = load.with_decode(start)
        return load

    @classmethod
    def of(cls, plan: StepPlan) -> "StepLoad":
        """The load of ``plan``."""
        load = cls()
        for chunk in plan.chunks:
            num_tokens = len(chunk.token_ids)
            if num_tokens == 1:
                load = load.with_decode(chunk.start)
            else:
                load = load.with_prefill(chunk.start, num_tokens)
        return load


class StepTimeModel:
    """Predicts the seconds of a step: least squares over the steps so far, old ones forgotten.

    A step far off counts little, so that one hiccup of the machine does no harm; with several in a
    row the machine has changed, and those before them are forgotten. The first step of each kind
    counts nothing: it touches cold memory and is slow for reasons that do not come again.
    """

    def __init__(self) -> None:
        self._shares = [0.0] * len(_features(StepLoad()))
        # Apart, so that what was learnt of prefills outlives a long time without any.
        self._seen = {prefills: _Seen(len(self._shares)) for prefills in (False, True)}
        self._usual_error_s = 0.0
        self._num_learnt = 0
        self._num_outliers = 0
        """In a row, up to now."""

    @property
    def usual_error_s(self) -> float:
        """How many seconds off a prediction was lately, hiccups left out."""
        return self._usual_error_s

    @property
    def knows_prefill(self) -> bool:
        """Whether enough prefills were measured for a prediction to count."""
        return self._seen[True].num_steps >= _ENOUGH_PREFILLS

    def predict(self, load: StepLoad) -> float:
        """Return the seconds that a step of this load should take; never negative."""
        return _dot(self._shares, _features(load))

    def learn(self, load: StepLoad, elapsed_s: float) -> None:
        """Take note of a step that took ``elapsed_s`` seconds."""
        seen = self._seen[load.num_prefill_tokens > 0]
        seen.num_steps += 1
        if seen.num_steps == 1:
            return
        weight = self._weight(elapsed_s, self.predict(load))
        if self._num_outliers >= _CHANGED:
            for kind in self._seen.values():
                kind.forget()
            self._num_outliers = 0
        seen.add(_features(load), elapsed_s, weight)
        self._num_learnt += 1
        self._fit()

    def prefill_tokens_within(
        self, target_s: float, load: StepLoad, *, start: int, limit: int
    ) -> int:
        """Most prompt tokens that can join ``load`` so that the step is predicted to keep a target.

        Args:
            target_s: Seconds that the step should take at most.
            load: What the step does already.
            start: Tokens of that prompt in the cache.
            limit: Most tokens to answer.
        """
        fits, too_many = 0, limit + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.predict(load.with_prefill(start, middle)) <= target_s:
                fits = middle
            else:
                too_many = middle
        return fits

    def _weight(self, elapsed_s: float, predicted_s: float) -> float:
        """What a step counts for, by how far it is off; takes note of how far off is usual."""
        if self._num_learnt == 0:
            self._usual_error_s = elapsed_s
            return 1.0
        error_s = abs(elapsed_s - predicted_s)
        most_s = _OUTLIER * max(self._usual_error_s, _LEAST_NOISE * predicted_s, 1e-9)
        rate = max(1 - _MEMORY, 1 / self._num_learnt)
        self._usual_error_s += rate * (min(error_s, most_s) - self._usual_error_s)
        self._num_outliers = self._num_outliers + 1 if error_s > most_s else 0
        if self._num_outliers >= _CHANGED:
            return 1.0
        return min(1.0, most_s / max(error_s, 1e-9))

    def _fit(self) -> None:
        """Move the shares towards the least squares among those that are not negative.

        Coordinate descent from where they are: a share that the steps say nothing of stays.
        """
        few, many = self._seen.values()
        rows = [_sum(*pair) for pair in zip(few.products, many.products, strict=True)]
        wanted = _sum(few.moments, many.moments)
        for _ in range(_SWEEPS):
            for i, row in enumerate(rows):
                if row[i] > 0:
                    missing = wanted[i] - _dot(row, self._shares)
                    self._shares[i] = max(0.0, self._shares[i] + missing / row[i])


class _Seen:
    """The steps of one kind, summed up for least squares."""

    def __init__(self, size: int) -> None:
        self.num_steps = 0
        """All there were, learnt from or not."""
        self.products = [[0.0] * size for _ in range(size)]
        """Of every two features."""
        self.moments = [0.0] * size
        """Of every feature with the seconds."""

    def add(self, features: Row[float], elapsed_s: float, weight: float) -> None:
        for i, left in enumerate(features):
            self.moments[i] = _MEMORY * self.moments[i] + weight * left * elapsed_s
            row = self.products[i]
            for j, right in enumerate(features):
                row[j] = _MEMORY * row[j] + weight * left * right

    def forget(self) -> None:
        """Start the sums anew."""
        size = len(self.moments)
        self.products = [[0.0] * size for _ in range(size)]
        self.moments = [0.0] * size


class StepBudget:
    """What still fits into the step that is being planned.

    Args:
        model: Predicts its seconds.
        decodes: What goes into it in any case.
        max_tokens: Most tokens of the whole step.
        floor: Prompt tokens that go in however long the step gets, so that prefills advance.
        target_s: Seconds that the step should take at most if it decodes.
    """

    def __init__(
        self,
        model: StepTimeModel,
        decodes: StepLoad,
        *,
        max_tokens: int,
        floor: int,
        target_s: float,
    ) -> None:
        self._model = model
        self._load = decodes
        self._max_tokens = max_tokens
        self._floor = floor
        self._target_s = target_s

    @property
    def is_open(self) -> bool:
        """Whether at least one token of some prompt would fit."""
        return self._fitting(start=0, limit=1) > 0

    def take(self, *, start: int, num_pending: int) -> int:
        """Book the next chunk of a prompt and return how many of its pending tokens it has.

        Args:
            start: Tokens of the prompt in the cache.
            num_pending: Tokens of it that are not.
        """
        num_tokens = self._fitting(start=start, limit=num_pending)
        self._load = self._load.with_prefill(start, num_tokens)
        return num_tokens

    def _fitting(self, *, start: int, limit: int) -> int:
        load = self._load
        limit = min(limit, self._max_tokens - load.num_tokens)
        if load.num_decodes == 0 or self._target_s == math.inf:
            return limit
        if self._model.knows_prefill:
            # Half of all steps take longer than predicted, so the aim is nearer than the target.
            aim_s = max(self._target_s / 2, self._target_s - self._model.usual_error_s)
            fitting = self._model.prefill_tokens_within(aim_s, load, start=start, limit=limit)
        else:
            fitting = _CAUTIOUS_TOKENS - load.num_prefill_tokens
        return min(limit, max(0, fitting, self._floor - load.num_prefill_tokens))


def _features(load: StepLoad) -> tuple[float, ...]:
    # Scaled to be of one order of size, which coordinate descent needs.
    return (
        1.0,
        load.num_decodes / 10,
        float(load.num_prefill_tokens > 0),
        load.num_prefill_tokens / 100,
        load.num_attended / 10_000,
    )


def _dot(left: Row[float], right: Row[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _sum(left: Row[float], right: Row[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]
