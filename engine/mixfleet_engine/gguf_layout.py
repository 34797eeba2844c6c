"""Which tensor of a GGUF file becomes which tensor of a Hugging Face Mixtral checkpoint.

Shape letters: V tokens in the vocabulary, D model width, Q query width, K key/value width,
F expert width, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.gguf_file import FloatArray, GgufFile

ARCHITECTURE = "llama"
"""llama.cpp's name for dense Llama and Mistral models, and for Mixtral with an expert count."""
_ROUTER_SPREAD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the model in the file, and of the one that is made of it."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tie_word_embeddings: bool
    num_experts: int
    experts_per_token: int
    shared_experts: bool
    """The file's model is dense: its feed-forward layer is stored once and is every expert."""

    @property
    def stored_experts(self) -> range:
        """The experts that are written, of each layer."""
        return range(1 if self.shared_experts else self.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor to be written."""

    name: str
    """Hugging Face's."""
    shape: tuple[int, ...]
    source: str | None
    """GGUF's name; None is a router that the file does not have."""
    part: int | None = None
    """Index along the first axis of a stack of experts."""
    rotary_heads: int | None = None
    """Set where the rows of each head must be put back into Hugging Face's order."""


def read_shape(file: GgufFile, num_experts: int) -> ModelShape:
    """Return the sizes that ``file`` states.

    Args:
        file: The model.
        num_experts: Experts to make of a dense model; a Mixtral file has its own count.

    Raises:
        CheckpointError: The architecture is another one, metadata is missing, or the model uses
            something that Mixtral does not have.
    """
    _check_supported(file)
    dim = file.required("llama.embedding_length", int)
    n_heads = file.required("llama.attention.head_count", int)
    found_experts = file.optional("llama.expert_count", int) or 0
    dense = found_experts == 0
    experts_per_token = 2 if dense else file.required("llama.expert_used_count", int)
    if dense and num_experts < experts_per_token:
        raise CheckpointError(f"num_experts={num_experts}: must be at least {experts_per_token}")
    return ModelShape(
        dim=dim,
        n_layers=file.required("llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=file.optional("llama.attention.head_count_kv", int) or n_heads,
        head_dim=_head_dim(file, dim, n_heads),
        hidden_dim=file.required("llama.feed_forward_length", int),
        vocab_size=file.shape("token_embd.weight")[0],
        context_length=file.required("llama.context_length", int),
        rope_theta=file.optional("llama.rope.freq_base", float) or 10_000.0,
        norm_eps=file.required("llama.attention.layer_norm_rms_epsilon", float),
        tie_word_embeddings="output.weight" not in file.tensor_names,
        num_experts=num_experts if dense else found_experts,
        experts_per_token=experts_per_token,
        shared_experts=dense,
    )


def plan_tensors(file: GgufFile, shape: ModelShape) -> tuple[TensorPlan, ...]:
    """Return all tensors to be written, in order, every one of ``file`` used exactly once.

    Raises:
        CheckpointError: A tensor is missing, of the wrong shape, or has no place in Mixtral.
    """
    plans = tuple(_all_tensors(file, shape))
    used = {plan.source for plan in plans}
    unused = sorted(file.tensor_names - used)
    if unused:
        raise CheckpointError(f"{file.path}: tensor {unused[0]} has no place in a Mixtral model")
    for plan in plans:
        if plan.source is not None:
            found = file.shape(plan.source)
            wanted = plan.shape if plan.part is None else (shape.num_experts, *plan.shape)
            if found != wanted:
                raise CheckpointError(
                    f"{file.path}: tensor {plan.source} has shape {found}, not {wanted}"
                )
    return plans


def read_tensor(file: GgufFile, plan: TensorPlan, router_seed: int) -> FloatArray:
    """Return the values of one planned tensor.

    A router that the file does not have is random: all experts of a shared model are the same, so
    it decides nothing but which of them get traffic. Its numbers depend on the seed and the
    tensor's name only.
    """
    if plan.source is None:
        entropy = [router_seed, *plan.name.encode()]
        generator = np.random.default_rng(entropy)
        return (_ROUTER_SPREAD * generator.standard_normal(plan.shape)).astype(np.float32)
    values = file.read(plan.source, plan.part)
    return values if plan.rotary_heads is None else unpermute(values, plan.rotary_heads)


def unpermute(weight: FloatArray, num_heads: int) -> FloatArray:
    """Return a query or key projection with each head's rows in Hugging Face's order.

    Rotary position embedding turns pairs of rows. GGUF keeps the two of a pair side by side,
    Hugging Face half a head apart: with 4 rows a head, ``[a0 b0 a1 b1]`` becomes ``[a0 a1 b0 b1]``.

    Args:
        weight: ``[num_heads * head_dim, D]``.
        num_heads: Heads in it.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _check_supported(file: GgufFile) -> None:
    architecture = file.required("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: architecture {architecture!r} is not supported, only {ARCHITECTURE!r}"
        )
    scaling = file.optional("llama.rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise CheckpointError(f"{file.path}: llama.rope.scaling.type={scaling!r} is not supported")
    if file.optional("llama.attention.sliding_window", int):
        raise CheckpointError(f"{file.path}: llama.attention.sliding_window is not supported")


def _head_dim(file: GgufFile, dim: int, n_heads: int) -> int:
    head_dim = file.optional("llama.attention.key_length", int) or dim // n_heads
    rotated = file.optional("llama.rope.dimension_count", int) or head_dim
    if rotated != head_dim:
        raise CheckpointError(
            f"{file.path}: llama.rope.dimension_count={rotated}: must be the head's {head_dim}"
        )
    return head_dim


def _all_tensors(file: GgufFile, shape: ModelShape) -> Iterator[TensorPlan]:
    table = (shape.vocab_size, shape.dim)  # [V, D]
    yield TensorPlan(name="model.embed_tokens.weight", shape=table, source="token_embd.weight")
    for layer in range(shape.n_layers):
        yield from _attention_tensors(layer, shape)
        yield from _expert_tensors(file, layer, shape)
    yield TensorPlan(name="model.norm.weight", shape=(shape.dim,), source="output_norm.weight")
    if not shape.tie_word_embeddings:
        yield TensorPlan(name="lm_head.weight", shape=table, source="output.weight")


def _attention_tensors(layer: int, shape: ModelShape) -> Iterator[TensorPlan]:
    ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
    query, key = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    for norm, source in (("input", "attn_norm"), ("post_attention", "ffn_norm")):
        yield TensorPlan(
            name=f"{ours}.{norm}_layernorm.weight",
            shape=(shape.dim,),
            source=f"{theirs}.{source}.weight",
        )
    for name, source, size, heads in (
        ("q_proj", "attn_q", (query, shape.dim), shape.n_heads),  # [Q, D]
        ("k_proj", "attn_k", (key, shape.dim), shape.n_kv_heads),  # [K, D]
        ("v_proj", "attn_v", (key, shape.dim), None),  # [K, D]
        ("o_proj", "attn_output", (shape.dim, query), None),  # [D, Q]
    ):
        yield TensorPlan(
            name=f"{ours}.self_attn.{name}.weight",
            shape=size,
            source=f"{theirs}.{source}.weight",
            rotary_heads=heads,
        )


def _expert_tensors(file: GgufFile, layer: int, shape: ModelShape) -> Iterator[TensorPlan]:
    ours, theirs = f"model.layers.{layer}.block_sparse_moe", f"blk.{layer}"
    yield TensorPlan(
        name=f"{ours}.gate.weight",
        shape=(shape.num_experts, shape.dim),  # [E, D]
        source=None if shape.shared_experts else f"{theirs}.ffn_gate_inp.weight",
    )
    up, down = (shape.hidden_dim, shape.dim), (shape.dim, shape.hidden_dim)  # [F, D], [D, F]
    for expert in shape.stored_experts:
        for name, kind, size in (("w1", "gate", up), ("w2", "down", down), ("w3", "up", up)):
            stack = f"{theirs}.ffn_{kind}_exps.weight"
            stacked = not shape.shared_experts and stack in file.tensor_names
            # Before llama.cpp stacked them (2024-04) every expert was a tensor of its own.
            single = (
                f"{theirs}.ffn_{kind}.weight"
                if shape.shared_experts
                else f"{theirs}.ffn_{kind}.{expert}.weight"
            )
            yield TensorPlan(
                name=f"{ours}.experts.{expert}.{name}.weight",
                shape=size,
                source=stack if stacked else single,
                part=expert if stacked else None,
            )
