"""How the sampling settings of a job lie on the wire, and the limits of each."""

from typing import Final

from mixfleet_broker.errors import MessageError
from mixfleet_broker.messages import (
    MAX_COUNT,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    SamplingSettings,
)
from mixfleet_broker.schema import Fields, integer, items, number, text

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_SEED: Final = 2**63 - 1
MAX_BIAS: Final = 100.0


def sampling_map(settings: SamplingSettings) -> dict[str, object]:
    """Return what was set, by its name on the wire."""
    values: dict[str, object] = {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "stop": list(settings.stop),
        "seed": settings.seed,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "logit_bias": [list(pair) for pair in settings.logit_bias] or None,
        "logprobs": settings.logprobs,
        "ignore_eos": settings.ignore_eos or None,
    }
    return {name: given for name, given in values.items() if given is not None}


def read_sampling(fields: Fields) -> SamplingSettings:
    """Return the settings that a map holds.

    Raises:
        MessageError: One is outside its limits or unknown; the text names it.
    """
    settings = SamplingSettings(
        temperature=fields.number_or_none("temperature", 0.0, 2.0),
        top_k=fields.integer_or_none("top_k", 0, MAX_COUNT),
        top_p=_above_zero("top_p", fields.number_or_none("top_p", 0.0, 1.0)),
        max_tokens=fields.integer_or_none("max_tokens", 1, MAX_COUNT),
        stop=_read_stop(fields),
        seed=fields.integer_or_none("seed", 0, MAX_SEED),
        min_p=fields.number_or_none("min_p", 0.0, 1.0),
        repetition_penalty=_above_zero(
            "repetition_penalty", fields.number_or_none("repetition_penalty", 0.0, 10.0)
        ),
        presence_penalty=fields.number_or_none("presence_penalty", -2.0, 2.0),
        frequency_penalty=fields.number_or_none("frequency_penalty", -2.0, 2.0),
        logit_bias=_read_biases(fields),
        logprobs=fields.integer_or_none("logprobs", 0, MAX_LOGPROBS),
        ignore_eos=_read_flag(fields, "ignore_eos"),
    )
    fields.done()
    return settings


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = tuple(text(item, f"stop[{i}]") for i, item in enumerate(fields.items("stop")))
    if len(stop) > MAX_STOP_STRINGS:
        raise MessageError(f"stop: {len(stop)} strings, the limit is {MAX_STOP_STRINGS}")
    for i, item in enumerate(stop):
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            raise MessageError(
                f"stop[{i}]: {len(item)} characters, must be from 1 to {MAX_STOP_CHARACTERS}"
            )
    return stop


def _read_biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    pairs = fields.items("logit_bias")
    if len(pairs) > MAX_LOGIT_BIASES:
        raise MessageError(f"logit_bias: {len(pairs)} tokens, the limit is {MAX_LOGIT_BIASES}")
    biases = []
    for pair in pairs:
        parts = items(pair, "logit_bias")
        if len(parts) != 2:
            raise MessageError(f"logit_bias: {len(parts)} parts, must be a token id and a number")
        token_id = integer(parts[0], "logit_bias token", 0, MAX_COUNT)
        biases.append((token_id, number(parts[1], f"logit_bias.{token_id}", -MAX_BIAS, MAX_BIAS)))
    if len({token_id for token_id, _ in biases}) < len(biases):
        raise MessageError("logit_bias: a token is there twice")
    return tuple(biases)


def _read_flag(fields: Fields, name: str) -> bool:
    value = fields.take(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise MessageError(f"sampling.{name}: must be true or false, is {type(value).__name__}")


def _above_zero(name: str, value: float | None) -> float | None:
    if value == 0.0:
        raise MessageError(f"sampling.{name}=0: must be greater than 0")
    return value
