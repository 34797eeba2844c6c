"""Attention over the paged cache, in every back-end, against one head and one token at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mixfleet_engine.attention import Attention
from mixfleet_engine.batch import make_batch
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights
from mixfleet_engine.ops.cpu import CpuOps
from mixfleet_engine.ops.door import Ops
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.rotary import RotaryTable
from mixfleet_engine.weight_loader import WeightLoader
from mixfleet_engine.weights import open_checkpoint
from support.dense_mixtral import dense_attention, norm, rotate
from support.plans import chunk, plan, table
from support.tiny_model import hf_tensors, tiny_config, write_hf_checkpoint

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 64
CONFIG = tiny_config(n_layers=1, num_experts=1, experts_per_token=1, n_heads=6, n_kv_heads=2)


def make_ops(name: str) -> Ops:
    return ReferenceOps() if name == "reference" else CpuOps(torch.float32)


@dataclass
class Bench:
    """One attention layer with weights of its own and its cache."""

    attention: Attention
    cache: KvCache
    config: ModelConfig

    def run(self, xs: Sequence[tuple[torch.Tensor, int, list[int]]]) -> list[torch.Tensor]:
        """Run one step of (activations, start, block table) per sequence."""
        chunks = [chunk([0] * len(x), start=start, block_table=t) for x, start, t in xs]
        batch = make_batch(plan(*chunks), BLOCK_SIZE, CPU)
        out = self.attention(torch.cat([x for x, _, _ in xs]), batch, self.cache)
        return list(torch.split(out, [len(x) for x, _, _ in xs]))


@pytest.fixture(params=["reference", "cpu"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, CONFIG), CONFIG)
    loader = WeightLoader(checkpoint, CONFIG, dtype=torch.float32, device=CPU)
    cache = KvCache(
        CONFIG, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    rotary = RotaryTable(
        head_dim=CONFIG.head_dim, context_length=256, theta=CONFIG.rope_theta, device=CPU
    )
    weights = AttentionWeights.load(loader, 0, CONFIG)
    return Bench(Attention.make(weights, rotary, make_ops(request.param)), cache, CONFIG)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output for a whole sequence."""
    weights = {name: tensor.double() for name, tensor in hf_tensors(CONFIG).items()}
    normed = norm(x.double(), weights["model.layers.0.input_layernorm.weight"], CONFIG.norm_eps)
    q, k, v = (
        (normed @ weights[f"model.layers.0.self_attn.{n}_proj.weight"].T).view(len(x), -1, 16)
        for n in "qkv"
    )
    mixed = dense_attention(rotate(q, CONFIG.rope_theta), rotate(k, CONFIG.rope_theta), v)
    out = mixed.flatten(1) @ weights["model.layers.0.self_attn.o_proj.weight"].T
    return out.float()


def inputs(num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, CONFIG.dim, generator=generator)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 17])
def test_a_whole_prompt_matches_the_dense_reference(bench: Bench, num_tokens: int) -> None:
    x = inputs(num_tokens)
    (out,) = bench.run([(x, 0, table(num_tokens, BLOCK_SIZE, first=60, stride=-3))])
    assert_close(out, dense(x))


@pytest.mark.parametrize("sizes", [[5, 6], [4, 4, 4], [1, 1, 9], [2, 1, 3, 1, 7], [8, 1]])
def test_chunks_of_any_size_match_the_dense_reference(bench: Bench, sizes: list[int]) -> None:
    x = inputs(sum(sizes))
    parts, start = [], 0
    for size in sizes:
        blocks = table(start + size, BLOCK_SIZE, first=11, stride=7)
        parts += bench.run([(x[start : start + size], start, blocks)])
        start += size
    assert_close(torch.cat(parts), dense(x))


def test_decodes_of_many_lengths_and_a_prefill_share_a_step(bench: Bench) -> None:
    lengths = [1, 2, 4, 5, 9, 30]
    xs = [inputs(n, seed=n) for n in lengths]
    tables = [table(n, BLOCK_SIZE, first=i, stride=len(lengths) + 2) for i, n in enumerate(lengths)]
    for x, blocks in zip(xs, tables, strict=True):
        if len(x) > 1:
            before = len(x) - 1
            bench.run([(x[:-1], 0, blocks[: -(-before // BLOCK_SIZE)])])
    newcomer = inputs(6, seed=99)
    step = [(x[-1:], len(x) - 1, blocks) for x, blocks in zip(xs, tables, strict=True)]
    step.insert(2, (newcomer, 0, [62, 63]))
    outs = bench.run(step)
    assert_close(outs.pop(2), dense(newcomer))
    for x, out in zip(xs, outs, strict=True):
        assert_close(out, dense(x)[-1:])


def test_what_stands_in_other_blocks_is_never_seen(bench: Bench) -> None:
    for part in bench.cache.layer(0):
        part.fill_(1e4)
    x = inputs(9)
    blocks = [5, 6, 7]
    before, _ = bench.run([(x[:-1], 0, blocks[:2]), (inputs(3, seed=1), 0, [20])])
    last, _ = bench.run([(x[-1:], 8, blocks), (inputs(1, seed=2), 3, [20])])
    assert_close(torch.cat([before, last]), dense(x))


def test_running_a_chunk_twice_does_no_harm(bench: Bench) -> None:
    x = inputs(7)
    bench.run([(x[:5], 0, [1, 2])])
    bench.run([(x[5:], 5, [1, 2])])
    (again,) = bench.run([(x[5:], 5, [1, 2])])
    assert_close(again, dense(x)[5:])
