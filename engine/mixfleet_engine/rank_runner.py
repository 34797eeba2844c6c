"""How the ranks of one model run the same steps: the first one leads, the others follow."""

import logging

from mixfleet_engine.engine import Runner
from mixfleet_engine.plan_codec import decode_plan, encode_plan
from mixfleet_engine.ranks import Ranks, RanksLostError
from mixfleet_engine.step import SampledToken, StepPlan

logger = logging.getLogger(__name__)


class LeadingRunner:
    """Implements :class:`~mixfleet_engine.engine.Runner` on rank 0.

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

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Tell the other ranks the plan, run it with them and sample.

        Raises:
            RanksLostError: A rank is gone, or this one failed, perhaps half-way through a step
                that the others still wait in. There is no next step.
        """
        self._ranks.send(encode_plan(plan))
        try:
            return self._runner.run(plan)
        except Exception as error:
            logger.exception("a step failed on rank 0")
            raise RanksLostError(f"a step failed on rank 0: {error!r}") from error


def follow(runner: Runner, ranks: Ranks) -> None:
    """Run the plans that rank 0 sends until it says that it was the last.

    Raises:
        RanksLostError: Another rank is gone.
    """
    while words := ranks.receive():
        runner.run(decode_plan(words))
