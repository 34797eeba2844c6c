"""Random Mixtral checkpoints of a few hundred kilobytes, in each published layout.

The spread of the weights is wide (0.2), so that greedy answers vary instead of repeating one
token. Nothing here uses the code under test but `ModelConfig`, which only carries the sizes.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixfleet_engine.config import ModelConfig

Tensors = dict[str, Tensor]
MistralFiles = Literal["safetensors", "sharded-safetensors", "pth", "sharded-pth"]
ExpertStorage = Literal["per-expert", "stacked"]

_TINY = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=512,
    num_experts=8,
    experts_per_token=2,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    context_length=512,
)


def tiny_config(**changes: Any) -> ModelConfig:
    """Return the sizes of the tiny model, with `changes`."""
    return replace(_TINY, **changes)


def hf_tensors(config: ModelConfig, *, seed: int = 0, spread: float = 0.2) -> Tensors:
    """Return random fp32 weights under Hugging Face names (rotary halves apart)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    tensors = {"model.embed_tokens.weight": random(config.vocab_size, config.dim)}
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + random(config.dim)
        q_width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        tensors[f"{prefix}.self_attn.q_proj.weight"] = random(q_width, config.dim)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = random(kv_width, config.dim)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = random(kv_width, config.dim)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = random(config.dim, q_width)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + random(config.dim)
        moe = f"{prefix}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = random(config.num_experts, config.dim)
        for expert in range(1 if config.shared_experts else config.num_experts):
            tensors[f"{moe}.experts.{expert}.w1.weight"] = random(config.hidden_dim, config.dim)
            tensors[f"{moe}.experts.{expert}.w2.weight"] = random(config.dim, config.hidden_dim)
            tensors[f"{moe}.experts.{expert}.w3.weight"] = random(config.hidden_dim, config.dim)
    tensors["model.norm.weight"] = 1 + random(config.dim)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = random(config.vocab_size, config.dim)
    return tensors


def hf_config_json(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of these sizes (the form of transformers 4)."""
    found: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": None,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if config.shared_experts:
        found["mixfleet"] = {"shared_experts": True}
    return found


def params_json(config: ModelConfig) -> dict[str, Any]:
    """Return what Mistral's `params.json` says of these sizes."""
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.context_length,
        "moe": {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
        },
    }


def write_hf_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    seed: int = 0,
    num_files: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random model in the Hugging Face layout and return its folder."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config_json(config)))
    tensors = {name: t.to(dtype) for name, t in hf_tensors(config, seed=seed).items()}
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_parts(tensors, num_files), start=1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_mistral_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    seed: int = 0,
    files: MistralFiles = "safetensors",
    experts: ExpertStorage = "per-expert",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the same random model in Mistral's layout and return its folder."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_json(config)))
    tensors = mistral_tensors(config, seed=seed, experts=experts)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if files == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    elif files == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        for number, part in enumerate(_parts(tensors, 3)):
            if files == "sharded-pth":
                torch.save(part, folder / f"consolidated.{number:02d}.pth")
            else:
                save_file(part, folder / f"consolidated-{number + 1:05d}-of-00003.safetensors")
    return folder


def mistral_tensors(
    config: ModelConfig, *, seed: int = 0, experts: ExpertStorage = "per-expert"
) -> Tensors:
    """Return the weights of :func:`hf_tensors` under Mistral's names (rotary pairs adjacent)."""
    renamed: Tensors = {}
    for name, tensor in hf_tensors(config, seed=seed).items():
        value = (
            _pair_up(tensor, config.head_dim) if "q_proj" in name or "k_proj" in name else tensor
        )
        for theirs, ours in _MISTRAL_WORDS:
            name = name.replace(theirs, ours)
        renamed[name] = value.contiguous()
    return _stack_experts(renamed, config) if experts == "stacked" else renamed


_MISTRAL_WORDS = (
    ("model.embed_tokens", "tok_embeddings"),
    ("model.norm", "norm"),
    ("model.layers", "layers"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attention.wq"),
    ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"),
    ("block_sparse_moe", "feed_forward"),
)


def _pair_up(weight: Tensor, head_dim: int) -> Tensor:
    """Return rows [0, h, 1, h + 1, ...] of each head, h being half a head."""
    half = head_dim // 2
    order = [row for i in range(half) for row in (i, i + half)]
    return weight.view(-1, head_dim, weight.shape[1])[:, order].reshape(weight.shape)


def _stack_experts(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Return the tensors as the first 8x7B release had them; its ``w2`` is transposed."""
    stacked = {
        name.replace("feed_forward.gate", "block_sparse_moe.gate"): tensor
        for name, tensor in tensors.items()
        if ".experts." not in name
    }
    for layer in range(config.n_layers):
        for matrix in ("w1", "w2", "w3"):
            parts = [
                tensors[f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight"]
                for expert in range(config.num_experts)
            ]
            parts = [part.T for part in parts] if matrix == "w2" else parts
            stacked[f"layers.{layer}.block_sparse_moe.{matrix}"] = torch.cat(parts)
    return stacked


def _parts(tensors: Tensors, num_files: int) -> Iterator[Tensors]:
    items = iter(tensors.items())
    size = -(-len(tensors) // num_files)
    for _ in range(num_files):
        yield dict(islice(items, size))
