import re
from typing import Any

import pytest

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import ConfigError, DoesNotFitError
from mixfleet_engine.fit import CONTEXTS, FitRow, fit_table, require_fit
from mixfleet_engine.machines import Machine, named_machines
from mixfleet_engine.plan import plan_memory
from mixfleet_engine.published import PUBLISHED
from support.memory_machines import GIB, machine
from support.tiny_model import tiny_config

SMALL, LARGE = PUBLISHED["mixtral-8x7b"], PUBLISHED["mixtral-8x22b"]
KILO = 1000


def rows_of(model: ModelConfig, **changes: Any) -> dict[tuple[str, str, str], FitRow]:
    rows = fit_table(model, named_machines(), **changes)
    return {(row.machine.label, row.weight_dtype, row.kv_dtype): row for row in rows}


# Independent figures: 0.94 of the memory - 2 GiB per device - weights, worked out by hand for
# each case when the engine was designed.
BY_HAND = [
    (SMALL, "1x H100 80GB", "fp8", "fp8", 479, (58, 14)),
    (SMALL, "1x H100 80GB", "fp8", "bfloat16", 239, (29, 7)),
    (SMALL, "1x H200 141GB", "bfloat16", "bfloat16", 347, (42, 10)),
    (SMALL, "1x H200 141GB", "fp8", "fp8", 1400, (171, 42)),
    (SMALL, "2x A100 80GB", "bfloat16", "bfloat16", 481, (58, 14)),
    (SMALL, "2x H100 80GB", "fp8", "fp8", 1670, (203, 50)),
    (SMALL, "4x A100 80GB", "bfloat16", "bfloat16", 1670, (204, 51)),
    (SMALL, "4x H100 80GB", "fp8", "fp8", 4060, (495, 123)),
    (SMALL, "8x A100 80GB", "bfloat16", "bfloat16", 4060, (495, 123)),
    (SMALL, "4x A6000 48GB", "bfloat16", "bfloat16", 685, (83, 20)),
    (SMALL, "4x 6000 Ada 48GB", "bfloat16", "bfloat16", 685, (83, 20)),
    (SMALL, "2x 6000 Ada 48GB", "int8", "bfloat16", 341, (41, 10)),
    (LARGE, "2x H100 80GB", "fp8", "fp8", 136, (16, 4, 2)),
    (LARGE, "4x A100 80GB", "bfloat16", "bfloat16", 137, (16, 4, 2)),
    (LARGE, "4x H100 80GB", "fp8", "fp8", 1500, (182, 45, 22)),
    (LARGE, "8x H100 80GB", "bfloat16", "bfloat16", 1500, (183, 45, 22)),
]


@pytest.mark.parametrize(("model", "label", "weights", "kv", "kilotokens", "sequences"), BY_HAND)
def test_the_table_agrees_with_figures_worked_out_by_hand(
    model: ModelConfig,
    label: str,
    weights: str,
    kv: str,
    kilotokens: int,
    sequences: tuple[int, ...],
) -> None:
    row = rows_of(model)[label, weights, kv]
    assert row.plan is not None
    assert row.plan.kv_tokens == pytest.approx(kilotokens * KILO, rel=0.01)
    assert row.sequences[: len(sequences)] == sequences


@pytest.mark.parametrize(
    ("model", "label", "kv", "kilotokens"),
    [
        (SMALL, "1x H100 80GB", "bfloat16", 411),
        (SMALL, "1x H100 80GB", "fp8", 822),
        (SMALL, "2x H100 80GB", "bfloat16", 1010),
        (SMALL, "1x A6000 48GB", "bfloat16", 164),
        (SMALL, "2x 24GB", "bfloat16", 145),
        (LARGE, "2x H100 80GB", "bfloat16", 364),
    ],
)
def test_int4_holds_a_little_less_than_by_hand_because_scales_are_fp32(
    model: ModelConfig, label: str, kv: str, kilotokens: int
) -> None:
    plan = rows_of(model)[label, "int4", kv].plan
    assert plan is not None
    assert 0.95 * kilotokens * KILO < plan.kv_tokens < kilotokens * KILO


def test_every_machine_and_dtype_has_one_row_in_order() -> None:
    rows = fit_table(SMALL, named_machines())
    keys = [(row.machine.label, row.weight_dtype, row.kv_dtype) for row in rows]
    assert keys == [
        (found.label, weights, kv)
        for found in named_machines()
        for weights in ("bfloat16", "fp8", "int8", "int4")
        for kv in ("bfloat16", "fp8")
    ]
    assert all(len(row.sequences) == len(CONTEXTS) for row in rows)


def test_fp8_and_int8_take_the_same() -> None:
    rows = rows_of(LARGE)
    for (label, weights, kv), row in rows.items():
        if weights == "fp8":
            assert rows[label, "int8", kv].sequences == row.sequences


def test_contexts_beyond_the_models_are_unknown_and_not_zero() -> None:
    assert all(row.sequences[2] is None for row in fit_table(SMALL, named_machines()))
    assert all(row.sequences[2] is not None for row in fit_table(LARGE, named_machines()))


