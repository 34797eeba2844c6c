"""A program of one rank that says what the exchanges between ranks give.

    torchrun --nproc-per-node 3 -m support.rank_probe FOLDER

Each rank writes FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path

import torch

from mixfleet_engine.parallel import FRAME_WORDS, TensorParallel
from mixfleet_engine.ranks import Ranks
from mixfleet_engine.rendezvous import Rendezvous

NUM_ROWS = range(1, 18)
WIDTH = 5
VOCAB = 11
LENGTHS = (1, 2, FRAME_WORDS - 2, FRAME_WORDS - 1, FRAME_WORDS, 3 * FRAME_WORDS + 1)


def numbers(rank: int, num_rows: int) -> torch.Tensor:
    """One rank's part of a sum; a row is the same however many there are."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(max(NUM_ROWS), WIDTH, generator=generator)[:num_rows] * 10.0 ** (rank % 3)


def logits(rank: int, world: int) -> torch.Tensor:
    """One rank's columns of ``[[0 .. 10], [100 .. 110]]``."""
    whole = torch.arange(VOCAB) + torch.tensor([[0], [100]])
    return whole[:, VOCAB * rank // world : VOCAB * (rank + 1) // world].float()


def words(length: int) -> list[int]:
    """A plan of so many words, with large ones among them."""
    return [2**62 - n for n in range(length)]


def probe(ranks: Ranks) -> dict[str, object]:
    """Return what this rank sees of each exchange."""
    rank, world = ranks.shard.rank, ranks.shard.world
    sums = [ranks.sum(numbers(rank, num_rows)).tolist() for num_rows in NUM_ROWS]
    narrow = ranks.sum(numbers(rank, 4).bfloat16())
    ranks.share_memory(4, WIDTH, torch.bfloat16)
    added = numbers(world, 4)
    ranks.add_sum(added, numbers(rank, 4).bfloat16())
    received = []
    for length in LENGTHS:
        if rank == 0:
            ranks.send(words(length))
        else:
            received.append(ranks.receive() == words(length))
    return {
        "sums": sums,
        "narrow": narrow.tolist(),
        "narrow_dtype": str(narrow.dtype),
        "added": added.tolist(),
        "logits": ranks.gather_columns(logits(rank, world), VOCAB).tolist(),
        "lowest": ranks.lowest(100 - rank),
        "lowest_loaded": ranks.lowest(50 - rank, is_loaded=True),
        "received": received,
    }


def main(folder: Path) -> None:
    """Run one rank; the others wait for the first one's end."""
    rendezvous = Rendezvous.from_environment()
    assert rendezvous is not None
    with TensorParallel.connect(rendezvous, "cpu") as ranks:
        found = probe(ranks)
        if ranks.shard.rank > 0:
            found["end"] = ranks.receive()
    (folder / f"{rendezvous.shard.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
