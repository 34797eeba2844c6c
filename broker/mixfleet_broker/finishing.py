"""The arguments and the reply of the script that ends a job from inside."""

from mixfleet_broker.errors import BrokerError, MessageError
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


def finish_outcome(reply: object) -> bool:
    """Return whether a reply to ``finish_on`` says that the job is ended, see ``finish``.

    Raises:
        BrokerError: The reply is none of the script's.
    """
    if not isinstance(reply, int):
        raise BrokerError(f"finish: unexpected reply {reply!r:.200}")
    return reply == 1
