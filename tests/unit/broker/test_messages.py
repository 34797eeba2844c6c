import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    decode_job,
    encode_job,
    validate,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    SamplingSettings,
    new_job_id,
)
from mixfleet_broker.packing import (
    MAX_MESSAGE_BYTES,
)
from support.queue_jobs import chat_job

settings = st.builds(
    SamplingSettings,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=16).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
messages = st.lists(
    st.builds(
        ChatMessage, role=st.sampled_from(("system", "user", "assistant")), content=st.text()
    ),
    min_size=1,
    max_size=5,
).map(tuple)


def wire(**changes: Any) -> dict[str, Any]:
    value = {
        "v": 1,
        "kind": "chat",
        "id": "job1",
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "sampling": {},
    }
    return {name: item for name, item in (value | changes).items() if item is not ...}


def packed(value: object) -> bytes:
    return bytes(msgpack.packb(value))


@given(messages=messages, sampling=settings)
def test_a_chat_survives_the_wire(
    messages: tuple[ChatMessage, ...], sampling: SamplingSettings
) -> None:
    job = ChatJob(job_id="job1", model="tiny", messages=messages, sampling=sampling)
    assert decode_job(encode_job(job)) == job


@given(prompt=st.text())
def test_a_prompt_survives_the_wire(prompt: str) -> None:
    job = ChatJob(job_id="job1", model="tiny", prompt=prompt)
    assert decode_job(encode_job(job)) == job


def test_equal_jobs_have_equal_bytes() -> None:
    one = chat_job(job_id="job1", stop=("a", "b"), seed=4)
    other = chat_job(job_id="job1", seed=4, stop=("a", "b"))
    assert encode_job(one) == encode_job(other)


def test_a_whole_number_is_a_temperature() -> None:
    job = decode_job(packed(wire(sampling={"temperature": 1, "top_p": 1})))
    assert job.sampling == SamplingSettings(temperature=1.0, top_p=1.0)


