"""The quality benchmark: its windows, its logits and its figures, small enough to check."""

import math
from pathlib import Path

import pytest
import torch
from benchmarks.quality import ROWS, compare, logits, measure, variants, windows

from mixfleet_engine.config import EngineConfig
from mixfleet_engine.loading import load_runner
from support.dense_mixtral import dense_logits
from support.tiny_model import hf_tensors, tiny_config, write_hf_checkpoint


def test_windows_do_not_overlap_and_a_short_rest_is_left_out() -> None:
    assert windows([1, 2, 3, 4, 5, 6, 7], 3) == [(1, 2, 3), (4, 5, 6)]
    assert windows([1, 2], 3) == []


@pytest.mark.parametrize("num_tokens", [2, 16, 23])
def test_logits_are_those_after_every_token_but_the_last(tmp_path: Path, num_tokens: int) -> None:
    config = tiny_config(vocab_size=64, context_length=64)
    settings = EngineConfig(device="cpu", dtype="float32", backend="reference", num_blocks=4)
    runner = load_runner(write_hf_checkpoint(tmp_path, config), settings)
    tokens = tuple(range(5, 5 + num_tokens))
    expected = dense_logits(config, hf_tensors(config), tokens)[:-1]
    torch.testing.assert_close(logits(runner, tokens).double(), expected, rtol=1e-3, atol=1e-3)


def test_figures_are_the_textbook_ones() -> None:
    fp32 = torch.tensor([0.7, 0.2, 0.1]).log()[None]
    bf16 = torch.tensor([0.1, 0.6, 0.3]).log()[None]
    found = torch.tensor([0.5, 0.3, 0.2]).log()[None] + 4  # a shift means nothing
    row = compare(found, fp32, bf16, torch.tensor([2]), "int8")
    assert row.variant == "int8"
    assert row.kl_fp32 == pytest.approx(
        0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2), rel=1e-5
    )
    assert row.kl_bf16 == pytest.approx(
        0.1 * math.log(0.1 / 0.5) + 0.6 * math.log(0.6 / 0.3) + 0.3 * math.log(0.3 / 0.2), rel=1e-5
    )
    assert (row.top1_fp32, row.top1_bf16) == (1, 0)
    assert row.perplexity == pytest.approx(1 / 0.2, rel=1e-5)


def test_figures_are_means_over_all_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    found, fp32, bf16 = torch.randn(3, ROWS * 2 + 5, 11, generator=generator)
    following = torch.randint(11, (len(found),), generator=generator)
    row = compare(found, fp32, bf16, following, "int4")
    alone = [
        compare(found[i : i + 1], fp32[i : i + 1], bf16[i : i + 1], following[i : i + 1], "int4")
        for i in range(len(found))
    ]
    count = len(found)
    assert row.kl_fp32 == pytest.approx(sum(one.kl_fp32 for one in alone) / count, rel=1e-5)
    assert row.top1_bf16 == pytest.approx(sum(one.top1_bf16 for one in alone) / count)
    assert math.log(row.perplexity) == pytest.approx(
        sum(math.log(one.perplexity) for one in alone) / count, rel=1e-4
    )


def test_each_back_end_has_the_forms_that_it_computes_with() -> None:
    assert [(variant.name, variant.dtype) for variant in variants(["reference", "native"])] == [
        ("reference fp32", "float32"),
        ("reference bf16", "bfloat16"),
        ("reference int8", "float32"),
        ("reference int4", "float32"),
        ("reference fp8", "float32"),
        ("native int8", "bfloat16"),
        ("native int4", "bfloat16"),
        ("native bf16", "bfloat16"),
    ]


def test_a_model_measured_against_itself_differs_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hf_checkpoint(tmp_path, tiny_config(vocab_size=64, context_length=64))
    monkeypatch.setattr("benchmarks.quality.load_tokenizer", lambda _: Letters())
    text = "what is measured here is the same model, again and again"
    rows = {row.variant: row for row in measure(folder, text, ["reference"], 16)}
    assert list(rows) == [f"reference {form}" for form in ("fp32", "bf16", "int8", "int4", "fp8")]
    assert rows["reference fp32"].kl_fp32 == 0
    assert rows["reference fp32"].top1_fp32 == 1
    assert rows["reference bf16"].kl_bf16 == 0
    assert 0 < rows["reference int8"].kl_fp32 < rows["reference int4"].kl_fp32


class Letters:
    """A tokenizer of 64 tokens."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 64 for letter in text]
