import math
import random as pyrandom

import pytest
import torch
from torch import Tensor

from mixfleet_engine.batch import make_batch
from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native.attention import AttentionWorkspace, check_cache
from support.native_attention import (
    CPU,
    AttentionLayer,
    Heads,
    Piece,
    relative_error,
    run,
    run_in_cuts,
)
from support.native_cases import FORMS, Form
from support.plans import chunk, plan, table

DEMO = Heads(queries=9, kv=3, dim=64)
ALLOWED = {"bf16": 4e-3, "int8": 1e-2, "int4": 1e-2}
"""Of the norm: shares have 8 bits, and a tie of the next rounding may fall to the other side."""


def alone(layer: AttentionLayer, x: Tensor, threads: int = 1) -> Tensor:
    """Return a whole sequence's rows from one step of its own."""
    cache = layer.cache(-(-len(x) // 16))
    return run(layer.block(threads), cache, [Piece(x, 0, table(len(x), 16))])[0]


@pytest.mark.parametrize("seed", range(12))
def test_random_heads_and_lengths_match_the_reference(seed: int) -> None:
    picked = pyrandom.Random(seed)
    kv = picked.randint(1, 4)
    dim = picked.choice([16, 32, 48, 64, 128])
    heads = Heads(queries=kv * picked.randint(1, 8), kv=kv, dim=dim)
    layer = AttentionLayer(heads, width=picked.choice([32, 70, 96]), seed=seed)
    x = layer.inputs(picked.randint(1, 700), seed=seed)
    assert relative_error(alone(layer, x), layer.expected(x)) < ALLOWED["bf16"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_matches_the_reference(form: Form) -> None:
    layer = AttentionLayer(Heads(queries=4, kv=2, dim=64), width=128, form=form)
    x = layer.inputs(40)
    assert relative_error(alone(layer, x), layer.expected(x)) < ALLOWED[form]


@pytest.mark.parametrize("cuts", [[1], [2, 1], [7], [16], [64, 1], [100, 3, 1, 1], [256, 44]])
@pytest.mark.parametrize("threads", [1, 2])
def test_how_a_prompt_is_cut_into_steps_changes_no_bit(cuts: list[int], threads: int) -> None:
    layer = AttentionLayer(DEMO)
    x = layer.inputs(300)
    found = run_in_cuts(layer.block(threads), layer.cache(19), x, table(300, 16), cuts)
    assert torch.equal(found, alone(layer, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_in_the_step_change_no_bit(form: Form, threads: int) -> None:
    layer = AttentionLayer(DEMO, width=128, form=form)
    block, cache = layer.block(threads), layer.cache(100)
    lengths, first, pieces, expected = (5, 90, 700, 33, 1), 0, [], []
    for number, (length, rows) in enumerate(zip(lengths, (1, 60, 1, 33, 1), strict=True)):
        x = layer.inputs(length, seed=number)
        blocks = table(length, 16, first)
        first += len(blocks)
        expected.append(alone(layer, x)[-rows:])
        if length > rows:
            run(block, cache, [Piece(x[:-rows], 0, blocks)])
        pieces.append(Piece(x[-rows:], length - rows, blocks))
    for found, wanted in zip(run(block, cache, pieces), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("num_sequences", [1, 2, 9])
def test_the_number_of_threads_changes_no_bit_of_a_decode(num_sequences: int) -> None:
    layer = AttentionLayer(DEMO)
    inputs = [layer.inputs(1500 // (1 + n) + 1, seed=n) for n in range(num_sequences)]
    found = []
    for threads in (1, 2):
        block, cache, first, pieces = layer.block(threads), layer.cache(400), 0, []
        for x in inputs:
            blocks = table(len(x), 16, first)
            first += len(blocks)
            run(block, cache, [Piece(x[:-1], 0, blocks)])
            pieces.append(Piece(x[-1:], len(x) - 1, blocks))
        found.append(torch.cat(run(block, cache, pieces)))
    assert torch.equal(found[0], found[1])


def test_the_order_of_blocks_changes_no_bit() -> None:
    layer = AttentionLayer(DEMO)
    x = layer.inputs(300)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()[:19]
    found = run_in_cuts(layer.block(), layer.cache(40), x, blocks, [130, 1, 50])
    assert torch.equal(found, alone(layer, x))


def test_a_prefix_that_another_sequence_stored_changes_no_bit() -> None:
    layer = AttentionLayer(DEMO)
    block, cache, x = layer.block(), layer.cache(8), layer.inputs(80)
    run(block, cache, [Piece(torch.cat((x[:64], layer.inputs(9))), 0, [5, 1, 7, 2, 0])])
    found = run(block, cache, [Piece(x[64:], 64, [5, 1, 7, 2, 3])])[0]
    assert torch.equal(found, alone(layer, x)[64:])


@pytest.mark.parametrize("stale", [math.nan, math.inf])
@pytest.mark.parametrize("cuts", [[1], [3, 1], [40]])
def test_what_freed_slots_hold_changes_no_bit(stale: float, cuts: list[int]) -> None:
    layer = AttentionLayer(DEMO)
    x = layer.inputs(37)
    found = run_in_cuts(layer.block(), layer.cache(3, stale=stale), x, [1, 2, 0], cuts)
    assert torch.equal(found, alone(layer, x))


def test_a_step_writes_its_own_slots_only() -> None:
    layer = AttentionLayer(DEMO)
    cache, x = layer.cache(4, stale=math.inf), layer.inputs(18)
    run(layer.block(), cache, [Piece(x, 0, [2, 1])])
    for part in cache.layer(0):
        assert part[[0, 3]].isinf().all()
        assert part[2].isfinite().all()
        assert part[1].isinf().sum() == part[1].numel() * 14 // 16


def test_a_cache_of_larger_blocks_gives_the_same_bits() -> None:
    layer = AttentionLayer(DEMO)
    x = layer.inputs(200)
    found = run_in_cuts(layer.block(), layer.cache(4, 64), x, [3, 0, 2, 1], [70, 1])
    assert torch.equal(found, alone(layer, x))


def test_layers_that_share_a_workspace_do_not_disturb_each_other() -> None:
    layers = AttentionLayer(DEMO), AttentionLayer(Heads(queries=4, kv=2, dim=32), seed=3)
    workspace = AttentionWorkspace()
    blocks = [layer.block(workspace=workspace) for layer in layers]
    caches = [layer.cache(4) for layer in layers]
    x = layers[0].inputs(50)
    for start, end in [(0, 1), (1, 40), (40, 41), (41, 50)]:
        for layer, block, cache in zip(layers, blocks, caches, strict=True):
            found = run(block, cache, [Piece(x[start:end], start, [3, 0, 1, 2])])[0]
            assert torch.equal(found, alone(layer, x)[start:end])


def test_a_block_may_go_from_one_cache_to_another_and_back() -> None:
    layer = AttentionLayer(DEMO)
    block, x, other = layer.block(), layer.inputs(20), layer.inputs(20, seed=9)
    caches = layer.cache(2), layer.cache(2)
    for cache, prompt in zip(caches, (x, other), strict=True):
        run(block, cache, [Piece(prompt[:19], 0, [0, 1])])
    for cache, prompt in zip(caches, (x, other), strict=True):
        found = run(block, cache, [Piece(prompt[19:], 19, [0, 1])])[0]
        assert torch.equal(found, alone(layer, prompt)[19:])


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_add_to_adds_what_a_call_returns(num_tokens: int) -> None:
    layer = AttentionLayer(DEMO)
    block, cache, x = layer.block(2), layer.cache(4), layer.inputs(num_tokens)
    batch = make_batch(plan(chunk([0] * num_tokens, block_table=[0, 1, 2, 3])), 16, CPU)
    expected = x + block(x, batch, cache)
    block.add_to(x, batch, cache)
    assert torch.equal(x, expected)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_context_matches_the_reference(threads: int) -> None:
    layer = AttentionLayer(Heads(queries=2, kv=1, dim=64), width=32)
    x = layer.inputs(5000)
    found = run_in_cuts(layer.block(threads), layer.cache(313), x, table(5000, 16), [2048, 451, 1])
    assert relative_error(found, layer.expected(x)) < ALLOWED["bf16"]
    assert torch.equal(found, alone(layer, x))


@pytest.mark.parametrize("head_dim", [8, 24, 100, 272])
def test_heads_of_another_size_are_refused_with_it(head_dim: int) -> None:
    layer = AttentionLayer(Heads(queries=1, kv=1, dim=head_dim))
    with pytest.raises(NativeUnavailableError, match=f"head_dim={head_dim}:"):
        layer.block()


def test_a_cache_of_another_dtype_is_refused_with_it() -> None:
    layer = AttentionLayer(DEMO)
    with pytest.raises(NativeUnavailableError, match=r"KV cache in torch\.float32"):
        run(layer.block(), layer.cache(1, dtype="float32"), [Piece(layer.inputs(3), 0, [0])])


@pytest.mark.parametrize("block_size", [1, 8, 24])
def test_a_cache_of_blocks_of_another_size_is_refused_with_it(block_size: int) -> None:
    with pytest.raises(NativeUnavailableError, match=f"block_size={block_size}:"):
        check_cache(torch.bfloat16, block_size)
