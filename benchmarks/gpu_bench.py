"""What the parts of a stage share, and what a part is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_floor import Rates
from benchmarks.gpu_load import Loaded, NotMeasurableError, load
from benchmarks.gpu_requests import Figures
from benchmarks.gpu_scale import Scale
from mixfleet_engine.loading import resolve_device


class Bench:
    """What the parts of a stage share: sizes, time, and the model that the first of them loads."""

    def __init__(self, scale: Scale, rates: Rates | None, budget: Budget) -> None:
        self.scale = scale
        self.rates = rates
        """The machine's; None: there are no floors."""
        self.budget = budget
        self.device = resolve_device("auto")
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        """The model.

        Raises:
            NotMeasurableError: It was not loaded.
        """
        if self._loaded is None:
            raise NotMeasurableError("the model was not loaded")
        return self._loaded

    def load(self, found: Figures, scale: Scale | None = None, **settings: Any) -> None:
        """Load a random model and keep it; arguments as for `load`."""
        self._loaded = load(scale or self.scale, **settings)
        runner = self._loaded.runner
        found["load_s"] = self._loaded.load_s
        found["layers"] = self._loaded.scale.model.n_layers
        found["kv_tokens"] = runner.num_blocks * runner.block_size
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found["held_bytes"] = torch.cuda.memory_allocated(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement."""

    name: str
    needed_s: float
    """It is not begun with less time left."""
    measure: Callable[[Bench, Figures], Iterator[None] | None]
    """Fills the figures as it goes: what was measured before an error counts. If it takes long, it
    yields whenever there is more to be saved."""
