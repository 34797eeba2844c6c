"""The autotuner: which of a few candidates of a kernel is the fastest on this GPU.

The candidates of one kernel must add up in the same order: tuning may change how long a result
takes, never the result.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

import torch
from triton.errors import TritonError

from mixfleet_engine.ops.cuda.cold_timer import ColdTimer
from mixfleet_engine.ops.cuda.tuning_file import Fields, TunedFor, TuningFile, cache_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

Candidate = TypeVar("Candidate", bound="DataclassInstance")
Measure = Callable[[Callable[[], object]], float]
"""Returns the seconds that a launch takes; the first one of a kernel may compile it."""
BUDGET_S: Final = 120.0
CANNOT_RUN: Final = (TritonError, RuntimeError)
"""What a candidate raises that does not compile or has not the room: Triton's, its compiler's and
the driver's errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningKey:
    """What a choice is made for."""

    kernel: str
    form: str
    """Of the weights, as ``weight_formats.py`` calls it."""
    n: int
    k: int
    tokens: int
    """A bucket, see `tokens_bucket`."""
    dtype: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.form} n={self.n} k={self.k} tokens={self.tokens} {self.dtype}"


def tokens_bucket(num_tokens: int, largest: int = 4096) -> int:
    """Return the power of two at or above ``num_tokens``, at most ``largest``."""
    return min(largest, 1 << max(0, num_tokens - 1).bit_length())


class Tuner:
    """Chooses, and remembers what it chose; of one process and one GPU."""

    def __init__(
        self,
        file: TuningFile | None,
        measure: Measure,
        *,
        enabled: bool = True,
        budget_s: float = BUDGET_S,
        now: Callable[[], float] = time.monotonic,
        capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        self._file: Final = file
        self._measure: Final = measure
        self._enabled: Final = enabled
        self._left_s = budget_s
        self._now: Final = now
        self._capturing: Final = capturing
        self._chosen: Final[dict[TuningKey, Any]] = {}
        self._stored: dict[str, Fields] | None = None
        self._said: Final[set[str]] = set()

    @classmethod
    def of_device(
        cls,
        device: torch.device,
        *,
        folder: Path | None = None,
        enabled: bool = True,
        budget_s: float = BUDGET_S,
    ) -> Self:
        """Return the tuner of a GPU.

        Args:
            device: The GPU.
            folder: Where choices are kept; None: the user's cache.
            enabled: Whether to choose at all; else defaults are used, and no file.
            budget_s: After this time spent on tuning, defaults are used.
        """
        file = TuningFile(folder or cache_folder(), TunedFor.here(device)) if enabled else None
        return cls(file, ColdTimer(device), enabled=enabled, budget_s=budget_s)

    def choose(
        self, key: TuningKey, candidates: Sequence[Candidate], launch: Callable[[Candidate], object]
    ) -> Candidate:
        """Return the fastest candidate for ``key``, the same one whenever it is asked again.

        Args:
            key: What is chosen for.
            candidates: The first is the default.
            launch: Runs the kernel once as a candidate says, on the current stream. What it
                writes must not matter.
        """
        known = self._chosen.get(key)
        if known is not None:
            return cast("Candidate", known)
        default = candidates[0]
        if not self._enabled or len(candidates) == 1:
            return default
        stored = self._find_stored(key, candidates)
        if stored is None and self._capturing():
            # Not remembered: there may be time for it outside of the graph.
            self._say_once("%s is first used in a CUDA graph, where nothing is tuned", key)
            return default
        chosen = stored or self._tune(key, candidates, launch)
        self._chosen[key] = chosen
        return chosen

    def _find_stored(self, key: TuningKey, candidates: Sequence[Candidate]) -> Candidate | None:
        if self._stored is None:
            self._stored = self._file.read() if self._file else {}
        fields = self._stored.get(str(key))
        return next((found for found in candidates if asdict(found) == fields), None)

    def _tune(
        self, key: TuningKey, candidates: Sequence[Candidate], launch: Callable[[Candidate], object]
    ) -> Candidate:
        """Return the fastest candidate; it goes to the file if the budget sufficed for all."""
        times: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            if self._left_s <= 0:
                self._say_once("no time is left for tuning, from %s on defaults are used", key)
                break
            started = self._now()
            seconds = self._time(key, candidate, launch)
            self._left_s -= self._now() - started
            if seconds is not None:
                times.append((seconds, candidate))
        else:
            return self._fastest_of_all(key, candidates[0], times)
        # Of equal times the earlier candidate wins, as the default should.
        return min(times, key=lambda found: found[0])[1] if times else candidates[0]

    def _fastest_of_all(
        self, key: TuningKey, default: Candidate, times: list[tuple[float, Candidate]]
    ) -> Candidate:
        if not times:
            logger.warning("no candidate of %s runs; its default is tried again when needed", key)
            return default
        seconds, chosen = min(times, key=lambda found: found[0])
        logger.info("tuned %s: %s takes %.1f us", key, chosen, seconds * 1e6)
        if self._file:
            self._file.add({str(key): asdict(chosen)})
        return chosen

    def _time(
        self, key: TuningKey, candidate: Candidate, launch: Callable[[Candidate], object]
    ) -> float | None:
        """Return the seconds of a launch; None: the candidate cannot run."""
        try:
            return self._measure(lambda: launch(candidate))
        except CANNOT_RUN as error:
            logger.debug("%s: %s cannot run: %s", key, candidate, error)
            return None

    def _say_once(self, text: str, key: TuningKey) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.info(text, key)
