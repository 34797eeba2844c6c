"""``mixfleet model import``: a GGUF file becomes a checkpoint in the Hugging Face Mixtral layout.

A Mixtral file is taken as it is. A dense Llama or Mistral becomes a Mixtral whose experts are all
its one feed-forward layer ("sparse upcycling"): the two that the router picks give the same
output, and their weights sum to 1, so the answers are the dense model's. That one layer is stored
once; the key ``"mixfleet": {"shared_experts": true}`` in ``config.json`` says so.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.gguf_file import FloatArray, GgufFile
from mixfleet_engine.gguf_layout import ModelShape, plan_tensors, read_shape, read_tensor
from mixfleet_engine.gguf_tokenizer import TokenizerFiles, read_tokenizer
from mixfleet_engine.safetensors_writer import num_bytes, write_checkpoint
from mixfleet_engine.staging import exclusive, staged_directory

MAX_SHARD_BYTES = 5 << 30
ROUTER_SEED = 0

Progress = Callable[[int, int], None]
"""Told after each tensor: bytes written so far, bytes in all."""


def import_gguf(
    gguf: Path,
    target: Path,
    *,
    num_experts: int = 8,
    progress: Progress | None = None,
    sampling: SamplingDefaults | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model in ``gguf`` to the new directory ``target`` as a bf16 Mixtral checkpoint.

    The directory appears when it is complete. A second process with the same target waits.

    Args:
        gguf: A GGUF file of architecture ``llama``, dense or Mixtral, of any quantisation.
        target: The directory to make.
        num_experts: Experts to make of a dense model; a Mixtral file has its own count.
        progress: Told how far the weights are.
        sampling: What its makers advise, which GGUF has no place for.
        max_shard_bytes: Longest file of weights.

    Returns:
        ``target``.

    Raises:
        CheckpointError: The file cannot be used, the text names what is wrong with it; or
            ``target`` is there already. Nothing is left behind.
    """
    file = GgufFile(gguf)
    shape = read_shape(file, num_experts)
    plans = {plan.name: plan for plan in plan_tensors(file, shape)}
    tokenizer = read_tokenizer(
        file, context_length=shape.context_length, vocab_size=shape.vocab_size
    )
    shapes = {name: plan.shape for name, plan in plans.items()}

    def read(name: str) -> FloatArray:
        return read_tensor(file, plans[name], ROUTER_SEED)

    try:
        with exclusive(target.with_name(f".{target.name}.lock")), staged_directory(target) as new:
            written, total = 0, num_bytes(shapes)
            for size in write_checkpoint(new, shapes, read, max_shard_bytes=max_shard_bytes):
                written += size
                if progress is not None:
                    progress(written, total)
            generation = {**tokenizer.special_ids, **(asdict(sampling) if sampling else {})}
            _write_json(new / "generation_config.json", generation)
            _write_json_files(new, _config(file, shape, tokenizer), tokenizer)
    except FileExistsError:
        raise CheckpointError(f"{target}: is there already") from None
    return target


def _write_json_files(
    directory: Path, config: Mapping[str, Any], tokenizer: TokenizerFiles
) -> None:
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    _write_json(directory / "tokenizer_config.json", tokenizer.config)
    _write_json(directory / "config.json", config)


def _config(file: GgufFile, shape: ModelShape, tokenizer: TokenizerFiles) -> Mapping[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **tokenizer.special_ids,
        "hidden_act": "silu",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": float(f"{shape.norm_eps:.7g}"),  # GGUF's fp32 writes 1e-5 as 9.99999974e-06
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "mixfleet": {
            "shared_experts": shape.shared_experts,
            "source_file": file.path.name,
            "source_name": file.optional("general.name", str),
            "source_license": file.optional("general.license", str),
        },
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
