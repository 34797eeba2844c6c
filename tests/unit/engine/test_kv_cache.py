import resource
import sys

import torch

from mixfleet_engine.kv_cache import FP8, KvCache, picked, to_fp8
from mixfleet_engine.plan import kv_bytes_per_token
from support.tiny_model import tiny_config

CPU = torch.device("cpu")
MODEL = tiny_config(context_length=100)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, 2 layers, 2 heads of 16, fp32


def make_cache(num_blocks: int = 4, block_size: int = 4) -> KvCache:
    return KvCache(
        MODEL, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device=CPU
    )


def test_slots_count_through_the_blocks() -> None:
    cache = make_cache()
    keys, values = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    cache.write(1, keys, values, torch.tensor([13, 0, 6]))
    cached_keys, cached_values = cache.layer(1)
    for row, (block, offset) in enumerate([(3, 1), (0, 0), (1, 2)]):
        assert torch.equal(cached_keys[block, offset], keys[row])
        assert torch.equal(cached_values[block, offset], values[row])


def test_a_write_touches_its_own_slots_and_layer_only() -> None:
    cache = make_cache()
    ones = torch.ones(1, 2, 16)
    cache.write(0, ones, ones, torch.tensor([5]))
    keys, values = cache.layer(0)
    assert keys.sum() == values.sum() == ones.numel()
    assert all(part.sum() == 0 for part in cache.layer(1))


def test_a_view_of_a_wider_tensor_can_be_written() -> None:
    cache = make_cache()
    wide = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    cache.write(0, wide[:, :2], wide[:, -2:], torch.tensor([2, 1, 0]))
    assert torch.equal(cache.layer(0)[1][0, 0], wide[2, -2:])


def test_a_new_cache_is_all_zeros() -> None:
    cache = make_cache()
    assert all(not part.any() for layer in range(2) for part in cache.layer(layer))


def test_a_large_cache_takes_no_memory_before_it_is_used() -> None:
    def peak_bytes() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    before = peak_bytes()
    cache = make_cache(num_blocks=1 << 20)  # 2 GiB
    assert cache.layer(1)[1].shape[0] == 1 << 20
    assert peak_bytes() - before < 100 << 20


def test_a_layer_is_blocks_by_tokens_by_heads_by_width() -> None:
    keys, values = make_cache(num_blocks=7, block_size=4).layer(0)
    assert keys.shape == values.shape == (7, 4, 2, 16)


def test_the_planned_bytes_are_what_the_tensors_take() -> None:
    cache = make_cache(num_blocks=1, block_size=4)
    taken = sum(part.nbytes for layer in range(MODEL.n_layers) for part in cache.layer(layer))
    assert 4 * kv_bytes_per_token(MODEL, "float32") == taken


def fp8_cache() -> KvCache:
    return KvCache(MODEL, num_blocks=4, block_size=4, dtype=FP8, device=CPU)


def test_fp8_keeps_the_nearest_number_and_the_largest_of_what_is_larger() -> None:
    cache = fp8_cache()
    given = torch.tensor([0.0, 1.06, -1.07, 447.0, 449.0, -1e6, float("inf"), 2.0**-9])
    kept = torch.tensor([0.0, 1.0, -1.125, 448.0, 448.0, -448.0, 448.0, 2.0**-9])
    rows = torch.zeros(1, 2, 16)
    rows[0, 1, :8] = given
    cache.write(1, rows, -rows, torch.tensor([6]))
    keys, values = (picked(part, torch.tensor([1]), torch.float32) for part in cache.layer(1))
    assert torch.equal(keys[0, 2, 1, :8], kept)
    assert torch.equal(values[0, 2, 1, :8], -kept)
    assert keys.count_nonzero() == 7


def test_a_nan_stays_one_in_fp8_until_its_block_is_cleared() -> None:
    cache = fp8_cache()
    spoilt = torch.full((1, 2, 16), float("nan"), dtype=torch.bfloat16)
    cache.write(0, spoilt, spoilt, torch.tensor([13]))
    assert picked(cache.layer(0)[0], torch.tensor([3]), torch.bfloat16)[0, 1].isnan().all()
    cache.clear([3])
    assert not any(part.float().any() for part in cache.layer(0))


def test_every_fp8_number_comes_back_as_it_is_in_every_dtype() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[numbers.float().isfinite()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(to_fp8(numbers.to(dtype)).float(), numbers.float())


def test_the_planned_bytes_of_fp8_are_what_the_tensors_take() -> None:
    cache = fp8_cache()
    taken = sum(part.nbytes for layer in range(MODEL.n_layers) for part in cache.layer(layer))
    assert 16 * kv_bytes_per_token(MODEL, "fp8") == taken


def test_cleared_blocks_are_zeros_in_all_layers_and_the_others_stay() -> None:
    cache = make_cache()
    ones = torch.ones(16, 2, 16)
    for layer in range(MODEL.n_layers):
        cache.write(layer, ones, ones, torch.arange(16))
    cache.clear([3, 1])
    for layer in range(MODEL.n_layers):
        for part in cache.layer(layer):
            assert part.sum(dim=(1, 2, 3)).tolist() == [128.0, 0.0, 128.0, 0.0]
