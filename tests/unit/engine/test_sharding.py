from dataclasses import replace
from typing import Any

import pytest

from mixfleet_engine.config import ModelConfig, Shard
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.published import PUBLISHED
from mixfleet_engine.sharding import WeightCuts, check_sharing, part_of, share_of, working_sizes
from mixfleet_engine.weights import weight_shapes
from support.tiny_model import tiny_config

TINY = tiny_config()
FOUR_HEADS = tiny_config(n_heads=8, n_kv_heads=4, vocab_size=301)


def all_ranks(world: int) -> list[Shard]:
    return [Shard(rank=rank, world=world) for rank in range(world)]


@pytest.mark.parametrize("size", [1, 2, 5, 32_000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_cover_everything_once_and_differ_by_one_at_most(size: int, world: int) -> None:
    parts = [range(size)[part_of(size, shard)] for shard in all_ranks(world)]
    assert [place for part in parts for place in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_ranks_own_sizes_are_its_share_of_heads_and_experts() -> None:
    own = share_of(FOUR_HEADS, Shard(rank=1, world=2))
    assert (own.n_heads, own.n_kv_heads, own.hidden_dim) == (4, 2, 48)
    assert own.kv_values_per_token == FOUR_HEADS.kv_values_per_token // 2
    assert own == replace(FOUR_HEADS, n_heads=4, n_kv_heads=2, hidden_dim=48)
    assert share_of(FOUR_HEADS, Shard()) == FOUR_HEADS


@pytest.mark.parametrize(
    ("model", "world", "named"),
    [
        (TINY, 3, r"tp=3: 3 ranks cannot share n_heads=4 equally; sizes that work: 1, 2$"),
        (TINY, 4, r"tp=4.*n_kv_heads=2 equally; sizes that work: 1, 2$"),
        (tiny_config(hidden_dim=95), 2, r"tp=2.*hidden_dim=95 equally; sizes that work: 1$"),
        (tiny_config(vocab_size=1), 2, r"tp=2: 2 ranks cannot share vocab_size=1; .*: 1$"),
        (TINY, 0, r"tp=0"),
    ],
)
def test_ranks_that_cannot_share_the_model_are_told_which_numbers_can(
    model: ModelConfig, world: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_sharing(model, world)


def test_a_share_of_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp=4"):
        share_of(TINY, Shard(rank=0, world=4))


def test_a_group_of_int4_across_the_border_of_two_ranks_is_refused_with_its_numbers() -> None:
    heads, width = (
        tiny_config(n_heads=12, n_kv_heads=4, hidden_dim=512),
        tiny_config(n_heads=16, n_kv_heads=4, hidden_dim=384),
    )
    with pytest.raises(ConfigError, match=r"n_heads \* head_dim=192 is 96 inputs a rank.*128"):
        check_sharing(heads, 2, weight_dtype="int4")
    with pytest.raises(ConfigError, match=r"hidden_dim=384 is 192 inputs a rank.*work: 1$"):
        check_sharing(width, 2, weight_dtype="int4")
    for model in (heads, width):
        check_sharing(model, 2, weight_dtype="int8")
        check_sharing(model, 1, weight_dtype="int4")


@pytest.mark.parametrize("weight_dtype", ["auto", "int8", "int4"])
def test_the_published_models_can_be_shared_by_up_to_eight(weight_dtype: str) -> None:
    for model in PUBLISHED.values():
        assert working_sizes(model, weight_dtype=weight_dtype) == [1, 2, 4, 8]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"shared_experts": True}])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_cuts_of_all_ranks_hold_every_number_of_every_weight_once(
    world: int, changes: dict[str, Any]
) -> None:
    model = replace(FOUR_HEADS, **changes)
    for name, shape in weight_shapes(model).items():
        cuts = [WeightCuts(model, shard).of(name, shape) for shard in all_ranks(world)]
        cells = [
            (row, column)
            for rows, columns in cuts
            for row in range(shape[0])[rows]
            for column in range(shape[1] if len(shape) > 1 else 1)[columns]
        ]
        whole = len(set(cells))
        is_whole_everywhere = "norm" in name or "gate" in name
        assert whole == shape[0] * (shape[1] if len(shape) > 1 else 1), name
        assert len(cells) == whole * (world if is_whole_everywhere else 1), name


def test_a_cut_weight_has_the_shape_that_its_cuts_leave() -> None:
    shard = Shard(rank=1, world=4)
    cuts, shapes = WeightCuts(FOUR_HEADS, shard), weight_shapes(FOUR_HEADS)
    expected = {
        "tok_embeddings.weight": (75, 64),
        "layers.1.attention.wq.weight": (32, 64),
        "layers.1.attention.wk.weight": (16, 64),
        "layers.0.attention.wo.weight": (64, 32),
        "layers.1.feed_forward.experts.7.w1.weight": (24, 64),
        "layers.1.feed_forward.experts.7.w2.weight": (64, 24),
        "layers.1.feed_forward.gate.weight": (8, 64),
        "layers.1.ffn_norm.weight": (64,),
        "output.weight": (75, 64),
    }
    assert {name: cuts.shape(name, shapes[name]) for name in expected} == expected
