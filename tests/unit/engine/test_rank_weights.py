"""What a rank reads of a checkpoint, and that the ranks' blocks add up to the whole model's.

No processes here: the ranks are made one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixfleet_engine.batch import make_batch
from mixfleet_engine.checkpoint_files import SafetensorFiles, TensorFiles
from mixfleet_engine.checkpoint_hf import HfCheckpoint, open_hf_files
from mixfleet_engine.checkpoint_mistral import MistralCheckpoint, open_mistral_files
from mixfleet_engine.config import ModelConfig, Shard
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.ops.torch_backend import TorchBackend
from mixfleet_engine.rotary import RotaryTable
from mixfleet_engine.sharding import WHOLE, WeightCuts, share_of
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import Checkpoint, open_checkpoint, weight_shapes
from support.plans import chunk, plan
from support.tiny_model import (
    ExpertStorage,
    MistralFiles,
    tiny_config,
    write_hf_checkpoint,
    write_mistral_checkpoint,
)

MODEL = tiny_config(n_layers=1, n_heads=8, n_kv_heads=4, num_experts=3, vocab_size=101)
CPU = torch.device("cpu")
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("hf"), MODEL)


def all_ranks(world: int) -> list[Shard]:
    return [Shard(rank=rank, world=world) for rank in range(world)]


def loader_of(
    checkpoint: Checkpoint, shard: Shard | None = None, model: ModelConfig = MODEL
) -> WeightLoader:
    return WeightLoader(checkpoint, model, dtype=torch.float32, device=CPU, shard=shard)


@dataclass
class RecordedFiles:
    """Counts the bytes of what is asked of some files, repeats included."""

    files: TensorFiles
    num_bytes: int = 0
    per_name: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return self.files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(name)

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        tensor = self.files.read(name, rows, columns)
        self.num_bytes += tensor.nbytes
        self.per_name[name] = self.per_name.get(name, 0) + tensor.nbytes
        return tensor


def sources(folder: Path) -> Iterator[tuple[str, RecordedFiles, Checkpoint]]:
    """The model in every layout, with its files under observation."""
    files = RecordedFiles(open_hf_files(write_hf_checkpoint(folder / "hf", MODEL, num_files=2)))
    yield "hf", files, HfCheckpoint(files)
    kinds: tuple[MistralFiles, ...] = ("safetensors", "sharded-pth")
    storages: tuple[ExpertStorage, ...] = ("per-expert", "stacked")
    for kind in kinds:
        for experts in storages:
            name = f"{kind}-{experts}"
            path = write_mistral_checkpoint(folder / name, MODEL, files=kind, experts=experts)
            files = RecordedFiles(open_mistral_files(path))
            yield name, files, MistralCheckpoint(files, MODEL)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_gets_its_part_of_every_weight_in_every_layout(
    world: int, folder: Path, tmp_path: Path
) -> None:
    whole = loader_of(open_checkpoint(folder, MODEL))
    for layout, _, checkpoint in sources(tmp_path):
        for shard in all_ranks(world):
            loader, cuts = loader_of(checkpoint, shard), WeightCuts(MODEL, shard)
            for name, shape in weight_shapes(MODEL).items():
                rows, columns = cuts.of(name, shape)
                expected = whole.tensor(name)[rows]
                expected = expected if columns == WHOLE else expected[:, columns]
                found = loader.tensor(name)
                assert torch.equal(found, expected), (layout, name)
                assert found.is_contiguous(), (layout, name)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_asks_its_files_for_its_own_bytes_and_no_others(world: int, tmp_path: Path) -> None:
    shapes = weight_shapes(MODEL)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    replicated = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if "norm" in name or "gate" in name
    )
    for layout, files, checkpoint in sources(tmp_path):
        read = []
        for shard in all_ranks(world):
            before, loader = files.num_bytes, loader_of(checkpoint, shard)
            for name in shapes:
                loader.tensor(name)
            read.append(files.num_bytes - before)
        assert sum(read) == 4 * (numbers + (world - 1) * replicated), layout
        # Only the parts of the vocabulary differ, by a row each of embedding and output.
        assert max(read) - min(read) <= 4 * 2 * MODEL.dim, layout


def test_slices_of_files_are_views_of_the_mapped_files(folder: Path, tmp_path: Path) -> None:
    pickled = write_mistral_checkpoint(tmp_path, MODEL, files="pth")
    cases = (
        (open_hf_files(folder), "model.layers.0.self_attn.o_proj.weight"),
        (open_mistral_files(pickled), "layers.0.attention.wo.weight"),
    )
    for files, name in cases:
        part = files.read(name, WHOLE, slice(32, 64))
        assert part.shape == (64, 32)
        assert torch.equal(part, files.read(name)[:, 32:64])
    assert part.stride() == (128, 1), "a copy of a mapped tensor would be dense"


def test_rows_and_columns_of_safetensors_are_cut_together(folder: Path) -> None:
    files = SafetensorFiles([folder / "model.safetensors"])
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = files.read(name)
    assert torch.equal(files.read(name, slice(3, 9), slice(10, 20)), whole[3:9, 10:20])
    assert torch.equal(
        files.read("model.norm.weight", slice(5, 7)), files.read("model.norm.weight")[5:7]
    )


def test_copies_in_several_pth_files_need_to_agree_where_the_rank_reads(tmp_path: Path) -> None:
    write_mistral_checkpoint(tmp_path, MODEL, files="pth")
    first = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    name = "layers.0.attention.wo.weight"
    other = first[name].clone()
    other[:, -1] += 1
    torch.save({name: other}, tmp_path / "consolidated.01.pth")
    checkpoint = open_checkpoint(tmp_path, MODEL)
    loader_of(checkpoint, Shard(rank=0, world=2)).tensor(name)
    with pytest.raises(CheckpointError, match="differs"):
        loader_of(checkpoint, Shard(rank=1, world=2)).tensor(name)


def test_progress_counts_the_ranks_own_bytes(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    loader = WeightLoader(
        open_checkpoint(folder, MODEL),
        MODEL,
        dtype=torch.bfloat16,
        device=CPU,
        progress=lambda done, total: calls.append((done, total)),
        shard=Shard(rank=1, world=4),
    )
    held = sum(loader.tensor(name).nbytes for name in weight_shapes(MODEL))
    assert calls[-1] == (held, held)


def blocks_of(
    folder: Path, shard: Shard
) -> tuple[AttentionWeights, MoeWeights, OutputWeights, Tensor]:
    loader = loader_of(open_checkpoint(folder, MODEL), shard)
    embedding = loader.tensor("tok_embeddings.weight")
    return (
        AttentionWeights.load(loader, 0, MODEL),
        MoeWeights.load(loader, 0, MODEL),
        OutputWeights.load(loader, MODEL, embedding),
        embedding,
    )


def added(folder: Path, shard: Shard, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention and experts of one rank add to ``x``, and its logits."""
    attention, moe, output, _ = blocks_of(folder, shard)
    backend = TorchBackend(ReferenceOps())
    rotary = RotaryTable(head_dim=MODEL.head_dim, context_length=64, theta=1e4, device=CPU)
    cache = KvCache(
        share_of(MODEL, shard), num_blocks=8, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    batch = make_batch(
        plan(
            chunk([1], block_table=[5], start=0),
            chunk(list(range(len(x) - 1)), block_table=[2, 7, 1], start=0),
        ),
        BLOCK_SIZE,
        CPU,
    )
    return (
        backend.attention(attention, rotary)(x, batch, cache),
        backend.moe(moe)(x),
        backend.output(output)(x),
    )


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_blocks_add_up_to_the_whole_models(world: int, folder: Path) -> None:
    x = torch.randn(12, MODEL.dim, generator=torch.Generator().manual_seed(1))
    whole = added(folder, Shard(), x)
    parts = [added(folder, shard, x) for shard in all_ranks(world)]
    for number, name in enumerate(("attention", "experts")):
        total = sum((part[number] for part in parts), torch.zeros_like(x))
        torch.testing.assert_close(total, whole[number], rtol=1e-4, atol=1e-5, msg=name)
        assert (parts[0][number] - whole[number]).abs().max() > 0.1, "a part is not the whole"
    logits = torch.cat([part[2] for part in parts], dim=1)
    torch.testing.assert_close(logits, whole[2], rtol=1e-5, atol=1e-5)


def test_tied_output_weights_are_the_ranks_part_of_the_embedding(tmp_path: Path) -> None:
    model = tiny_config(n_layers=1, tie_word_embeddings=True, vocab_size=7)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, model), model)
    parts = []
    for shard in all_ranks(2):
        loader = loader_of(checkpoint, shard, model)
        embedding = loader.tensor("tok_embeddings.weight")
        output = OutputWeights.load(loader, model, embedding)
        assert isinstance(output.weight, Tensor)
        assert torch.equal(output.weight, embedding)
        parts.append(output.weight)
    assert [len(part) for part in parts] == [3, 4]
    whole = loader_of(checkpoint, None, model).tensor("tok_embeddings.weight")
    assert torch.equal(torch.cat(parts), whole)
