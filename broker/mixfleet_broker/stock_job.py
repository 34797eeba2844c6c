"""Jobs that rq's own ``Queue.enqueue`` made, with its JSON serializer.

Their data is JSON, zlib-compressed or not: ``[function, instance, [args], {kwargs}]``. The
function must be ``mixfleet.chat``, a name that is compared and never imported, and its one
argument the chat::

    Queue("mixtral-8x7b", connection=redis, serializer=JSONSerializer).enqueue(
        "mixfleet.chat", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64}
    )
"""

import json
import zlib
from typing import Final, NoReturn

from mixfleet_broker.errors import MessageError
from mixfleet_broker.packing import MAX_MESSAGE_BYTES
from mixfleet_broker.rq_compat import STOCK_FUNCTION
from mixfleet_broker.schema import Fields, check_depth, items

_SAMPLING_FIELDS: Final = ("temperature", "top_k", "top_p", "max_tokens", "seed")


def chat_of_stock_job(value: object) -> dict[str, object]:
    """Return the wire form of a chat job that came from an rq producer.

    Args:
        value: Our wrapping of rq's data, see ``encode_stock_job``.

    Raises:
        MessageError: The data is not JSON, does not name ``mixfleet.chat``, or has an argument
            that is not one map of the known fields.
    """
    wrapper = Fields(value, "job")
    version, _ = wrapper.take("v"), wrapper.take("kind")
    job_id, model = wrapper.text("id"), wrapper.text("model")
    data = wrapper.take("data")
    wrapper.done()
    if not isinstance(data, bytes):
        raise MessageError(f"job.data: must be bytes, is {type(data).__name__}")
    chat = Fields(_argument(_parse(_inflate(data))), "chat")
    sampling = {name: chat.take(name) for name in _SAMPLING_FIELDS}
    stop = chat.take("stop")
    sampling["stop"] = [stop] if isinstance(stop, str) else stop
    wire: dict[str, object] = {
        "v": version,
        "kind": "chat",
        "id": job_id,
        "model": chat.text_or_none("model") or model,
        "messages": chat.take("messages"),
        "prompt": chat.take("prompt"),
        "sampling": sampling,
    }
    chat.done()
    return wire


def _inflate(data: bytes) -> bytes:
    """Return ``data`` decompressed, or as it is when it is not compressed."""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(data, MAX_MESSAGE_BYTES)
    except zlib.error:
        return data
    if inflater.unconsumed_tail or not inflater.eof:
        raise MessageError(f"job.data: more than {MAX_MESSAGE_BYTES} bytes, or cut off")
    return inflated


def _parse(data: bytes) -> object:
    try:
        value: object = json.loads(data, parse_constant=_refuse_constant)
    except MessageError:
        raise
    except (ValueError, RecursionError):
        # Pickle ends up here: it is told from JSON by not being JSON, never by loading it.
        raise MessageError(
            "job.data: not JSON; enqueue with rq's JSONSerializer, nothing is unpickled here"
        ) from None
    check_depth(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise MessageError(f"job.data: {name} is not a number")


def _argument(call: object) -> object:
    """Return the one argument of the call."""
    parts = items(call, "job.data")
    if len(parts) != 4:
        raise MessageError(f"job.data: {len(parts)} parts, an rq call has 4")
    function, instance, arguments, keywords = parts
    if function != STOCK_FUNCTION or instance is not None:
        raise MessageError(
            f"job.data: calls {str(function)[:80]!r}, only {STOCK_FUNCTION!r} is known"
        )
    given = items(arguments, "job.data args")
    if len(given) != 1 or keywords:
        raise MessageError(f"job.data: {STOCK_FUNCTION} takes one argument, a map, and no keywords")
    return given[0]
