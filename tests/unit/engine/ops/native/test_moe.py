from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.layer_weights import ExpertWeights, MoeWeights
from mixfleet_engine.ops.native import moe as native_moe
from mixfleet_engine.ops.native.memory import Scratch
from mixfleet_engine.ops.native.moe import NativeMoe
from mixfleet_engine.ops.reference import ReferenceOps
from support.native_cases import (
    FORMS,
    Case,
    Form,
    make_case,
    native_library,
    random,
    rounded,
)

WIDTH, EXPERT_WIDTH, EPS = 160, 72, 1e-5  # neither a multiple of a panel


class Layer:
    """Random weights of one layer, and its output computed by the reference back-end."""

    def __init__(
        self, form: Form = "bf16", *, num_experts: int = 4, top_k: int = 2, shared: bool = False
    ) -> None:
        self.cases: list[tuple[Case, Case]] = [
            (
                make_case(form, 2 * EXPERT_WIDTH, WIDTH, seed=10 * expert),
                make_case(form, WIDTH, EXPERT_WIDTH, seed=10 * expert + 5),
            )
            for expert in range(1 if shared else num_experts)
        ]
        experts = tuple(ExpertWeights(w13=up.weight, w2=down.weight) for up, down in self.cases)
        self.weights = MoeWeights(
            norm=(random(WIDTH, seed=1) * 0.2 + 1).bfloat16(),
            norm_eps=EPS,
            gate=random(num_experts, WIDTH, seed=2),
            experts=experts * num_experts if shared else experts,
            experts_per_token=top_k,
        )

    def block(self, threads: int = 1) -> NativeMoe:
        return NativeMoe(self.weights, native_library(), threads)

    def expected(self, x: Tensor) -> Tensor:
        weights = self.weights
        normed = ReferenceOps().rms_norm(x, weights.norm.float(), EPS)
        best, chosen = (normed @ weights.gate.T).topk(weights.experts_per_token)
        cases = self.cases * (len(weights.experts) // len(self.cases))
        experts = [lambda rows, case=case: expert_output(case, rows) for case in cases]
        return ReferenceOps().mix_experts(normed, best.softmax(-1), chosen, experts)


def expert_output(case: tuple[Case, Case], x: Tensor) -> Tensor:
    up, down = case
    gate_up = up.product(x)
    return down.product(F.silu(gate_up[:, :EXPERT_WIDTH]) * gate_up[:, EXPERT_WIDTH:])


def inputs(num_tokens: int, seed: int = 3) -> Tensor:
    return random(num_tokens, WIDTH, seed=seed) * 3


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare up to the rounding of activations that differ in their last bit of fp32."""
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_block_matches_the_reference(form: Form, top_k: int) -> None:
    layer = Layer(form, top_k=top_k)
    block = layer.block()
    for num_tokens in (1, 2, 7, 64, 300):
        x = inputs(num_tokens)
        assert_close(block(x), layer.expected(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_token_has_the_same_bits_alone_and_among_others(form: Form, shared: bool) -> None:
    block = Layer(form, shared=shared).block()
    x = inputs(300)
    alone = torch.cat([block(row[None]) for row in x])
    for num_tokens in (2, 5, 33, 300):
        assert torch.equal(block(x[:num_tokens]), alone[:num_tokens])
        assert torch.equal(block(x[-num_tokens:]), alone[-num_tokens:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_the_number_of_threads_changes_no_bit(form: Form, num_tokens: int) -> None:
    layer, x = Layer(form), inputs(num_tokens)
    one = layer.block()(x)
    for threads in (2, 3):
        assert torch.equal(layer.block(threads)(x), one)


def test_tokens_beyond_one_call_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(), inputs(50)
    whole = layer.block()(x)
    monkeypatch.setattr(native_moe, "MAX_ROWS", 8)
    block = layer.block()
    assert torch.equal(block(x), whole)
    added = x.clone()
    block.add_to(added)
    assert torch.equal(added, x + whole)


@pytest.mark.parametrize("favourite", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_may_choose_one_expert_and_leave_the_others_unused(
    form: Form, favourite: int
) -> None:
    layer = Layer(form, top_k=1)
    direction = random(WIDTH, seed=9).abs()
    gate = torch.zeros(4, WIDTH)
    gate[favourite] = direction
    layer.weights = replace(layer.weights, gate=gate)
    x = direction + inputs(100) * 0.05
    expected = expert_output(
        layer.cases[favourite], ReferenceOps().rms_norm(x, layer.weights.norm.float(), EPS)
    )
    assert_close(layer.block()(x), expected)


def test_of_equal_scores_the_lowest_experts_are_chosen() -> None:
    layer = Layer(num_experts=5)
    layer.weights = replace(layer.weights, gate=random(1, WIDTH, seed=2).repeat(5, 1))
    x = inputs(20)
    normed = ReferenceOps().rms_norm(x, layer.weights.norm.float(), EPS)
    expected = (expert_output(layer.cases[0], normed) + expert_output(layer.cases[1], normed)) / 2
    assert_close(layer.block()(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_shared_copy_has_the_bits_of_as_many_equal_copies(form: Form) -> None:
    shared = Layer(form, shared=True)
    copies = Layer(form, shared=True)
    (up, down) = copies.cases[0]
    copies.weights = replace(
        copies.weights,
        experts=tuple(ExpertWeights(w13=up.weight, w2=down.weight) for _ in range(4)),
    )
    x = inputs(37)
    assert torch.equal(shared.block()(x), copies.block()(x))
    assert_close(shared.block()(x), shared.expected(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_token_that_is_not_a_number_hurts_no_other(form: Form, shared: bool) -> None:
    block = Layer(form, shared=shared).block()
    x = inputs(30)
    expected = block(x)
    x[11, 5] = float("nan")
    found = block(x)
    assert found[11].isnan().all()
    others = torch.arange(30) != 11
    assert torch.equal(found[others], expected[others])


def test_the_sum_is_added_onto_the_stream_in_place() -> None:
    block, x = Layer().block(threads=2), inputs(9)
    expected = x + block(x)
    block.add_to(x)
    assert torch.equal(x, expected)


def test_blocks_that_share_scratch_do_not_disturb_each_other() -> None:
    layers = [Layer("bf16"), Layer("int8", num_experts=6), Layer("int4", shared=True)]
    scratch = Scratch()
    blocks = [NativeMoe(layer.weights, native_library(), 1, scratch) for layer in layers]
    for num_tokens in (3, 70, 1):
        x = inputs(num_tokens)
        for layer, block in zip(layers, blocks, strict=True):
            assert torch.equal(block(x), layer.block()(x))


def test_calling_the_block_leaves_its_input_alone() -> None:
    block, x = Layer().block(), inputs(9)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_slices_of_the_experts_width_add_up_to_the_whole() -> None:
    layer, x = Layer(), inputs(20)
    parts = []
    for part in (slice(0, 40), slice(40, EXPERT_WIDTH)):
        experts = []
        for up, down in layer.cases:
            gate, gated = up.plain.chunk(2)
            w13 = torch.cat((gate[part], gated[part])).bfloat16()
            experts.append(ExpertWeights(w13=w13, w2=down.plain[:, part].bfloat16().contiguous()))
        weights = replace(layer.weights, experts=tuple(experts))
        parts.append(NativeMoe(weights, native_library(), 1)(x))
    torch.testing.assert_close(parts[0] + parts[1], layer.block()(x), rtol=1e-4, atol=1e-4)


def test_gates_of_any_size_neither_overflow_nor_lose_their_sign() -> None:
    layer = Layer(shared=True)
    up, down = layer.cases[0]
    assert isinstance(up.weight, Tensor)
    large = (up.plain * 1000).bfloat16()
    case = (replace(up, weight=large, plain=large.float()), down)
    layer.weights = replace(layer.weights, experts=(ExpertWeights(w13=large, w2=down.weight),) * 4)
    x = inputs(20)
    found = layer.block()(x)
    assert found.isfinite().all()
    normed = ReferenceOps().rms_norm(x, layer.weights.norm.float(), EPS)
    assert_close(found, expert_output(case, normed))


def test_the_support_code_rounds_rows_of_zeros_to_zeros() -> None:
    assert torch.equal(rounded(torch.zeros(2, 8), "int8"), torch.zeros(2, 8, dtype=torch.float64))