def test_missing_settings_are_the_defaults() -> None:
    assert decode_job(packed(wire(sampling=...))).sampling == SamplingSettings()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"v": 2}, "schema '2'"),
        ({"kind": "embed"}, "kind 'embed'"),
        ({"id": ...}, "job.id: must be text, is missing"),
        ({"id": "a:b"}, "job_id='a:b'"),
        ({"id": ""}, "job_id=''"),
        ({"model": "../etc"}, "model='../etc'"),
        ({"model": 7}, "job.model: must be text, is int"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"messages": ...}, "exactly one of messages, prompt"),
        ({"messages": []}, "exactly one of messages, prompt"),
        ({"prompt": "x"}, "exactly one of messages, prompt"),
        ({"messages": "Hi"}, "job.messages: must be a list, is str"),
        ({"messages": ["Hi"]}, "messages[0]: must be a map, is str"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: must be text, is missing"),
        ({"messages": [{"role": "root", "content": ""}]}, "messages[0].role='root'"),
        ({"messages": [{"role": "user", "content": "", "name": "x"}]}, "unknown field 'name'"),
        ({"sampling": []}, "sampling: must be a map"),
        ({"sampling": {"temp": 1}}, "unknown field 'temp'"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature=-0.1: must be from 0 to 2"),
        ({"sampling": {"temperature": 2.01}}, "temperature=2.01"),
        ({"sampling": {"temperature": float("nan")}}, "temperature=nan"),
        ({"sampling": {"temperature": float("inf")}}, "temperature=inf"),
        ({"sampling": {"temperature": True}}, "must be a number, is bool"),
        ({"sampling": {"temperature": "hot"}}, "must be a number, is str"),
        ({"sampling": {"top_p": 0}}, "top_p=0"),
        ({"sampling": {"top_p": 1.1}}, "top_p=1.1"),
        ({"sampling": {"top_k": -1}}, "top_k=-1"),
        ({"sampling": {"top_k": 1.5}}, "top_k: must be a whole number, is float"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens=0"),
        ({"sampling": {"max_tokens": True}}, "max_tokens: must be a whole number, is bool"),
        ({"sampling": {"seed": -1}}, "seed=-1"),
        ({"sampling": {"seed": 2**63}}, f"seed={2**63}"),
        ({"sampling": {"stop": "x"}}, "sampling.stop: must be a list, is str"),
        ({"sampling": {"stop": [""]}}, "stop[0]: 0 characters"),
        ({"sampling": {"stop": ["x" * 257]}}, "stop[0]: 257 characters"),
        ({"sampling": {"stop": ["x"] * 17}}, "stop: 17 strings, the limit is 16"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode_job(packed(wire(**changes)))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="a byte that msgpack never uses"),
        pytest.param(packed(wire())[:-1], id="cut off"),
        pytest.param(packed(wire()) + b"\x00", id="a byte too many"),
        pytest.param(packed([1, 2]), id="a list"),
        pytest.param(packed(None), id="nil"),
        pytest.param(packed({1: 2}), id="a key that is no text"),
        pytest.param(packed(wire(prompt=msgpack.ExtType(4, b"x"))), id="an extension"),
        pytest.param(packed(wire(prompt=msgpack.Timestamp(1))), id="a timestamp"),
        pytest.param(b"\x81\xa1v\xc7\x00\x05", id="an empty extension"),
        pytest.param(packed(wire(prompt=b"bytes")), id="bytes for text"),
        pytest.param(b"\x81\xa1v\xa2\xff\xfe", id="text that is not utf-8"),
        pytest.param(b"\x91" * 500 + b"\xc0", id="500 lists inside each other"),
        pytest.param(b"\x91" * 100_000 + b"\xc0", id="100,000 lists inside each other"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a list that says it is huge"),
        pytest.param(b"\x80\x04\x95\x05\x00\x00\x00", id="the start of a pickle"),
    ],
)
def test_bytes_that_are_no_job_are_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_job(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_job_or_a_message_error(data: bytes) -> None:
    with suppress(MessageError):
        assert isinstance(decode_job(data), ChatJob)


def test_deep_values_are_refused_before_the_schema_looks_at_them() -> None:
    nested: object = 1
    for _ in range(20):
        nested = [nested]
    with pytest.raises(MessageError, match="more than 8 maps and lists"):
        decode_job(packed(wire(prompt=nested)))


def test_a_job_is_at_most_a_mebibyte() -> None:
    large = chat_job("x" * (MAX_MESSAGE_BYTES - 300))
    assert decode_job(encode_job(large)) == large
    with pytest.raises(MessageError, match=rf"the limit is {MAX_MESSAGE_BYTES}"):
        encode_job(chat_job("x" * MAX_MESSAGE_BYTES))
    with pytest.raises(MessageError, match=rf"the limit is {MAX_MESSAGE_BYTES}"):
        decode_job(b"\x00" * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda job: dataclasses.replace(job, messages=()), "exactly one"),
        (lambda job: dataclasses.replace(job, job_id="no spaces"), "job_id"),
        (lambda job: dataclasses.replace(job, prompt="both"), "exactly one"),
        (
            lambda job: dataclasses.replace(job, sampling=SamplingSettings(temperature=3.0)),
            "temperature=3",
        ),
        (
            lambda job: dataclasses.replace(job, sampling=SamplingSettings(seed=10**400)),
            "seed=",
        ),
        (lambda _: chat_job("\ud800"), "lone surrogate"),
    ],
)
def test_a_client_hears_of_a_bad_job_before_it_is_sent(
    change: Callable[[ChatJob], ChatJob], text: str
) -> None:
    job = change(chat_job())
    with pytest.raises(MessageError, match=text):
        validate(job)
    with pytest.raises(MessageError, match=text):
        encode_job(job)


def test_the_error_text_never_holds_the_prompt() -> None:
    with pytest.raises(MessageError) as caught:
        decode_job(packed(wire(messages=[{"role": "user", "content": ["secret"]}])))
    assert "secret" not in str(caught.value)


def test_job_ids_are_32_hex_digits_sort_by_time_and_never_repeat() -> None:
    ids = [new_job_id() for _ in range(100)]
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)
    assert len(set(ids)) == 100
    times = [i[:12] for i in ids]
    assert times == sorted(times)
