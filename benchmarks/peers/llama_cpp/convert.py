"""Writes a Hugging Face Mixtral checkpoint as GGUF files for llama.cpp.

    python -m benchmarks.peers.llama_cpp.convert CHECKPOINT FOLDER PROGRAMS

``bf16.gguf`` is written here with the same weights; llama-quantize makes the others of it. There
is no tokenizer in them: the benchmark programs take token ids.

Shape letters: D model width, F expert width, E experts.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import safetensors
import torch

from benchmarks.peers.installing import once, run_quietly
from benchmarks.peers.llama_cpp.formats import QUANTISATIONS
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.gguf_layout import ARCHITECTURE

_RECIPE = "1"

FloatArray = npt.NDArray[np.float32]


def ensure_files(checkpoint: Path, folder: Path, programs: Path) -> None:
    """Write ``<format>.gguf`` into ``folder`` for every format, once.

    Raises:
        PeerError: llama-quantize failed.
    """
    stamp = (checkpoint / "config.json").read_text()
    with once(folder, f"{_RECIPE} {stamp}") as needed:
        if needed:
            write_gguf(checkpoint, folder / "bf16.gguf")
            for name in QUANTISATIONS:
                command = [str(programs / "llama-quantize"), str(folder / "bf16.gguf")]
                command += [str(folder / f"{name}.gguf"), name.upper()]
                run_quietly(command, folder / "quantize.log")


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write the checkpoint's weights: matrices in bf16, norms and routers in fp32."""
    config = ModelConfig.from_checkpoint(checkpoint)
    writer: Any = gguf.GGUFWriter(target, ARCHITECTURE)
    writer.add_name(checkpoint.name)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for name, values in tensors(checkpoint, config):
        plain = values.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        kind = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(checkpoint: Path, config: ModelConfig) -> Iterator[tuple[str, FloatArray]]:
    """Yield llama.cpp's tensors by name, in fp32."""
    with safetensors.safe_open(checkpoint / "model.safetensors", "pt") as file:

        def read(name: str) -> FloatArray:
            values: FloatArray = file.get_tensor(f"{name}.weight").to(torch.float32).numpy()
            return values

        yield "token_embd.weight", read("model.embed_tokens")
        yield "output_norm.weight", read("model.norm")
        if not config.tie_word_embeddings:
            yield "output.weight", read("lm_head")
        for layer in range(config.n_layers):
            of, block = f"model.layers.{layer}", f"blk.{layer}"
            yield f"{block}.attn_norm.weight", read(f"{of}.input_layernorm")
            yield f"{block}.ffn_norm.weight", read(f"{of}.post_attention_layernorm")
            yield f"{block}.attn_q.weight", permute(read(f"{of}.self_attn.q_proj"), config.n_heads)
            key = read(f"{of}.self_attn.k_proj")
            yield f"{block}.attn_k.weight", permute(key, config.n_kv_heads)
            yield f"{block}.attn_v.weight", read(f"{of}.self_attn.v_proj")
            yield f"{block}.attn_output.weight", read(f"{of}.self_attn.o_proj")
            moe = f"{of}.block_sparse_moe"
            yield f"{block}.ffn_gate_inp.weight", read(f"{moe}.gate")
            for kind, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
                stack = [read(f"{moe}.experts.{e}.{matrix}") for e in range(config.num_experts)]
                yield f"{block}.ffn_{kind}_exps.weight", np.stack(stack)  # [E, F, D] or [E, D, F]


def permute(weight: FloatArray, num_heads: int) -> FloatArray:
    """Return a query or key projection with each head's rows in llama.cpp's order.

    The inverse of :func:`mixfleet_engine.gguf_layout.unpermute`: with 4 rows a head,
    ``[a0 a1 b0 b1]`` becomes ``[a0 b0 a1 b1]``.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    """Make what is missing."""
    checkpoint, folder, programs = map(Path, sys.argv[1:4])
    ensure_files(checkpoint, folder, programs)


if __name__ == "__main__":
    main()
