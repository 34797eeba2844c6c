"""A step on its way: handed to the device, its tokens not read yet."""

from dataclasses import dataclass
from typing import Protocol

from mixfleet_engine.step import SampledToken


class Launch(Protocol):
    """What a runner gives back for a plan that it has begun."""

    def read(self) -> list[SampledToken]:
        """Wait for the step; one token per chunk that samples, in the plan's order.

        A chunk whose logits are not finite gives ``NO_TOKEN``. To be called once at most: after an
        error of this or another launch nobody asks any more.
        """
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """The launch of a runner that computes at once."""

    tokens: list[SampledToken]

    def read(self) -> list[SampledToken]:
        """Return the tokens; nobody waits."""
        return self.tokens
