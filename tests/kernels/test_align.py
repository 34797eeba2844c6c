import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.align import align, num_slots
from mixfleet_engine.ops.cuda.alignment import Alignment
from support.kernels import DEVICE


def chosen_by_chance(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ranked = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    return ranked[:, :top_k].int().contiguous().to(DEVICE)


def plainly(chosen: Tensor, num_experts: int, block_t: int) -> tuple[list[int], list[int]]:
    pairs = chosen.flatten().tolist()
    slots: list[int] = []
    tiles: list[int] = []
    for expert in range(num_experts):
        own = [pair for pair, number in enumerate(pairs) if number == expert]
        own += [len(pairs)] * (-len(own) % block_t)
        slots += own
        tiles += [expert] * (len(own) // block_t)
    room = num_slots(len(pairs), num_experts, block_t)
    slots += [len(pairs)] * (room - len(slots))
    tiles += [-1] * (room // block_t - len(tiles))
    return slots, tiles


def assert_aligned(found: Alignment, chosen: Tensor, num_experts: int) -> None:
    slots, tiles = plainly(chosen, num_experts, found.block_t)
    assert found.sorted_slots.tolist() == slots
    assert found.tile_experts.tolist() == tiles
    assert found.sorted_slots.dtype == found.tile_experts.dtype == torch.int32
    assert found.num_pairs == chosen.numel()
    assert found.top_k == chosen.shape[1]


@pytest.mark.parametrize("block_t", [16, 64])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (6, 3), (1, 1), (64, 8)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33, 100])
def test_pairs_stand_by_expert_in_whole_tiles(
    num_tokens: int, num_experts: int, top_k: int, block_t: int
) -> None:
    chosen = chosen_by_chance(num_tokens, num_experts, top_k)
    assert_aligned(align(chosen, num_experts, block_t), chosen, num_experts)


@pytest.mark.parametrize("num_tokens", [512, 513, 1500])
def test_more_pairs_than_a_program_takes_are_aligned_by_several(num_tokens: int) -> None:
    chosen = chosen_by_chance(num_tokens, 8, 2)
    assert_aligned(align(chosen, 8, 64), chosen, 8)


@pytest.mark.parametrize("block_t", [1, 16, 64])
@pytest.mark.parametrize("num_tokens", [9, 50, 128])
def test_any_number_of_programs_makes_the_same(num_tokens: int, block_t: int) -> None:
    chosen = chosen_by_chance(num_tokens, 8, 2, seed=num_tokens)
    for block_pairs in (16, 32, 256):
        found = align(chosen, 8, block_t, block_pairs=block_pairs)
        assert_aligned(found, chosen, 8)


@pytest.mark.parametrize("experts", [(0, 1), (6, 7), (3, 5)])
@pytest.mark.parametrize("block_pairs", [16, None])
def test_all_tokens_may_choose_the_same_experts(
    experts: tuple[int, int], block_pairs: int | None
) -> None:
    chosen = torch.tensor([experts] * 40, dtype=torch.int32, device=DEVICE)
    assert_aligned(align(chosen, 8, 16, block_pairs=block_pairs), chosen, 8)


@pytest.mark.parametrize(("num_pairs", "num_experts"), [(2, 8), (5, 8), (16, 8), (9, 1), (37, 8)])
@pytest.mark.parametrize("block_t", [1, 4, 16])
def test_the_room_is_what_the_worst_choice_needs_and_no_more(
    num_pairs: int, num_experts: int, block_t: int
) -> None:
    # The worst: a pair for each expert, then whole tiles for one of them.
    hit = min(num_pairs, num_experts)
    counts = [1] * hit
    counts[0] += num_pairs - hit
    needed = sum(-(-count // block_t) for count in counts) * block_t
    assert num_slots(num_pairs, num_experts, block_t) == needed


def test_no_pairs_need_no_slots() -> None:
    found = align(torch.empty(0, 2, dtype=torch.int32, device=DEVICE), 8, 16)
    assert found.sorted_slots.shape == found.tile_experts.shape == (0,)
