"""Small GGUF files, written by the gguf package from random weights."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import sentencepiece
from torch import Tensor

from mixfleet_engine.config import ModelConfig
from support.tokenizer_files import mistral_file, write_byte_level_json

Experts = Literal["dense", "stacked", "per-expert"]
Array = npt.NDArray[Any]

CHAT_TEMPLATE = "<|im_start|>system\nBe kind.<|im_end|>\n"
_NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
)
_MATRICES = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def gguf_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], experts: Experts
) -> dict[str, Array]:
    """Return weights by GGUF's names, rotary pairs side by side as llama.cpp has them."""
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = len(values) // config.head_dim
            halves = values.reshape(heads, 2, config.head_dim // 2, config.dim)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        if ".experts." in name:
            layer, expert, matrix = (name.split(".")[i] for i in (1, 4, 5))
            middle = "" if experts == "dense" else f".{expert}"
            name = f"blk.{layer}.{_MATRICES[matrix]}{middle}.weight"
        if experts == "dense" and "ffn_gate_inp" in name:
            continue
        found[name] = np.ascontiguousarray(values)
    return _stack(found, config) if experts == "stacked" else found


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    *,
    quantization: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    experts: Experts = "dense",
    tokenizer: Literal["byte-level", "mistral-v1"] = "byte-level",
    architecture: str = "llama",
    raw_types: Mapping[str, str] | None = None,
) -> Path:
    """Write a GGUF file.

    `quantization` is that of the matrices; `metadata` replaces or adds keys; the metadata keys and
    tensors in `without` are left out; `raw_types` labels a tensor's bytes as another type.
    """
    values = {
        "llama.block_count": config.n_layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "general.license": "apache-2.0",
    }
    if experts != "dense":
        values["llama.expert_count"] = config.num_experts
        values["llama.expert_used_count"] = config.experts_per_token
    make = _byte_level if tokenizer == "byte-level" else _mistral_v1
    values |= make(path.parent) | dict(metadata or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if key not in without:
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if name not in without:
            _add_tensor(writer, name, tensor, quantization, (raw_types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stack(tensors: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    found = dict(tensors)
    for layer in range(config.n_layers):
        for matrix in _MATRICES.values():
            names = [f"blk.{layer}.{matrix}.{e}.weight" for e in range(config.num_experts)]
            stack = np.stack([found.pop(name) for name in names])
            found[f"blk.{layer}.{matrix}_exps.weight"] = stack
    return found


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: Array, quantization: str, raw_type: str | None
) -> None:
    kind = gguf.GGMLQuantizationType[quantization if tensor.ndim > 1 else "F32"]
    data = gguf.quants.quantize(tensor, kind)
    if raw_type is not None:
        kind = gguf.GGMLQuantizationType[raw_type]
    writer.add_tensor(name, data, raw_dtype=kind)


def _byte_level(directory: Path) -> dict[str, Any]:
    file = write_byte_level_json(directory)
    content = json.loads(file.read_text())
    file.unlink()
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    num_control = len(content["added_tokens"])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * num_control + [1] * (len(tokens) - num_control),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _mistral_v1(directory: Path) -> dict[str, Any]:  # noqa: ARG001 - as its neighbour
    """Return the metadata that llama.cpp's converter writes for Mixtral 8x7B's tokenizer."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file("v1")))
    ids = range(processor.vocab_size())

    def kind(token_id: int) -> int:
        if processor.is_unknown(token_id):
            return 2
        if processor.is_control(token_id):
            return 3
        return 6 if processor.is_byte(token_id) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(token_id) for token_id in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(token_id)) for token_id in ids],
        "tokenizer.ggml.token_type": [kind(token_id) for token_id in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
