"""How the ranks of one model run the same steps: the first one leads, the others follow."""

import logging
from dataclasses import dataclass

from mixfleet_engine.engine import Runner
from mixfleet_engine.launch import Launch
from mixfleet_engine.plan_codec import decode_plan, encode_plan
from mixfleet_engine.ranks import Ranks, RanksLostError
from mixfleet_engine.step import SampledToken, StepPlan

logger = logging.getLogger(__name__)


class LeadingRunner:
    """Implements :class:`~mixfleet_engine.engine.Runner` on rank 0, for engines not pipelined.

    Unread tokens are on the device of rank 0 alone, which samples, so no plan may have any.

    Args:
        runner: Runs this rank's part.
        ranks: The others; each of them runs :func:`follow`.
    """

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._runner.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._runner.block_size

    def launch(self, plan: StepPlan) -> Launch:
        """Tell the other ranks the plan, run it with them and sample.

        Raises:
            RanksLostError: A rank is gone, or this one failed, perhaps half-way through a step
                that the others still wait in. There is no next step. The launch may raise it too.
            ValueError: The plan has unread tokens.
        """
        self._ranks.send(encode_plan(plan))
        try:
            return _LeadingLaunch(self._runner.launch(plan))
        except Exception as error:
            raise _lost(error) from error


@dataclass(frozen=True, slots=True)
class _LeadingLaunch:
    """Implements :class:`~mixfleet_engine.launch.Launch`."""

    launch: Launch

    def read(self) -> list[SampledToken]:
        try:
            return self.launch.read()
        except Exception as error:
            raise _lost(error) from error


def _lost(error: Exception) -> RanksLostError:
    logger.error("a step failed on rank 0", exc_info=error)
    return RanksLostError(f"a step failed on rank 0: {error!r}")


def follow(runner: Runner, ranks: Ranks) -> None:
    """Run the plans that rank 0 sends until it says that it was the last.

    Raises:
        RanksLostError: Another rank is gone.
    """
    while words := ranks.receive():
        runner.launch(decode_plan(words)).read()
