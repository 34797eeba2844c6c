"""The scenario of `rank_scenario` on a device's runner, whose decodes are recorded.

    torchrun --nproc-per-node 2 -m support.rank_device CHECKPOINT FOLDER

Each rank writes FOLDER/RANK.json: its exchanges with the others in order, each with whether a
recording ran it, the shapes it recorded, and on the first rank the answers.
"""

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mixfleet_engine.capture import Work
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.device_runner import DeviceRunner
from mixfleet_engine.engine import Engine
from mixfleet_engine.grammar import Grammars
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.parallel import TensorParallel
from mixfleet_engine.rank_runner import LeadingRunner, follow
from mixfleet_engine.ranks import Ranks
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.sharding import share_of
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import open_checkpoint
from support.placed_attention import PlacedBackend
from support.rank_scenario import CONFIG, TOKENIZER, requests, run_scenario

CPU = torch.device("cpu")
MAX_ROWS = CONFIG.max_batch_size or 0
NUM_BLOCKS = CONFIG.num_blocks or 0


class NotedExchanges(TensorParallel):
    """Keeps which exchanges there were."""

    exchanges: list[tuple[str, int, bool]]
    is_replayed = False

    def sum(self, partial: Tensor) -> Tensor:
        self._note("sum", partial)
        return super().sum(partial)

    def add_sum(self, x: Tensor, partial: Tensor) -> None:
        self._note("add_sum", partial)
        super().add_sum(x, partial)

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        self._note("gather_columns", part)
        return super().gather_columns(part, num_columns)

    def _note(self, name: str, part: Tensor) -> None:
        self.exchanges.append((name, len(part), self.is_replayed))


class NotedRecorder:
    """Replays by running again, and says so meanwhile."""

    def __init__(self, ranks: NotedExchanges) -> None:
        self._ranks = ranks

    def record(self, work: Work) -> Work:
        def replay() -> None:
            self._ranks.is_replayed = True
            work()
            self._ranks.is_replayed = False

        return replay


def device_requests() -> list[GenerateRequest]:
    """The scenario's, but only the last one needs the host to sample."""
    *plain, last = requests()
    warm = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7)
    return [
        replace(request, grammar=None, sampling=warm if number % 2 else SamplingParams())
        for number, request in enumerate(plain)
    ] + [last]


def device_runner(checkpoint: Path, ranks: Ranks, recorder: NotedRecorder) -> DeviceRunner:
    """Return the runner of this rank's part of the model."""
    model = ModelConfig.from_checkpoint(checkpoint)
    loader = WeightLoader(
        open_checkpoint(checkpoint, model),
        model,
        dtype=torch.float32,
        device=CPU,
        weight_dtype="auto",
        progress=None,
        shard=ranks.shard,
    )
    with closing(loader):
        loaded = MixtralModel.load(loader, model, PlacedBackend(), model.context_length, ranks)
    cache = KvCache(
        share_of(model, ranks.shard),
        num_blocks=NUM_BLOCKS,
        block_size=CONFIG.block_size,
        dtype=torch.float32,
        device=CPU,
    )
    return DeviceRunner(
        loaded, cache, CPU, recorder, max_rows=MAX_ROWS, context_length=model.context_length
    )


def leading_engine(checkpoint: Path, runner: DeviceRunner, ranks: Ranks) -> Engine:
    """Return the engine of the first rank."""
    model = ModelConfig.from_checkpoint(checkpoint)
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_batch_size=MAX_ROWS,
        max_step_tokens=CONFIG.max_step_tokens,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        prefix_cache=CONFIG.prefix_cache,
        itl_target_s=CONFIG.itl_target_s,
        grammars=Grammars(TOKENIZER, model.vocab_size),
    )
    return Engine(LeadingRunner(runner, ranks), scheduler)


def main(checkpoint: Path, folder: Path) -> None:
    """Run one rank."""
    rendezvous = Rendezvous.from_environment()
    assert rendezvous is not None, "start this with torchrun"
    found: dict[str, object] = {}
    with NotedExchanges.connect(rendezvous, "cpu") as ranks:
        ranks.exchanges = []
        runner = device_runner(checkpoint, ranks, NotedRecorder(ranks))
        if rendezvous.shard.rank > 0:
            follow(runner, ranks)
        else:
            engine = leading_engine(checkpoint, runner, ranks)
            found |= {
                "answers": run_scenario(engine, device_requests()),
                "preemptions": engine.num_preemptions,
            }
        found |= {"exchanges": ranks.exchanges, "shapes": [str(shape) for shape in runner.recorded]}
    found["left"] = len(runner.recorded)
    (folder / f"{rendezvous.shard.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
