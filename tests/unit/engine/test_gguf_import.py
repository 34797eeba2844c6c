import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixfleet_engine.chat_format import default_format
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.gguf_import import import_gguf
from mixfleet_engine.gguf_layout import unpermute
from mixfleet_engine.safetensors_writer import to_bf16
from mixfleet_engine.tokenizer import load_tokenizer
from support.gguf_files import CHAT_TEMPLATE, Experts, gguf_tensors, write_gguf
from support.tiny_model import hf_tensors, tiny_config
from support.tokenizer_files import NASTY_TEXTS, mistral_file

DENSE = tiny_config(shared_experts=True, tie_word_embeddings=True)
SPARSE = tiny_config(num_experts=4)


def bf16_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return random weights that bf16 holds exactly."""
    return {name: tensor.bfloat16() for name, tensor in hf_tensors(config).items()}


def dense_file(directory: Path, config: ModelConfig = DENSE, **options: Any) -> Path:
    tensors = gguf_tensors(config, bf16_tensors(config), "dense")
    return write_gguf(directory / "dense.gguf", config, tensors, **options)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    before = set(directory.iterdir())
    yield
    assert {p for p in set(directory.iterdir()) - before if p.suffix != ".lock"} == set()


def test_a_dense_model_becomes_a_mixtral_with_one_stored_expert(tmp_path: Path) -> None:
    target = import_gguf(dense_file(tmp_path), tmp_path / "made", num_experts=8)
    found = load_file(target / "model.safetensors")
    routers = {name: found.pop(name) for name in list(found) if "gate.weight" in name}
    expected = {n: t for n, t in bf16_tensors(DENSE).items() if "gate.weight" not in n}
    assert_same(found, expected)
    assert [router.shape for router in routers.values()] == [(8, DENSE.dim)] * DENSE.n_layers
    assert ModelConfig.from_checkpoint(target) == DENSE
    assert json.loads((target / "config.json").read_text())["mixfleet"] == {
        "shared_experts": True,
        "source_file": "dense.gguf",
        "source_name": None,
        "source_license": "apache-2.0",
    }


def test_the_routers_are_random_but_the_same_each_time(tmp_path: Path) -> None:
    file = dense_file(tmp_path)
    first, second = (
        load_file(import_gguf(file, tmp_path / name) / "model.safetensors") for name in "ab"
    )
    gates = [first[name] for name in first if "gate.weight" in name]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(gates[0], gates[1])
    assert 0.01 < torch.cat(gates).float().std() < 0.03


@pytest.mark.parametrize("experts", ["stacked", "per-expert"])
def test_a_mixtral_file_is_taken_as_it_is(experts: Experts, tmp_path: Path) -> None:
    expected = bf16_tensors(SPARSE)
    file = write_gguf(
        tmp_path / "m.gguf", SPARSE, gguf_tensors(SPARSE, expected, experts), experts=experts
    )
    target = import_gguf(file, tmp_path / "made", num_experts=8)
    assert_same(load_file(target / "model.safetensors"), expected)
    assert ModelConfig.from_checkpoint(target) == SPARSE


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_tensors_are_read_as_llama_cpp_means_them(
    quantization: str, tmp_path: Path
) -> None:
    expected = bf16_tensors(SPARSE)
    file = write_gguf(
        tmp_path / "m.gguf",
        SPARSE,
        gguf_tensors(SPARSE, expected, "stacked"),
        experts="stacked",
        quantization=quantization,
    )
    found = load_file(import_gguf(file, tmp_path / "made") / "model.safetensors")
    steps = {"F16": 2e-3, "BF16": 0, "Q8_0": 0.01, "Q4_1": 0.1}
    for name, tensor in found.items():
        error = (tensor.float() - expected[name].float()).abs().max()
        assert error <= steps[quantization], name


def test_unpermute_puts_the_halves_of_each_head_apart() -> None:
    rows = np.array([["a0"], ["b0"], ["a1"], ["b1"], ["c0"], ["d0"], ["c1"], ["d1"]])
    apart = unpermute(rows, num_heads=2)
    assert [*apart[:, 0]] == ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"]


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    edges = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001]
    values = np.concatenate([bits, np.array(edges, dtype=np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bf16(values), expected)
    nan = struct.unpack("<f", struct.pack("<I", 0x7F800001))[0]
    assert torch.from_numpy(to_bf16(np.array([nan], np.float32))).view(torch.bfloat16).isnan()


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    whole = import_gguf(dense_file(tmp_path), tmp_path / "whole")
    parts = import_gguf(dense_file(tmp_path), tmp_path / "parts", max_shard_bytes=50_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found: dict[str, Tensor] = {}
    for file in files:
        shard = load_file(file)
        assert {index["weight_map"][name] for name in shard} == {file.name}
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 50_000
        found |= shard
    expected = load_file(whole / "model.safetensors")
    assert_same(found, expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    target = import_gguf(
        dense_file(tmp_path), tmp_path / "made", progress=lambda *step: steps.append(step)
    )
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {steps[-1][0]}
    assert steps[-1][0] == sum(
        tensor.nbytes for tensor in load_file(target / "model.safetensors").values()
    )


# --- the tokenizer ------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    target = import_gguf(dense_file(tmp_path), tmp_path / "made")
    tokenizer = load_tokenizer(target)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)  # gpt2's default: no BOS
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert default_format(tokenizer, target) == "chatml"
    for text in NASTY_TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
        assert tokenizer.control_ids.isdisjoint(ids)
    assert json.loads((target / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_smollm_splits_numbers_into_digits_and_gpt2_does_not(tmp_path: Path) -> None:
    merges = {"tokenizer.ggml.merges": ["1 2"]}
    pieces = {}
    for rule in ("smollm", "gpt-2"):
        file = dense_file(tmp_path, metadata={"tokenizer.ggml.pre": rule})
        tokens = tokens_of(file)
        tokens["tokenizer.ggml.tokens"].append("12")
        tokens["tokenizer.ggml.token_type"].append(1)
        file = dense_file(tmp_path, metadata={"tokenizer.ggml.pre": rule, **tokens, **merges})
        tokenizer = load_tokenizer(import_gguf(file, tmp_path / rule))
        pieces[rule] = [tokenizer.id_to_piece(token_id) for token_id in tokenizer.encode("12")]
    assert pieces == {"smollm": ["1", "2"], "gpt-2": ["12"]}


def tokens_of(file: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(file)
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    return {key: reader.fields[key].contents() for key in keys}


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made of a GGUF file with the whole tokenizer of Mixtral 8x7B; takes seconds."""
    directory = tmp_path_factory.mktemp("rebuilt")
    config = tiny_config(
        shared_experts=True, tie_word_embeddings=True, vocab_size=32_000, dim=8, n_layers=1
    )
    return import_gguf(
        dense_file(directory, config, tokenizer="mistral-v1"), directory / "made", num_experts=8
    )


