"""From logits to token ids, for all rows of a step at once.

A row's token depends on its own logits, settings, seed and position only. So it is the same in any
batch, and a request that moves to another worker goes on as if it had stayed.

Shape letters: R rows, V vocabulary, C candidates in descending order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import NO_TOKEN

_MASK_64 = (1 << 64) - 1


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Return one token id per row, ``NO_TOKEN`` where the best logit is not a finite number.

    Temperature comes first, then top-k, then top-p over the probabilities of what is left,
    made to sum up to 1 again.

    Args:
        logits: ``[R, V]`` fp32.
        params: R settings.
        positions: R numbers of answer tokens before the sampled one.
    """
    best, chosen = logits.max(-1)  # [R], ties to the lowest id; a NaN is above everything
    random_rows = [row for row, p in enumerate(params) if p.temperature > 0]
    if random_rows:
        drawn = _draw(
            logits[random_rows],
            [params[row] for row in random_rows],
            [positions[row] for row in random_rows],
        )
        chosen[random_rows] = drawn
    chosen[~best.isfinite()] = NO_TOKEN
    tokens: list[int] = chosen.tolist()
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that looks random and depends on both arguments only.

    It is splitmix64's output function over the seed's own output plus the position's step, so
    near seeds and near positions give unrelated numbers.
    """
    key = _mixed_bits(seed & _MASK_64)
    # 52 bits: times any total of weights the product stays below that total, in fp64.
    return (_mixed_bits((key + position * 0x9E3779B97F4A7C15) & _MASK_64) >> 12) * 2.0**-52


def _mixed_bits(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Return ``[R]`` token ids of rows with a temperature."""
    coldest = torch.finfo(torch.float32).tiny  # anything below would divide by 0
    temperatures = [max(p.temperature, coldest) for p in params]
    best = logits.amax(-1, keepdim=True)
    # The best is taken off first: a tiny temperature then gives 0 and -inf, never inf - inf.
    scaled = (logits - best) / torch.tensor(temperatures, device=logits.device)[:, None]
    vocab_size = logits.shape[-1]
    by_rank = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size]
    by_mass = [row for row, p in enumerate(params) if row not in by_rank and p.top_p < 1]
    if by_rank:
        most = max(params[row].top_k for row in by_rank)
        candidates = scaled[by_rank].topk(most, dim=-1).values
        scaled[by_rank] = _filtered(scaled[by_rank], candidates, [params[row] for row in by_rank])
    if by_mass:
        candidates = scaled[by_mass].sort(dim=-1, descending=True).values
        scaled[by_mass] = _filtered(scaled[by_mass], candidates, [params[row] for row in by_mass])
    uniforms = [uniform(p.seed, position) for p, position in zip(params, positions, strict=True)]
    return _inverse_cdf(scaled.exp(), uniforms)


def _filtered(scaled: Tensor, candidates: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return ``scaled`` ``[R, V]`` with -inf at every token that top-k or top-p takes out.

    Args:
        scaled: ``[R, V]`` logits, the best at 0.
        candidates: ``[R, C]`` the highest of them in descending order, C >= every top_k.
        params: R settings.
    """
    width, device = candidates.shape[-1], scaled.device
    top_k = torch.tensor([p.top_k or width for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    in_top_k = torch.arange(width, device=device) < top_k  # [R, C]
    weights = candidates.exp().double() * in_top_k
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    # A token stays if the better ones alone fall short of the wanted share.
    num_kept = ((mass - weights < top_p * total) & in_top_k).sum(-1, keepdim=True).clamp_min(1)
    lowest = candidates.gather(-1, num_kept - 1)  # [R, 1]
    return scaled.masked_fill(~_most_likely(scaled, num_kept, lowest), float("-inf"))


def _most_likely(scaled: Tensor, num_kept: Tensor, lowest: Tensor) -> Tensor:
    """Return the mask ``[R, V]`` of each row's ``num_kept`` best; ties go to the lower ids.

    Args:
        scaled: ``[R, V]``.
        num_kept: ``[R, 1]``.
        lowest: ``[R, 1]`` value of the last one kept.
    """
    above, tied = scaled > lowest, scaled == lowest
    num_tied_kept = num_kept - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= num_tied_kept))


def _inverse_cdf(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Return per row of ``weights`` ``[R, V]`` the first token at which the sum passes the draw."""
    running = weights.double().cumsum(-1)
    draws = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None]
    return torch.searchsorted(running, draws * running[:, -1:], right=True)[:, 0]
