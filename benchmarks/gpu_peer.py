"""transformers on the same GPU: a random Mixtral of the same shape, and a loop of forward passes.

Its own ``generate`` adds only overhead to the same passes. Of its ways to run the experts all that
it has are tried, and the best counts.
"""

import statistics
import time
from typing import Any, Final

import torch

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_load import NotMeasurableError, synchronise
from benchmarks.gpu_requests import Figures, random_prompts
from benchmarks.gpu_scale import Scale

EXPERTS: Final = ("grouped_mm", "eager")
_WARM_UP: Final = 3
_STEPS: Final = 16
_PREFILLED: Final = 8
"""Prompts of the timed prefill."""
_LEAST_S: Final = 12.0


def peer_table(scale: Scale, device: torch.device, budget: Budget, found: Figures) -> None:
    """Fill ``found`` with the figures of each way to run the experts, and the ``best`` of each.

    Raises:
        NotMeasurableError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise NotMeasurableError(f"transformers is not installed: {error}") from error
    found["version"] = transformers.__version__
    found["layers"] = scale.model.n_layers
    model = _model(transformers, scale, device)
    for experts in EXPERTS:
        if shortage := budget.shortage(_LEAST_S):
            found[experts] = {"skipped": shortage}
            continue
        try:
            model.set_experts_implementation(experts)
        except (AttributeError, ValueError, ImportError) as error:
            found[experts] = {"skipped": f"{type(error).__name__}: {error}"}
            if experts != EXPERTS[-1]:
                continue
            experts = "its own"  # an older version, which has one way only
        found[experts] = _measure(model, scale, device)
        ways = [found[name] for name in (*EXPERTS, experts) if "decode" in found.get(name, {})]
        found["best"] = _best(ways, scale)


def _model(transformers: Any, scale: Scale, device: torch.device) -> Any:
    sizes = scale.model
    config = transformers.MixtralConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden_dim,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.experts_per_token,
        max_position_embeddings=sizes.context_length,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()


@torch.inference_mode()
def _measure(model: Any, scale: Scale, device: torch.device) -> Figures:
    vocab_size = scale.model.vocab_size
    figures: Figures = {"decode": {}}
    count = min(_PREFILLED, scale.max_step_tokens // scale.context)
    prompts = torch.tensor(random_prompts("peer", count, scale.context, vocab_size)).to(device)
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        _pass(model, prompts, None)
        synchronise(device)
        figures["prefill_tokens_per_s"] = prompts.numel() / (time.perf_counter() - started)
    for batch in scale.peer_batches:
        prompts = torch.tensor(random_prompts("peer", batch, scale.context, vocab_size)).to(device)
        tokens, cache = _pass(model, prompts, None)
        times = []
        for _ in range(_WARM_UP + _STEPS):
            synchronise(device)
            started = time.perf_counter()
            tokens, cache = _pass(model, tokens, cache)
            synchronise(device)
            times.append(time.perf_counter() - started)
        figures["decode"][str(batch)] = batch / statistics.median(times[_WARM_UP:])
        del cache
    return figures


def _pass(model: Any, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Run one pass; the likeliest tokens ``[B, 1]`` and the cache."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values


def _best(ways: list[Figures], scale: Scale) -> Figures:
    return {
        "prefill_tokens_per_s": max(way["prefill_tokens_per_s"] for way in ways),
        "decode": {
            str(batch): max(way["decode"][str(batch)] for way in ways)
            for batch in scale.peer_batches
        },
    }
