"""What the Hugging Face layout calls the engine's weights, and which tensors its files hold.

Torch-free: the planner needs the names before anything is loaded.
"""

import json
from pathlib import Path
from typing import Any, Final

from mixfleet_engine.errors import CheckpointError

HF_INDEX: Final = "model.safetensors.index.json"
HF_SINGLE: Final = "model.safetensors"

_WORDS: Final = (
    ("tok_embeddings", "model.embed_tokens"),
    ("layers.", "model.layers."),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward", "block_sparse_moe"),
    ("output.", "lm_head."),
)
_MOST_HEADER_BYTES: Final = 100 << 20
"""What the format itself allows."""


def hf_name(name: str) -> str:
    """Return what the files call the weight ``name`` of the engine."""
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, theirs in _WORDS:
        name = name.replace(ours, theirs)
    return name


def engine_name(name: str) -> str:
    """Return what the engine calls the weight that the files call ``name``."""
    if name == "model.norm.weight":
        return "norm.weight"
    for ours, theirs in _WORDS:
        name = name.replace(theirs, ours)
    return name


def hf_tensor_names(folder: Path) -> frozenset[str] | None:
    """Return the names of all tensors in the files, from the index or the file's own header.

    None: there is neither, as where only the model's sizes are looked at.

    Raises:
        CheckpointError: It is broken.
    """
    index, single = folder / HF_INDEX, folder / HF_SINGLE
    file = index if index.is_file() else single
    if not file.is_file():
        return None
    try:
        found = _index_names(index) if file is index else _header(single)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: no readable list of tensors: {error!r}") from error
    return frozenset(found) - {"__metadata__"}


def _index_names(index: Path) -> dict[str, Any]:
    names: dict[str, Any] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return names


def _header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: its length in 8 bytes, then JSON by tensor name."""
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(8), "little")
        if num_bytes > _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {num_bytes} bytes")
        return dict(json.loads(opened.read(num_bytes)))
