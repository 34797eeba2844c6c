"""Where the ranks of one group meet, as whoever started them says.

The one place that reads torchrun's environment variables: they are the protocol by which torchrun,
and `mixfleet worker --tp` in the same words, tells each process which rank it is. They are no
settings of ours, so the table of settings does not know them. Torch-free.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import ConfigError

_NUMBERS: Final = ("RANK", "WORLD_SIZE", "MASTER_PORT")
_AGENT: Final = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Which rank this process is and where it finds the others."""

    shard: Shard
    local_rank: int
    """Number among the ranks of this machine: the number of its device."""
    host: str
    port: int
    is_hosted: bool = False
    """Torchrun itself listens there; else rank 0 does."""
    attempt: str = "0"
    """How often torchrun has restarted the group."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self | None:
        """Return what the environment says; None: this process is on its own.

        Args:
            environ: Default: the environment of this process.

        Raises:
            ConfigError: The variables contradict each other.
        """
        environ = os.environ if environ is None else environ
        if not all(environ.get(name) for name in (*_NUMBERS, "MASTER_ADDR")):
            return None
        rank, world, port = (_number(environ, name) for name in _NUMBERS)
        if world == 1:
            return None
        return cls(
            shard=Shard(rank=rank, world=world),
            local_rank=_number(environ, "LOCAL_RANK") if environ.get("LOCAL_RANK") else rank,
            host=environ["MASTER_ADDR"],
            port=port,
            is_hosted=environ.get(_AGENT) == "True",
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def as_environment(self) -> dict[str, str]:
        """Return the variables that say all this to a process of its own."""
        return {
            "RANK": str(self.shard.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.shard.world),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            _AGENT: str(self.is_hosted),
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
        }


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"environment variable {name}={environ[name]!r}: no number") from None
