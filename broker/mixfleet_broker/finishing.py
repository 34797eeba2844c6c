"""The arguments of the script that ends a job from inside."""

from mixfleet_broker.errors import MessageError
from mixfleet_broker.event_codec import encode_chunk, encode_end, with_bounded_message
from mixfleet_broker.lua import Argument
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.records import Lease
from mixfleet_broker.terms import QueueRules


def finish_args(
    lease: Lease, end: JobEnd, chunk: TokenChunk | None, rules: QueueRules
) -> tuple[Argument, ...]:
    """Return ARGV of ``finish.lua`` from the second on.

    Raises:
        MessageError: The end is a cancelled one, or it or the chunk is not of the schema.
    """
    if end.state == "canceled":
        raise MessageError("end: a worker finishes or fails a job; use cancel to cancel it")
    end = with_bounded_message(end)
    usage = end.usage
    return (
        lease.job_id,
        lease.token,
        lease.run,
        end.state,
        encode_end(end),
        b"" if chunk is None else encode_chunk(chunk),
        0 if chunk is None else chunk.num_tokens,
        0 if chunk is None else len(chunk.token_ids),
        rules.result_ttl,
        rules.failure_ttl,
        end.finish_reason or "",
        0 if usage is None else usage.prompt_tokens,
        0 if usage is None else usage.completion_tokens,
    )