@pytest.mark.slow
def test_mixtral_own_tokenizer_is_rebuilt_token_by_token(rebuilt: Path) -> None:
    tokenizer, oracle = load_tokenizer(rebuilt), load_tokenizer(mistral_file("v1"))
    prose = ("The quick brown fox\n  jumps", "naïve 漢字 𓂀", Path(__file__).read_text())
    for text in (*NASTY_TEXTS, *prose):
        assert tokenizer.encode(text) == oracle.encode(text)
    for name in ("vocab_size", "bos_id", "eos_id", "control_ids", "adds_leading_space"):
        assert getattr(tokenizer, name) == getattr(oracle, name)
    assert default_format(tokenizer, rebuilt) == "mistral-v1"


@pytest.mark.slow
def test_a_rebuilt_sentencepiece_model_decodes_like_the_original(rebuilt: Path) -> None:
    load: Callable[..., Any] = sentencepiece.SentencePieceProcessor
    ours = load(model_file=str(rebuilt / "tokenizer.model"))
    original = load(model_file=str(mistral_file("v1")))
    ids = list(range(0, 32_000, 7))
    assert ours.decode(ids) == original.decode(ids)
    assert ours.pad_id() == original.pad_id()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama'"),
        ({"without": ["blk.1.attn_q.weight"]}, r"tensor blk\.1\.attn_q\.weight is missing"),
        ({"without": ["token_embd.weight"]}, r"tensor token_embd\.weight is missing"),
        ({"without": ["llama.context_length"]}, r"metadata llama\.context_length is missing"),
        ({"without": ["tokenizer.ggml.merges"]}, r"array tokenizer\.ggml\.merges is missing"),
        ({"metadata": {"llama.block_count": "two"}}, "llama.block_count='two': must be int"),
        ({"metadata": {"llama.block_count": 1}}, r"blk\.1\.attn_k\.weight has no place"),
        ({"metadata": {"llama.feed_forward_length": 64}}, r"has shape \(96, 64\), not \(64, 64\)"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "scaling.type='yarn' is not supported"),
        (
            {"metadata": {"llama.rope.dimension_count": 8}},
            "dimension_count=8: must be the head's 16",
        ),
        ({"metadata": {"llama.attention.sliding_window": 4096}}, "sliding_window is not supported"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "model='bert' is not supported"),
        ({"metadata": {"tokenizer.ggml.pre": "other"}}, "pre='other' is not supported, only gpt-2"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token_id=999: there are"),
        ({"metadata": {"tokenizer.ggml.token_type": [1]}}, "tokens but 1 token types"),
    ],
)
def test_files_that_cannot_be_imported_are_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = dense_file(tmp_path, **options)
    with nothing_left(tmp_path), pytest.raises(CheckpointError, match=message):
        import_gguf(file, tmp_path / "made")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(DENSE, bf16_tensors(DENSE), "dense")
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    file = write_gguf(tmp_path / "m.gguf", DENSE, tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has no place"):
        import_gguf(file, tmp_path / "made")


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        {"tokenizer.ggml.precompiled_charsmap": [1, 2, 3]},
    ],
)
def test_a_tokenizer_that_changes_its_text_is_refused(
    metadata: dict[str, Any], tmp_path: Path
) -> None:
    file = dense_file(tmp_path, metadata={"tokenizer.ggml.model": "llama", **metadata})
    with pytest.raises(CheckpointError, match="changes its text"):
        import_gguf(file, tmp_path / "made")


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(SPARSE, bf16_tensors(SPARSE), "stacked")
    file = write_gguf(
        tmp_path / "m.gguf",
        SPARSE,
        tensors,
        experts="stacked",
        metadata={"llama.expert_count": 3},
        without=["blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"],
    )
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate_inp\.weight is missing"):
        import_gguf(file, tmp_path / "made")
    tensors["blk.0.ffn_gate_inp.weight"] = np.ones((3, SPARSE.dim), np.float32)
    file = write_gguf(
        tmp_path / "m.gguf",
        SPARSE,
        tensors,
        experts="stacked",
        metadata={"llama.expert_count": 3},
    )
    with pytest.raises(CheckpointError, match=r"_exps\.weight has shape \(4, 96, 64\), not \(3,"):
        import_gguf(file, tmp_path / "made")


