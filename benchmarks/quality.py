"""What fewer bits cost: how far the next-token distribution of each weight dtype is from fp32's.

The text is cut into windows, each of which goes through the model on its own; every position but
the last of a window predicts a token that is known. A row per variant: the mean Kullback-Leibler
divergence from fp32 and from bf16 to it, how often its most likely token is theirs, and its
perplexity. The reference operations round weights only and compute in fp32, but for the row
``bf16``. ``--backend native`` computes as it really does, activations in int8 included.

    python -m benchmarks.quality [--model-path DIR] [--backend reference] [--text FILE]

Shape letters: S tokens of the text that are predicted, V vocabulary.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.engine_report import table
from mixfleet_broker.settings import resolve
from mixfleet_engine.config import Backend, EngineConfig, WeightDtype
from mixfleet_engine.demo_model import ensure_demo_model
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.loading import load_runner
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.step import PlannedChunk, StepPlan
from mixfleet_engine.tokenizer import load_tokenizer

TEXT: Final = Path(__file__).parents[1] / "LICENSE"
BLOCK_SIZE: Final = 16
ROWS: Final = 64
"""Positions whose distributions are compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the model."""

    backend: Backend
    dtype: str
    weight_dtype: WeightDtype

    @property
    def name(self) -> str:
        """What its row is called."""
        form = _DTYPES[self.dtype] if self.weight_dtype == "auto" else self.weight_dtype
        return f"{self.backend} {form}"


_DTYPES: Final = {"float32": "fp32", "bfloat16": "bf16"}
FP32: Final = Variant(backend="reference", dtype="float32", weight_dtype="auto")
BF16: Final = Variant(backend="reference", dtype="bfloat16", weight_dtype="auto")


def variants(backends: Sequence[Backend]) -> list[Variant]:
    """Return what is measured; the first two are what the others are compared with."""
    found = [FP32, BF16]
    for backend in backends:
        native = backend == "native"  # computes in bf16 only, and not with fp8
        dtype = BF16.dtype if native else FP32.dtype
        forms: tuple[WeightDtype, ...] = ("int8", "int4", *(("auto",) if native else ("fp8",)))
        found += [Variant(backend=backend, dtype=dtype, weight_dtype=form) for form in forms]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good one variant is on the text."""

    variant: str
    kl_fp32: float
    """Nats per token."""
    kl_bf16: float
    top1_fp32: float
    """Share of the positions where the most likely token is the same."""
    top1_bf16: float
    perplexity: float


def windows(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Return the text in parts of ``length`` tokens; what is left at the end, if short, is not."""
    starts = range(0, len(tokens) - length + 1, length)
    return [tuple(tokens[start : start + length]) for start in starts]


def logits(runner: ModelRunner, tokens: tuple[int, ...]) -> Tensor:
    """Return the logits after every token but the last, ``[S, V]`` fp32.

    A step gives the logits of one position of a sequence. So all prefixes of a window share their
    blocks: the whole window fills them, then one decode per position reads them, all in one step.
    """
    blocks = tuple(range(-(-len(tokens) // BLOCK_SIZE)))

    def chunk(start: int, end: int, *, samples: bool) -> PlannedChunk:
        return PlannedChunk(
            request_id="text",
            token_ids=tokens[start:end],
            start=start,
            block_table=blocks[: -(-end // BLOCK_SIZE)],
            samples=samples,
            sampling=SamplingParams(),
            history=TokenHistory(tokens[:end]),
            position=0,
        )

    runner.logits(StepPlan(chunks=(chunk(0, len(tokens), samples=False),), clear_blocks=blocks))
    places = range(len(tokens) - 1)
    decodes = tuple(chunk(place, place + 1, samples=True) for place in places)
    return runner.logits(StepPlan(chunks=decodes))


def compare(found: Tensor, fp32: Tensor, bf16: Tensor, following: Tensor, name: str) -> Quality:
    """Return the figures of a variant.

    Args:
        found: Its logits ``[S, V]``.
        fp32: Those of fp32.
        bf16: Those of bf16.
        following: ``[S]``, the token that really follows.
        name: The variant's.
    """
    loss = torch.nn.functional.cross_entropy(found, following).item()
    return Quality(
        variant=name,
        kl_fp32=_divergence(fp32, found),
        kl_bf16=_divergence(bf16, found),
        top1_fp32=_agreement(fp32, found),
        top1_bf16=_agreement(bf16, found),
        perplexity=math.exp(loss),
    )


def _divergence(reference: Tensor, found: Tensor) -> float:
    total = 0.0
    for start in range(0, len(found), ROWS):
        p, q = (x[start : start + ROWS].double().log_softmax(-1) for x in (reference, found))
        total += (p.exp() * (p - q)).sum().item()
    return total / len(found)


def _agreement(reference: Tensor, found: Tensor) -> float:
    return (reference.argmax(-1) == found.argmax(-1)).double().mean().item()


def measure(path: Path, text: str, backends: Sequence[Backend], window: int) -> list[Quality]:
    """Return a row per variant."""
    parts = windows(load_tokenizer(path).encode(text), window)
    following = torch.tensor([token for part in parts for token in part[1:]])

    def run(variant: Variant) -> Tensor:
        runner = load_runner(path, _settings(variant, window))
        return torch.cat([logits(runner, part) for part in parts])

    fp32, bf16, *others = variants(backends)
    references = run(fp32), run(bf16)
    rows = [
        compare(found, *references, following, variant.name)
        for found, variant in zip(references, (fp32, bf16), strict=True)
    ]
    return rows + [compare(run(other), *references, following, other.name) for other in others]


def _settings(variant: Variant, window: int) -> EngineConfig:
    return EngineConfig(
        device="cpu",
        backend=variant.backend,
        dtype=variant.dtype,
        weight_dtype=variant.weight_dtype,
        block_size=BLOCK_SIZE,
        num_blocks=-(-window // BLOCK_SIZE),
        context_length=window,
    )


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, help="default: the demo model")
    parser.add_argument(
        "--backend", nargs="+", default=["reference"], choices=("reference", "cpu", "native")
    )
    parser.add_argument("--text", type=Path, default=TEXT, help="default: the licence")
    parser.add_argument("--window", type=int, default=512, help="tokens that a window has")
    arguments = parser.parse_args()
    path = arguments.model_path or ensure_demo_model(resolve({}).data_dir, print)
    text = arguments.text.read_text(encoding="utf-8")
    rows = [asdict(row) for row in measure(path, text, arguments.backend, arguments.window)]
    print(*table([list(rows[0]), *(_cells(row) for row in rows)]), sep="\n")
    about = {"model": path.name, "text": arguments.text.name, "window": arguments.window}
    print(report.write("quality", {**about, "rows": rows}))


def _cells(row: dict[str, object]) -> list[str]:
    return [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row.values()]


if __name__ == "__main__":
    main()
