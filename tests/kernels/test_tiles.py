"""The ways to cut a product, for every form, tile and size of shared memory."""

import itertools

import pytest

from mixfleet_engine.ops.cuda.packed import Form
from mixfleet_engine.ops.cuda.tiles import (
    LEAST_ROWS,
    MOST_ROWS,
    candidates,
    default_tiles,
    rows_per_tile,
    stage_bytes,
)

FORMS: list[Form] = ["plain", "fp8", "int8", "int4"]
SHARED = [99 << 10, 163 << 10, 227 << 10]
"""Of compute capability 8.6, 8.0 and 9.0."""


def test_a_tile_is_the_next_power_of_two_within_bounds() -> None:
    found = [rows_per_tile(number, "fp8") for number in (1, 16, 17, 64, 65, 128, 4096)]
    assert found == [16, 16, 32, 64, 128, 128, 128]
    assert rows_per_tile(4096, "int4") == MOST_ROWS["int4"] == 64


@pytest.mark.parametrize("form", FORMS)
def test_all_candidates_fit_and_have_64_rows_for_each_warp_group(form: Form) -> None:
    sizes = [block_t for block_t in (16, 32, 64, 128) if block_t <= MOST_ROWS[form]]
    for block_t, swiglu, shared in itertools.product(sizes, (False, True), SHARED):
        found = candidates(form, block_t, swiglu=swiglu, shared_bytes=shared)
        assert found[0] == default_tiles(form, block_t, swiglu=swiglu, shared_bytes=shared)
        assert len(set(found)) == len(found) <= 8
        for tiles in found:
            assert tiles.block_t == block_t >= LEAST_ROWS
            assert tiles.block_n == 16 * tiles.num_warps
            assert tiles.num_stages >= 2
            assert tiles.num_stages * stage_bytes(form, tiles, swiglu=swiglu) <= shared


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_leave_room_for_a_second_program(form: Form) -> None:
    for swiglu, shared in itertools.product((False, True), SHARED[1:]):
        tiles = default_tiles(form, LEAST_ROWS, swiglu=swiglu, shared_bytes=shared)
        assert 2 * tiles.num_stages * stage_bytes(form, tiles, swiglu=swiglu) <= shared
