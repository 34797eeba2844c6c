"""A runner that chooses as a real one does, from random logits that hang on all tokens before."""

import zlib
from dataclasses import dataclass

import torch

from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import NO_TOKEN, PlannedChunk
from mixfleet_engine.tokenizer import Tokenizer
from support.fake_runner import FakeRunner

CLOSING = (b'"', b"]", b"}", b"e")


@dataclass(kw_only=True)
class RandomLogitsRunner(FakeRunner):
    """A fake runner with all its checks; ``tokenizer`` tells which tokens close a JSON value.

    These are more likely than others, or hardly a value would ever end.
    """

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        super().__post_init__()
        closing = [self.tokenizer.token_bytes(i) in CLOSING for i in range(self.vocab_size)]
        self._bias = torch.tensor(closing).float() * 6
        self._sampler = Sampler()

    def _sample(self, chunk: PlannedChunk) -> int:
        if super()._sample(chunk) == NO_TOKEN:
            logits = torch.full((self.vocab_size,), torch.nan)
        else:
            tokens = self._read(chunk, chunk.start + len(chunk.token_ids))
            generator = torch.Generator().manual_seed(zlib.crc32(repr(tokens).encode()))
            logits = torch.randn(self.vocab_size, generator=generator) * 2 + self._bias
        return self._sampler.sample(logits[None], [chunk])[0].token_id
