"""Which part of each weight, and of the KV cache, one rank of a tensor-parallel group holds.

Torch-free. ``wq``, ``wk``, ``wv`` are cut between heads and ``wo`` along its inputs, so that a rank
runs whole heads; ``w1`` and ``w3`` are cut along their outputs and ``w2`` along its inputs, so that
it runs a strip of each expert; embedding and output are cut between tokens of the vocabulary. Norms
and routers are whole on every rank. What attention and experts return is then a partial sum.
"""

from dataclasses import replace
from typing import Final

from mixfleet_engine.config import ModelConfig, Shard
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.plan import sharing_problem
from mixfleet_engine.weight_formats import INT4_GROUP, kind_name, weight_kinds

WHOLE: Final = slice(None)


def check_sharing(model: ModelConfig, world: int, *, weight_dtype: str = "auto") -> None:
    """Make sure that ``world`` ranks can share the model.

    Raises:
        ConfigError: They cannot; the text has the numbers and the sizes that work.
    """
    problem = _problem(model, world, weight_dtype)
    if problem is not None:
        sizes = ", ".join(map(str, working_sizes(model, weight_dtype=weight_dtype)))
        raise ConfigError(f"{problem}; sizes that work: {sizes}")


def working_sizes(model: ModelConfig, *, weight_dtype: str = "auto") -> list[int]:
    """Return the numbers of ranks that can share the model; 1 is always among them."""
    return [
        world
        for world in range(1, model.n_kv_heads + 1)
        if _problem(model, world, weight_dtype) is None
    ]


def share_of(model: ModelConfig, shard: Shard) -> ModelConfig:
    """Return the sizes of the blocks and of the KV cache of one rank.

    ``vocab_size`` stays the whole one: it is the range of token ids everywhere.

    Raises:
        ConfigError: So many ranks cannot share the model.
    """
    # The form of the weights does not matter here, and only that of int8 has no say in the sizes.
    check_sharing(model, shard.world, weight_dtype="int8")
    return replace(
        model,
        n_heads=model.n_heads // shard.world,
        n_kv_heads=model.n_kv_heads // shard.world,
        hidden_dim=model.hidden_dim // shard.world,
    )


def part_of(size: int, shard: Shard) -> slice:
    """Return the rank's part of ``size`` neighbours; the parts differ by one at most.

    Worked example, 5 neighbours and 3 ranks: ``[0, 1)``, ``[1, 3)``, ``[3, 5)``.
    """
    start, stop = (size * rank // shard.world for rank in (shard.rank, shard.rank + 1))
    return slice(start, stop)


class WeightCuts:
    """Where one rank's part of each weight lies."""

    def __init__(self, model: ModelConfig, shard: Shard) -> None:
        self._shard = shard
        self._axes = {kind.name: kind.split for kind in weight_kinds(model)}

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Return the rows and the columns of the weight ``name`` of the whole ``shape``."""
        axis = self._axes[kind_name(name)]
        if axis is None or self._shard.world == 1:
            return WHOLE, WHOLE
        part = part_of(shape[axis], self._shard)
        return (part, WHOLE) if axis == 0 else (WHOLE, part)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank's part of the weight ``name`` of the whole ``shape``."""
        cuts = self.of(name, shape)
        return tuple(len(range(size)[cut]) for size, cut in zip(shape, cuts, strict=False))


def _problem(model: ModelConfig, world: int, weight_dtype: str) -> str | None:
    problem = sharing_problem(model, world) or _vocabulary_problem(model, world)
    has_groups = weight_dtype == "int4" or (weight_dtype == "auto" and model.packed is not None)
    return _group_problem(model, world) if problem is None and has_groups else problem


def _vocabulary_problem(model: ModelConfig, world: int) -> str | None:
    if model.vocab_size < world:
        return f"tp={world}: {world} ranks cannot share vocab_size={model.vocab_size}"
    return None


def _group_problem(model: ModelConfig, world: int) -> str | None:
    """Return why int4 cannot be cut so; one process may leave the last group of a row shorter.

    A group across the border of two ranks would have two scales where one process has one, so the
    same model would be another one at each number of ranks.
    """
    inputs = {"n_heads * head_dim": model.n_heads * model.head_dim, "hidden_dim": model.hidden_dim}
    for name, size in inputs.items():
        if world > 1 and size // world % INT4_GROUP:
            return (
                f"tp={world}: {name}={size} is {size // world} inputs a rank, no multiple of "
                f"the {INT4_GROUP} that share a scale in int4"
            )
    return None
