"""Log-probabilities of the simulated engine: invented as its answers are, and as repeatable."""

import hashlib
import math
from collections.abc import Sequence
from itertools import islice
from typing import Final

from mixfleet_engine.request import TokenLogprobs

_LEAST_LIKELY: Final = 0.4
_MOST_LIKELY: Final = 0.9
"""Between these is the probability of each token of an answer: always the highest."""


def simulated_logprobs(
    key: bytes, position: int, token_id: int, token_ids: Sequence[int], num_top: int
) -> TokenLogprobs:
    """Return what no model has computed, but one might have.

    The token itself is the most likely; of what it leaves, each of the others has half of what
    the ones before it leave.

    Args:
        key: Of the answer, at most 64 bytes.
        position: Of the token in the answer.
        token_id: The token.
        token_ids: Where the others are taken from; if they are too few, so are the reported ones.
        num_top: How many most likely tokens are reported.
    """
    digest = hashlib.blake2b(
        position.to_bytes(8, "little"), key=key, digest_size=8, person=b"logprobs"
    ).digest()
    chance = int.from_bytes(digest, "little")
    own = _LEAST_LIKELY + (_MOST_LIKELY - _LEAST_LIKELY) * chance / 2**64
    begin = chance % len(token_ids)
    turned = (token_ids[(begin + i) % len(token_ids)] for i in range(len(token_ids)))
    others = dict.fromkeys(other for other in islice(turned, num_top + 1) if other != token_id)
    top = [(token_id, math.log(own))]
    for rank, other in enumerate(others, 1):
        top.append((other, math.log((1.0 - own) / 2**rank)))
    return TokenLogprobs(logprob=math.log(own), top=tuple(top[:num_top]))
