"""Mixtral as slowly and plainly as can be: the whole sequence at once, fp64, no cache.

It shares no line with the engine. Weights are those of `hf_tensors`, by Hugging Face names.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig


def dense_logits(
    config: ModelConfig, tensors: Mapping[str, Tensor], token_ids: Sequence[int]
) -> Tensor:
    """Return the logits after every token, `[len(token_ids), vocab_size]` in fp64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][list(token_ids)]
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}"
        normed = norm(x, w[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        q, k, v = (normed @ w[f"{prefix}.self_attn.{n}_proj.weight"].T for n in "qkv")
        mixed = dense_attention(
            rotate(q.view(len(x), -1, config.head_dim), config.rope_theta),
            rotate(k.view(len(x), -1, config.head_dim), config.rope_theta),
            v.view(len(x), -1, config.head_dim),
        )
        x = x + mixed.flatten(1) @ w[f"{prefix}.self_attn.o_proj.weight"].T
        normed = norm(x, w[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        x = x + _experts(normed, w, f"{prefix}.block_sparse_moe", config)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, w["model.norm.weight"], config.norm_eps) @ w[head].T


def dense_greedy(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    prompt: Sequence[int],
    output: Sequence[int],
) -> list[int]:
    """Return the most likely token at each place of `output`, given all that stands before it.

    It equals `output` if and only if `output` is the greedy answer, and takes one pass, not one
    per token.
    """
    logits = dense_logits(config, tensors, [*prompt, *output])
    greedy: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return greedy


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm, one row after the other."""
    return torch.stack([row / (row.square().mean() + eps).sqrt() * weight for row in x])


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotate `[T, H, A]`: pair i of a head at position t turns by t / theta^(2i / A)."""
    num_tokens, _, head_dim = x.shape
    half = head_dim // 2
    turned = x.clone()
    for position in range(num_tokens):
        for i in range(half):
            angle = position / theta ** (2 * i / head_dim)
            a, b = x[position, :, i], x[position, :, i + half]
            turned[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention `[T, H, A]`, one query head and one token at a time.

    Args:
        q: `[T, H, A]`, the last T of S tokens.
        k: `[S, G, A]`.
        v: `[S, G, A]`.
    """
    num_tokens, num_heads, head_dim = q.shape
    context, num_kv_heads = k.shape[0], k.shape[1]
    out = torch.empty_like(q)
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        for t in range(num_tokens):
            seen = context - num_tokens + t + 1
            shares = (k[:seen, kv_head] @ q[t, head] / head_dim**0.5).softmax(-1)
            out[t, head] = shares @ v[:seen, kv_head]
    return out


def _experts(x: Tensor, w: Mapping[str, Tensor], prefix: str, config: ModelConfig) -> Tensor:
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        scores = (w[f"{prefix}.gate.weight"] @ row).softmax(-1)  # over all, then made to sum to 1
        best = scores.topk(config.experts_per_token)
        for share, chosen in zip(
            best.values / best.values.sum(), best.indices.tolist(), strict=True
        ):
            stored = 0 if config.shared_experts else chosen
            w1, w2, w3 = (w[f"{prefix}.experts.{stored}.w{n}.weight"] for n in (1, 2, 3))
            out[t] += share * (w2 @ (torch.nn.functional.silu(w1 @ row) * (w3 @ row)))
    return out
