"""How likely the model found a token, whatever then was done to the choice.

Shape letters: R rows, V vocabulary, N ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixfleet_engine.ranking import block_maxima, rank
from mixfleet_engine.request import TokenLogprobs


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log-probabilities of the sampled and of the most likely tokens.

    They are the log-softmax in fp32 of the model's own logits: before bias, penalties,
    temperature and filters.

    Args:
        logits: ``[R, V]`` fp32, finite ones at least where they are highest.
        token_ids: R sampled tokens.
        num_top: R numbers of most likely tokens that are asked for, 0 or more.
    """
    logprobs = logits.log_softmax(-1)
    width = max(1, *num_top)
    # So many blocks make so many ranks sure.
    ranking = rank(logits, block_maxima(logits), num_ranks=width, num_blocks=width)
    sampled = torch.tensor(token_ids, device=logits.device)[:, None]
    columns = torch.cat([sampled, ranking.token_ids], dim=-1)  # [R, 1 + N]
    values = logprobs.gather(1, columns).tolist()
    return [
        TokenLogprobs(logprob=found[0], top=tuple(zip(top, found[1:], strict=True))[:wanted])
        for found, top, wanted in zip(values, ranking.token_ids.tolist(), num_top, strict=True)
    ]