def test_without_the_gguf_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dense_file(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mixfleet\[demo\]'"):
        import_gguf(file, tmp_path / "made")


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(DENSE, bf16_tensors(DENSE), "dense")
    file = write_gguf(tmp_path / "m.gguf", DENSE, tensors, raw_types={"token_embd.weight": "I32"})
    with pytest.raises(CheckpointError, match=r"token_embd\.weight of type I32"):
        import_gguf(file, tmp_path / "made")


def test_a_model_without_bos_and_eos_says_nothing_of_them(tmp_path: Path) -> None:
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")]
    target = import_gguf(dense_file(tmp_path, without=keys), tmp_path / "made")
    assert json.loads((target / "generation_config.json").read_text()) == {}
    assert load_tokenizer(target).eos_id is None


def test_scores_must_be_as_many_as_tokens(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}
    with pytest.raises(CheckpointError, match="tokens but 1 scores"):
        import_gguf(dense_file(tmp_path, metadata=metadata), tmp_path / "made")


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    config = tiny_config(shared_experts=True, tie_word_embeddings=True, vocab_size=100)
    with pytest.raises(CheckpointError, match="tokens, but the embedding has 100 rows"):
        import_gguf(dense_file(tmp_path, config), tmp_path / "made")


def test_one_expert_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_experts=1: must be at least 2"):
        import_gguf(dense_file(tmp_path), tmp_path / "made", num_experts=1)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model, but long enough to have a header")
    with pytest.raises(CheckpointError, match=r"m\.gguf: not a readable GGUF file"):
        import_gguf(file, tmp_path / "made")
    with pytest.raises(CheckpointError, match="no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "made")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    file = dense_file(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with nothing_left(tmp_path), pytest.raises(CheckpointError, match="not a readable GGUF file"):
        import_gguf(file, tmp_path / "made")


# --- all or nothing -----------------------------------------------------------------------------


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match="made: is there already"):
        import_gguf(dense_file(tmp_path), target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    file = dense_file(tmp_path)
    with nothing_left(tmp_path), pytest.raises(KeyboardInterrupt):
        import_gguf(file, tmp_path / "made", progress=fail)


def test_what_a_killed_import_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".made.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    target = import_gguf(dense_file(tmp_path), tmp_path / "made")
    assert not left.exists()
    assert (target / "config.json").is_file()


# --- the arithmetic -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_upcycled_model_answers_like_the_dense_one(tmp_path: Path) -> None:
    """Logits of transformers' Llama on the original and of its Mixtral on the import."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": DENSE.dim,
        "intermediate_size": DENSE.hidden_dim,
        "num_hidden_layers": DENSE.n_layers,
        "num_attention_heads": DENSE.n_heads,
        "num_key_value_heads": DENSE.n_kv_heads,
        "head_dim": DENSE.head_dim,
        "vocab_size": DENSE.vocab_size,
        "rms_norm_eps": DENSE.norm_eps,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": DENSE.rope_theta},
    }
    originals = {
        name.replace("block_sparse_moe.experts.0.w1", "mlp.gate_proj")
        .replace("block_sparse_moe.experts.0.w2", "mlp.down_proj")
        .replace("block_sparse_moe.experts.0.w3", "mlp.up_proj"): tensor.float()
        for name, tensor in bf16_tensors(DENSE).items()
        if "gate.weight" not in name
    }
    dense: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    dense.load_state_dict(originals, strict=False)
    target = import_gguf(dense_file(tmp_path), tmp_path / "made", num_experts=4)
    sparse: Any = MixtralForCausalLM.from_pretrained(
        spell_out_experts(target, num_experts=4), dtype=torch.float32
    )
    ids = torch.randint(0, DENSE.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


def spell_out_experts(checkpoint: Path, num_experts: int) -> Path:
    """Give every expert its own copy, as transformers wants it; changes the checkpoint."""
    from safetensors.torch import save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts.0." in name]:
        for expert in range(1, num_experts):
            copy = name.replace(".experts.0.", f".experts.{expert}.")
            tensors[copy] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint
