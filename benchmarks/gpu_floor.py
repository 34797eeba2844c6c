"""The shortest time of a step on a GPU whose rates were measured: what it must move and compute.

A part of the step takes at least the time to move its bytes or to compute its products, whichever
is longer. Activations of a decode step are nothing beside the weights and do not count. Weights in
int4 and int8 are multiplied in bf16, those in fp8 in fp8.

Shape letters: B sequences, E experts, K experts per token, D model width, F expert width, H query
heads, G KV heads, A head dimension, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.floor import Sizes, experts_hit
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.weight_formats import KV_BYTES, stored_bytes

Rates = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one part of a step must do, all layers together."""

    num_bytes: float
    flops: float
    is_fp8: bool

    def seconds(self, rates: Rates) -> float:
        """Return the shortest time."""
        return max(self.num_bytes / rates["copy_bytes_per_s"], self.flops / self.rate(rates))

    def rate(self, rates: Rates) -> float:
        """Return the products per second of the kind of numbers that it multiplies."""
        return rates["fp8_flops" if self.is_fp8 and "fp8_flops" in rates else "bf16_flops"]


def sizes_of(model: ModelConfig) -> Sizes:
    """Return what a decode step of the model uses, in numbers."""
    heads = 2 * model.n_heads + 2 * model.n_kv_heads
    attention = model.n_layers * heads * model.head_dim * model.dim
    return Sizes(
        the_rest=attention + model.vocab_size * model.dim,
        one_expert=model.n_layers * 3 * model.dim * model.hidden_dim,
        num_experts=model.num_experts,
        experts_per_token=model.experts_per_token,
    )


def decode_work(
    model: ModelConfig, *, batch: int, context: int, weight_dtype: str, kv_dtype: str
) -> dict[str, Work]:
    """Return the parts of a decode step of ``batch`` sequences with ``context`` tokens each."""
    width, expert = model.dim, model.hidden_dim
    q_width, kv_width = (n * model.head_dim for n in (model.n_heads, model.n_kv_heads))
    layers, hit = model.n_layers, experts_hit(sizes_of(model), batch)
    pairs = batch * model.experts_per_token

    def product(name: str, n: int, k: int, *, count: float, rows: float) -> Work:
        return Work(
            num_bytes=count * stored_bytes(name, (n, k), weight_dtype),
            flops=2.0 * rows * n * k,
            is_fp8=weight_dtype == "fp8",
        )

    in_layer, experts = "layers.0.attention.wq.weight", "layers.0.feed_forward.experts.0.w1.weight"
    up, down = (2 * expert, width), (width, expert)
    return {
        "qkv": product(in_layer, q_width + 2 * kv_width, width, count=layers, rows=layers * batch),
        "attention": Work(
            num_bytes=batch * context * model.kv_values_per_token * KV_BYTES[kv_dtype],
            flops=4.0 * layers * batch * context * q_width,
            is_fp8=False,
        ),
        "wo": product(in_layer, width, q_width, count=layers, rows=layers * batch),
        "up": product(experts, *up, count=layers * hit, rows=layers * pairs),
        "down": product(experts, *down, count=layers * hit, rows=layers * pairs),
        "output": product("output.weight", model.vocab_size, width, count=1, rows=batch),
    }


def step_seconds(work: Mapping[str, Work], rates: Rates) -> float:
    """Return the shortest time of a step: its parts may overlap."""
    moved = sum(part.num_bytes for part in work.values()) / rates["copy_bytes_per_s"]
    return max(moved, sum(part.flops / part.rate(rates) for part in work.values()))


def prefill_seconds(
    model: ModelConfig, *, num_prompts: int, length: int, weight_dtype: str, rates: Rates
) -> float:
    """Return the shortest time to prefill so many prompts, by their products alone."""
    sizes = sizes_of(model)
    active = sizes.the_rest + sizes.experts_per_token * sizes.one_expert
    # Only a prompt's last token goes through the output matrix.
    per_token = 2.0 * (active - model.vocab_size * model.dim)
    kind = Work(num_bytes=0, flops=0, is_fp8=weight_dtype == "fp8")
    causal = 2.0 * model.n_layers * model.n_heads * model.head_dim * length**2
    products = num_prompts * length * per_token / kind.rate(rates)
    return products + num_prompts * causal / rates["bf16_flops"]
