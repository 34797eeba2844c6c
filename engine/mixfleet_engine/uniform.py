"""The random number behind a token: of its request's seed and its position, of nothing else."""

_MASK_64 = (1 << 64) - 1


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
