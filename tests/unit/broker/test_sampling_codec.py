from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.messages import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    SamplingSettings,
)
from mixfleet_broker.packing import pack, unpack
from mixfleet_broker.sampling_codec import read_sampling, sampling_map
from mixfleet_broker.schema import Fields

biases = st.dictionaries(
    st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=MAX_LOGIT_BIASES
).map(lambda found: tuple(found.items()))
settings = st.builds(
    SamplingSettings,
    temperature=st.none() | st.floats(0, 2),
    top_k=st.none() | st.integers(0, 2**31 - 1),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=16).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.none() | st.floats(0, 10, exclude_min=True),
    presence_penalty=st.none() | st.floats(-2, 2),
    frequency_penalty=st.none() | st.floats(-2, 2),
    logit_bias=biases,
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    ignore_eos=st.booleans(),
)


def read(value: object) -> SamplingSettings:
    return read_sampling(Fields(value, "sampling"))


@given(settings)
def test_every_setting_survives_the_wire(given_: SamplingSettings) -> None:
    assert read(unpack(pack(sampling_map(given_)))) == given_


def test_what_was_left_open_is_not_on_the_wire() -> None:
    # An older worker, which knows no newer settings, so takes the jobs that use none.
    assert sampling_map(SamplingSettings()) == {"stop": []}
    assert read({}) == SamplingSettings()


def test_every_setting_has_its_own_name_on_the_wire() -> None:
    every: dict[str, Any] = {field.name: 1 for field in fields(SamplingSettings)}
    every |= {"stop": ("x",), "logit_bias": ((1, 1.0),), "ignore_eos": True}
    assert set(sampling_map(SamplingSettings(**every))) == set(every)


def test_zero_is_a_setting_and_not_a_missing_one() -> None:
    zeros: dict[str, Any] = dict.fromkeys(
        ("temperature", "top_k", "seed", "min_p", "presence_penalty", "frequency_penalty"), 0
    )
    assert read(sampling_map(SamplingSettings(logprobs=0, **zeros))) == SamplingSettings(
        logprobs=0, **zeros
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"min_p": -0.1}, "sampling.min_p=-0.1: must be from 0 to 1"),
        ({"min_p": 1.1}, "sampling.min_p=1.1: must be from 0 to 1"),
        ({"min_p": float("nan")}, "sampling.min_p=nan"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty=0: must be greater than 0"),
        ({"repetition_penalty": 10.5}, "sampling.repetition_penalty=10.5: must be from 0 to 10"),
        ({"presence_penalty": 2.1}, "sampling.presence_penalty=2.1: must be from -2 to 2"),
        ({"presence_penalty": -2.1}, "sampling.presence_penalty=-2.1"),
        ({"frequency_penalty": 2.1}, "sampling.frequency_penalty=2.1: must be from -2 to 2"),
        ({"frequency_penalty": "1"}, "sampling.frequency_penalty: must be a number, is str"),
        ({"logprobs": 21}, "sampling.logprobs=21: must be from 0 to 20"),
        ({"logprobs": -1}, "sampling.logprobs=-1"),
        ({"logprobs": True}, "sampling.logprobs: must be a whole number, is bool"),
        ({"ignore_eos": 1}, "sampling.ignore_eos: must be true or false, is int"),
        ({"logit_bias": {"5": 1}}, "sampling.logit_bias: must be a list, is dict"),
        ({"logit_bias": [5]}, "logit_bias: must be a list, is int"),
        ({"logit_bias": [[5]]}, "logit_bias: 1 parts, must be a token id and a number"),
        ({"logit_bias": [["5", 1]]}, "logit_bias token: must be a whole number, is str"),
        ({"logit_bias": [[-1, 1]]}, "logit_bias token=-1: must be from 0"),
        ({"logit_bias": [[5, 101]]}, "logit_bias.5=101: must be from -100 to 100"),
        ({"logit_bias": [[5, 1], [5, 2]]}, "logit_bias: a token is there twice"),
        (
            {"logit_bias": [[i, 1] for i in range(MAX_LOGIT_BIASES + 1)]},
            "logit_bias: 1025 tokens, the limit is 1024",
        ),
        ({"mirostat": 2}, "sampling: unknown field 'mirostat'"),
    ],
)
def test_a_setting_outside_its_limits_is_refused_by_name(value: object, text: str) -> None:
    with pytest.raises(MessageError) as caught:
        read(value)
    assert text in str(caught.value)
