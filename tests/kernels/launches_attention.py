"""Attention of Mixtral's true shapes, to be compiled: see `support.compiling`."""

import torch

from mixfleet_engine.ops.cuda.attention import attend
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from mixfleet_engine.ops.cuda.rope_cache import rope_and_cache

META = torch.device("meta")


def launch(heads: int, kv_heads: int, kv_dtype: torch.dtype) -> None:
    """A step of decodes and prefills with long contexts, then one with short ones."""
    keys = torch.empty(64, 16, kv_heads, 128, device=META, dtype=kv_dtype)
    qkv = torch.empty(300, (heads + 2 * kv_heads) * 128, dtype=torch.bfloat16, device=META)
    angles = torch.empty(32768, 64, device=META)
    places = torch.empty(300, dtype=torch.int64, device=META)
    q = rope_and_cache(qkv, angles, angles, places, places, keys, keys)
    rows = torch.empty(4, dtype=torch.int32, device=META)
    for max_rows, max_context in ((150, 8192), (1, 500)):
        chunks = DeviceChunks(
            first_rows=rows,
            num_rows=rows,
            starts=rows,
            block_tables=torch.empty(4, 512, dtype=torch.int32, device=META),
            slots=places,
            positions=places,
            num_decodes=2 if max_rows > 1 else 4,
            max_rows=max_rows,
            max_context=max_context,
        )
        attend(q, keys, keys, chunks)


def launches() -> None:
    launch(32, 8, torch.bfloat16)
    launch(48, 8, torch.bfloat16)


def launches_fp8() -> None:
    """For sm_89 and newer only."""
    launch(32, 8, torch.float8_e4m3fn)
