"""Attention of Mixtral's true shapes, to be compiled: see `support.compiling`."""

import torch

from mixfleet_engine.ops.cuda.attention import attend
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from mixfleet_engine.ops.cuda.rope_cache import rope_and_cache

META = torch.device("meta")


MIXED = (150, 8192)
"""Most rows of a chunk and most context of a step of decodes and prefills."""
SHORT_DECODES = (1, 500)


def launch(
    heads: int,
    kv_heads: int,
    kv_dtype: torch.dtype,
    *steps: tuple[int, int],
    block_size: int = 16,
) -> None:
    """Put the step's keys and values into the cache, and attend."""
    keys = torch.empty(64, block_size, kv_heads, 128, device=META, dtype=kv_dtype)
    qkv = torch.empty(300, (heads + 2 * kv_heads) * 128, dtype=torch.bfloat16, device=META)
    angles = torch.empty(32768, 64, device=META)
    places = torch.empty(300, dtype=torch.int64, device=META)
    q = rope_and_cache(qkv, angles, angles, places, places, keys, keys)
    rows = torch.empty(4, dtype=torch.int32, device=META)
    for max_rows, max_context in steps:
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
    """8x7B, 8x22B, and a rank of eight of 8x7B."""
    launch(32, 8, torch.bfloat16, MIXED, SHORT_DECODES)
    launch(48, 8, torch.bfloat16, MIXED)
    launch(4, 1, torch.bfloat16, MIXED, block_size=64)


def launches_fp8() -> None:
    """For sm_89 and newer only: 8x7B, and a rank of eight of 8x22B."""
    launch(32, 8, torch.float8_e4m3fn, MIXED, SHORT_DECODES)
    launch(6, 1, torch.float8_e4m3fn, MIXED, block_size=64)
