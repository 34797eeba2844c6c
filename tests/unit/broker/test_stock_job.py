import json
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    decode_job,
    encode_stock_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    SamplingSettings,
)
from mixfleet_broker.packing import (
    MAX_MESSAGE_BYTES,
)

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class Planted:
    """Unpickled, it would say so."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


def decoded(data: bytes) -> ChatJob:
    return decode_job(encode_stock_job("job1", "tiny", data))


def call(*args: object, function: str = "mixfleet.chat", **keywords: object) -> bytes:
    return json.dumps([function, None, args, keywords]).encode()


@pytest.mark.parametrize("compress", [zlib.compress, bytes])
def test_a_chat_of_an_rq_producer_becomes_a_chat_job(compress: Any) -> None:
    chat = CHAT | {"temperature": 0, "max_tokens": 5, "stop": "x", "seed": 1, "top_k": 2}
    job = decoded(compress(call(chat)))
    assert job == ChatJob(
        job_id="job1",
        model="tiny",
        messages=(ChatMessage(role="user", content="Hi"),),
        sampling=SamplingSettings(temperature=0.0, max_tokens=5, stop=("x",), seed=1, top_k=2),
    )


def test_a_prompt_of_an_rq_producer_is_taken_with_the_default_settings() -> None:
    job = decoded(call({"prompt": "Once", "stop": ["a", "b"]}))
    assert (job.prompt, job.sampling) == ("Once", SamplingSettings(stop=("a", "b")))


def test_the_model_may_be_named_and_is_the_callers_to_compare() -> None:
    assert decoded(call(CHAT | {"model": "other"})).model == "other"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (call(CHAT, function="os.system"), "calls 'os.system'"),
        (call(CHAT, function="mixfleet.chat "), "only 'mixfleet.chat' is known"),
        (call(), "takes one argument"),
        (call(CHAT, CHAT), "takes one argument"),
        (call(CHAT, extra=1), "takes one argument"),
        (call("Hi"), "chat: must be a map, is str"),
        (call(CHAT | {"n": 2}), "unknown field 'n'"),
        (call(CHAT | {"temperature": 9}), "temperature=9"),
        (call({}), "exactly one of messages, prompt"),
        (b'["mixfleet.chat", null, [{}]]', "3 parts"),
        (b'["mixfleet.chat", "instance", [{}], {}]', "calls"),
        (b'{"a": 1}', "must be a list"),
        (b'["mixfleet.chat", null, [{"temperature": NaN}], {}]', "NaN is not a number"),
        (b"[" * 100_000, "not JSON"),
        (b"[" * 20 + b"]" * 20, "more than 8"),
        (b"", "cut off"),
        (b"\xff\xfe\x00", "not JSON"),
        (zlib.compress(call(CHAT))[:-4], "cut off"),
        (zlib.compress(b" " * (MAX_MESSAGE_BYTES + 1)), f"more than {MAX_MESSAGE_BYTES}"),
    ],
)
def test_anything_else_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(MessageError) as caught:
        decoded(data)
    assert text in str(caught.value)


def test_a_pickle_is_refused_and_not_loaded() -> None:
    for data in (pickle.dumps(Planted()), zlib.compress(pickle.dumps(Planted()))):
        with pytest.raises(MessageError, match="nothing is unpickled"):
            decoded(data)


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b"\x00" * (64 << 20))
    with pytest.raises(MessageError, match="more than"):
        decoded(bomb)


@given(st.binary(max_size=200))
def test_any_data_is_a_chat_or_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        decoded(data)
