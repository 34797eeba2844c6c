"""How AWQ and GPTQ checkpoints store their matrices, as ``config.json`` says.

Torch-free. Both hold numbers of a few bits in int32 words, a scale and a zero point per output and
group of inputs, and mean ``(number - zero) * scale``; ``packed_matrix.py`` says where which lies.

Shape letters: N output width, K input width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from mixfleet_engine.checkpoint_names import engine_name, hf_tensor_names
from mixfleet_engine.errors import ConfigError

PackedMethod = Literal["awq", "gptq"]
PACKED_METHODS: Final = ("awq", "gptq")
WORD_BITS: Final = 32
OWN_GROUP: Final = 128
"""Inputs that share a scale in the engine's own int4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """What the packed matrices of one checkpoint have in common."""

    method: PackedMethod
    bits: int
    group_size: int | None
    """Inputs that share a scale; None: all of them."""
    has_zeros: bool
    """Whether zero points vary; else they all stand in the middle."""
    stores_zeros_less_one: bool = False
    """GPTQ's first format subtracts 1 from each zero point before it packs them."""
    names: frozenset[str] = frozenset()
    """Weights that are packed, under the engine's names; all others are plain."""

    @property
    def per_word(self) -> int:
        """Numbers in one int32."""
        return WORD_BITS // self.bits

    def num_groups(self, k: int) -> int:
        """Return how many groups K inputs have."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    @property
    def problem(self) -> str | None:
        """Why the engine's own int4 cannot hold these numbers as they are; None: it can."""
        if self.bits != 4:
            return f"bits={self.bits}: only 4 bits are run as they are"
        if self.group_size is not None and self.group_size % OWN_GROUP:
            return (
                f"group_size={self.group_size}: only multiples of {OWN_GROUP} are run as they are"
            )
        return None

    def check_runs_as_it_is(self) -> None:
        """Return if weights may stay as the files have them.

        Raises:
            ConfigError: They may not; the text says what to set.
        """
        if self.problem is not None:
            raise ConfigError(f"{self.method} checkpoint with {self.problem}; {CONVERT}")


CONVERT: Final = "weight_dtype=int8 (or fp8, int4) converts the weights while loading"


def packed_format(config: Mapping[str, Any], folder: Path) -> PackedFormat | None:
    """Return what ``config.json`` says of packed matrices; None: it has none.

    Args:
        config: The file's content.
        folder: Where it lies; which tensors are packed is read from the files' own lists.
            ``config`` has the model's sizes, if there are no files yet.

    Raises:
        ConfigError: A form that this engine does not read.
        CheckpointError: The files' list cannot be read.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in PACKED_METHODS:
        raise _refusal("quant_method", method, "awq or gptq")
    check = _check_awq if method == "awq" else _check_gptq
    check(found)
    return PackedFormat(
        method=cast("PackedMethod", method),
        bits=_bits(found, method),
        group_size=_group_size(found),
        has_zeros=bool(found.get("zero_point", True) if method == "awq" else not _is_sym(found)),
        stores_zeros_less_one=method == "gptq" and _checkpoint_format(found) == "gptq",
        names=_packed_names(config, folder),
    )


def _packed_names(config: Mapping[str, Any], folder: Path) -> frozenset[str]:
    stored = hf_tensor_names(folder)
    if stored is not None:
        packed = (name for name in stored if name.endswith(".qweight"))
        return frozenset(engine_name(name.replace(".qweight", ".weight")) for name in packed)
    # Only sizes are known: then it is what both tools pack unless told otherwise.
    attention = [f"attention.w{part}" for part in "qkvo"]
    numbers = range(config["num_local_experts"])
    experts = [f"feed_forward.experts.{number}.w{part}" for number in numbers for part in "123"]
    layers = range(config["num_hidden_layers"])
    return frozenset(f"layers.{n}.{name}.weight" for n in layers for name in attention + experts)


def _check_awq(found: Mapping[str, Any]) -> None:
    # AutoAWQ writes the word in either case, GPTQModel a second one beside it.
    for name in ("version", "checkpoint_format", "format"):
        if str(found.get(name) or "gemm").lower() != "gemm":
            raise _refusal(name, found[name], "gemm, for AWQ")


def _check_gptq(found: Mapping[str, Any]) -> None:
    if _checkpoint_format(found) not in ("gptq", "gptq_v2"):
        raise _refusal("checkpoint_format", _checkpoint_format(found), "gptq or gptq_v2")


def _checkpoint_format(found: Mapping[str, Any]) -> str:
    if found.get("is_marlin_format"):
        return "marlin"
    return str(found.get("checkpoint_format") or "gptq").lower()


def _is_sym(found: Mapping[str, Any]) -> bool:
    return bool(found.get("sym", True))


def _bits(found: Mapping[str, Any], method: str) -> int:
    bits = found.get("bits", found.get("w_bit"))
    known = (4,) if method == "awq" else (4, 8)
    if bits not in known:
        raise _refusal("bits", bits, f"{' or '.join(map(str, known))}, for {method.upper()}")
    return int(bits)


def _group_size(found: Mapping[str, Any]) -> int | None:
    size = found.get("group_size", found.get("q_group_size"))
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise _refusal("group_size", size, "a number of inputs, or -1")
    return None if size == -1 else size


def _refusal(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config: {name}={value!r}: must be {wanted}")
