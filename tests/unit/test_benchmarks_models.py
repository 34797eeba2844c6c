"""The benchmark's models are what they claim: real copies, tame numbers, the same in GGUF."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import models
from benchmarks.models import (
    DEMO_EXPERTS,
    demo_checkpoint,
    num_weights,
    permuted,
    random_checkpoint,
)
from benchmarks.peers.llama_cpp.convert import permute, write_gguf

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.gguf_file import FloatArray, GgufFile
from mixfleet_engine.gguf_layout import plan_tensors, read_shape, read_tensor, unpermute
from mixfleet_engine.safetensors_writer import to_bf16
from mixfleet_engine.tokenizer import load_tokenizer
from support import gguf_files
from support.tiny_model import hf_tensors, tiny_config, write_hf_checkpoint

DENSE = tiny_config(shared_experts=True, tie_word_embeddings=True)
EXPERT = "model.layers.1.block_sparse_moe.experts"


def silu(x: FloatArray) -> FloatArray:
    found: FloatArray = x / (1 + np.exp(-x))
    return found


def feed_forward(matrices: dict[str, FloatArray], x: FloatArray) -> FloatArray:
    found: FloatArray = matrices["w2"] @ (silu(matrices["w1"] @ x) * (matrices["w3"] @ x))
    return found


def demo_from(folder: Path) -> models.Checkpoint:
    tensors = gguf_files.gguf_tensors(DENSE, hf_tensors(DENSE), "dense")
    file = gguf_files.write_gguf(folder / "dense.gguf", DENSE, tensors)
    return demo_checkpoint(GgufFile(file), DEMO_EXPERTS)


def test_every_copy_of_an_expert_gives_the_dense_layers_output(tmp_path: Path) -> None:
    demo = demo_from(tmp_path)
    x = np.random.default_rng(0).standard_normal(DENSE.dim).astype(np.float32)
    original = hf_tensors(DENSE)
    dense = feed_forward(
        {name: original[f"{EXPERT}.0.{name}.weight"].numpy() for name in ("w1", "w2", "w3")}, x
    )
    for expert in range(DEMO_EXPERTS):
        names = {name: f"{EXPERT}.{expert}.{name}.weight" for name in ("w1", "w2", "w3")}
        copy = {name: demo.read(full) for name, full in names.items()}
        np.testing.assert_allclose(feed_forward(copy, x), dense, rtol=1e-4, atol=1e-4)


def test_copies_differ_so_that_a_mix_of_two_experts_is_wrong(tmp_path: Path) -> None:
    demo = demo_from(tmp_path)
    x = np.ones(DENSE.dim, np.float32)
    matrices = {name: demo.read(f"{EXPERT}.0.{name}.weight") for name in ("w1", "w2", "w3")}
    right = feed_forward(matrices, x)
    matrices["w2"] = demo.read(f"{EXPERT}.1.w2.weight")
    assert not np.allclose(feed_forward(matrices, x), right, rtol=0.1)


def test_the_demo_checkpoint_has_every_tensor_of_a_mixtral(tmp_path: Path) -> None:
    demo = demo_from(tmp_path)
    sparse = dataclasses.replace(DENSE, shared_experts=False, num_experts=DEMO_EXPERTS)
    expected = {name: tuple(tensor.shape) for name, tensor in hf_tensors(sparse).items()}
    assert dict(demo.shapes) == expected


def test_permuted_keeps_all_rows_and_knows_its_axis() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows, columns = permuted(values, 1, axis=0), permuted(values.T, 1, axis=1)
    assert sorted(rows[:, 0]) == [0, 3, 6, 9]
    np.testing.assert_array_equal(rows, columns.T)


def test_random_weights_keep_activations_near_one() -> None:
    config = tiny_config()
    checkpoint = random_checkpoint(config)
    x = np.random.default_rng(1).standard_normal((256, config.dim)).astype(np.float32)
    for name, shape in checkpoint.shapes.items():
        values = checkpoint.read(name)
        assert values.shape == shape
        if len(shape) == 2 and shape[1] == config.dim and "embed" not in name:
            assert 0.7 < (x @ values.T).std() < 1.4, name
    assert 0.9 < checkpoint.read("model.embed_tokens.weight").std() < 1.1


def test_random_weights_are_the_same_each_time_and_differ_by_name() -> None:
    first, again = (random_checkpoint(tiny_config()) for _ in range(2))
    one, other = f"{EXPERT}.0.w1.weight", f"{EXPERT}.1.w1.weight"
    np.testing.assert_array_equal(first.read(one), again.read(one))
    assert not np.array_equal(first.read(one), first.read(other))


def test_the_random_model_has_625_million_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(models.RANDOM_CONFIG))
    config = ModelConfig.from_checkpoint(tmp_path)
    sizes = num_weights(config)
    embedding = config.vocab_size * config.dim
    total = sizes["the_rest"] + config.num_experts * sizes["one_expert"] + embedding
    assert total == pytest.approx(625.6e6, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_num_weights_counts_the_output_matrix_once(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    tensors = hf_tensors(config)
    dense = sum(t.numel() for name, t in tensors.items() if ".experts." not in name)
    one = sum(t.numel() for name, t in tensors.items() if ".experts.0." in name)
    unread = 0 if tied else config.vocab_size * config.dim
    assert num_weights(config) == {"one_expert": one, "the_rest": dense - unread}


def test_a_model_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def maker(target: Path, _: models.Say) -> None:
        made.append(target.name)

    monkeypatch.setattr(models, "make_demo", maker)
    monkeypatch.setattr(models, "make_random", maker)
    for _ in range(2):
        found = models.ensure_models(tmp_path, lambda _: None)
    assert made == ["demo", "random"]
    assert found["demo"] == tmp_path / "demo"


def test_the_random_models_tokenizer_has_a_word_for_every_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.RANDOM_CONFIG, "vocab_size", 300)
    monkeypatch.setattr(models, "_write", lambda *_: None)
    models.make_random(tmp_path, lambda _: None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_bytes(299) == b" word40"


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_holds_the_checkpoints_weights_in_llama_cpps_order(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(num_experts=4, tie_word_embeddings=tied)
    checkpoint = write_hf_checkpoint(tmp_path / "model", config, dtype=torch.bfloat16)
    write_gguf(checkpoint, tmp_path / "bf16.gguf")
    file = GgufFile(tmp_path / "bf16.gguf")
    shape = read_shape(file, config.num_experts)
    assert (shape.num_experts, shape.shared_experts) == (4, False)
    assert (shape.rope_theta, shape.context_length) == (config.rope_theta, config.context_length)
    original = {name: t.bfloat16().float().numpy() for name, t in hf_tensors(config).items()}
    plans = plan_tensors(file, shape)
    assert {plan.name for plan in plans} == set(original)
    for plan in plans:
        found = read_tensor(file, plan, 0)
        np.testing.assert_array_equal(to_bf16(found), to_bf16(original[plan.name]), plan.name)


def test_permute_is_the_inverse_of_unpermute() -> None:
    weight = np.arange(48, dtype=np.float32).reshape(8, 6)
    assert permute(weight[:4, :1], 1).ravel().tolist() == [0, 12, 6, 18]
    np.testing.assert_array_equal(unpermute(permute(weight, 2), 2), weight)