def test_a_row_that_does_not_fit_says_what_is_needed() -> None:
    row = rows_of(SMALL)["2x A6000 48GB", "bfloat16", "bfloat16"]
    assert row.sequences == (0, 0, None)
    needed = 86.99 / 2 + 0.06 * 47.5 + 2 + 0.0625
    assert row.problem == f"{needed:.2f} GiB of 47.50 GiB needed"


def test_a_machine_whose_devices_cannot_share_the_model_has_a_row_that_says_so() -> None:
    (row,) = fit_table(
        tiny_config(), [machine(80, num_devices=4)], weight_dtypes=["int8"], kv_dtypes=["fp8"]
    )
    assert row.plan is None
    assert row.problem == "tp=4: 4 ranks cannot share n_kv_heads=2 equally"
    assert row.sequences == (None, None, None)


def test_a_wrong_dtype_is_no_row_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="weight_dtype='int2'"):
        fit_table(SMALL, named_machines(), weight_dtypes=["int2"])


def test_what_fits_gives_its_plan() -> None:
    dtypes = {"weight_dtype": "bfloat16", "kv_dtype": "fp8"}
    assert require_fit(SMALL, machine(100), **dtypes) == plan_memory(SMALL, machine(100), **dtypes)


def refusal(model: ModelConfig, where: Machine, weight_dtype: str = "bfloat16") -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as error:
        require_fit(model, where, weight_dtype=weight_dtype, kv_dtype="bfloat16")
    return error.value


def test_a_refusal_has_the_numbers_and_they_add_up() -> None:
    error = refusal(SMALL, machine(80))
    text = str(error)
    parts = [float(part) for part in re.findall(r"([\d.]+) GiB", text)]
    weights, reserve, cache, needed, available = parts[:5]
    assert weights == 86.99
    assert needed == pytest.approx(weights + reserve + cache, abs=0.02)
    assert available == 80.0
    assert error.needed_bytes == pytest.approx(needed * GIB, rel=1e-3)
    assert error.available_bytes == 80 * GIB
    assert "\n" not in text


@pytest.mark.parametrize(
    ("model", "where", "weight_dtype", "nearest"),
    [
        (SMALL, machine(80), "bfloat16", "int8 fits it, "),
        (SMALL, machine(80), "float32", "int8 fits it, "),
        (SMALL, machine(100, num_devices=1), "float32", "bfloat16 fits it, "),
        (SMALL, machine(48), "int8", "int4 fits it, "),
        (SMALL, machine(24), "int4", "int4 fits 2x GPU, "),
        (SMALL, machine(24), "bfloat16", "bfloat16 fits 8x GPU, "),
        (LARGE, machine(24), "bfloat16", "int8 fits 8x GPU, "),
        (LARGE, machine(8), "int4", "nothing up to 8x GPU does"),
        (LARGE, machine(24, kind="cpu"), "bfloat16", "int4, the smallest, needs "),
        (SMALL, machine(64, kind="cpu"), "bfloat16", "int8 fits it, "),
        (SMALL, machine(24, kind="cpu"), "int4", "there is no smaller weight dtype"),
        (SMALL, machine(80, kind="cpu", num_devices=2, free_gib=30), "bfloat16", "int8 fits it, "),
    ],
)
def test_the_nearest_fit_is_smaller_weights_then_more_devices(
    model: ModelConfig, where: Machine, weight_dtype: str, nearest: str
) -> None:
    error = refusal(model, where, weight_dtype)
    assert error.nearest is not None
    assert error.nearest.startswith(nearest)
    assert str(error).endswith(error.nearest)


def test_what_is_called_nearest_does_fit() -> None:
    error = refusal(LARGE, machine(24))
    found = re.fullmatch(
        r"(\w+) fits (\d)x GPU, with (\d+) tokens of KV cache", error.nearest or ""
    )
    assert found is not None
    plan = require_fit(
        LARGE, machine(24, num_devices=int(found[2])), weight_dtype=found[1], kv_dtype="bfloat16"
    )
    assert plan.kv_tokens == int(found[3])


def test_groups_that_cannot_share_the_model_are_not_suggested() -> None:
    with_eight_heads = tiny_config(n_layers=2000, hidden_dim=20_000, n_heads=8, n_kv_heads=8)
    assert "bfloat16 fits 8x GPU" in str(refusal(with_eight_heads, machine(24)))
    with_two = tiny_config(n_layers=2000, hidden_dim=20_000)
    assert "int4 fits 2x GPU" in str(refusal(with_two, machine(24)))


def test_a_group_is_refused_with_the_figures_of_one_device() -> None:
    error = refusal(SMALL, machine(24, num_devices=2))
    assert "does not fit 2x GPU, 43.50 GiB of bfloat16" in str(error)
    assert "(of one device): " in str(error)
    assert error.available_bytes == 24 * GIB
