import time
from collections.abc import Iterator

import pytest

from mixfleet_broker.event_codec import encode_chunk
from mixfleet_broker.messages import (
    AnswerPart,
    JobEnd,
    TokenChunk,
    TokenLogprob,
    new_job_id,
)
from mixfleet_broker.packing import MAX_MESSAGE_BYTES
from mixfleet_worker.handoff import ChunkWrite, EndWrite, JobTimes, Write
from mixfleet_worker.held import LONGEST_WAIT_S, HeldJob, waited_s
from support.fake_session import chunk_write
from support.worker_jobs import a_lease

LEASE = a_lease()
KEEP_S = 15.0


def a_held_job() -> HeldJob:
    return HeldJob(lease=LEASE, renewed_at=0.0)


def an_end(chunk: TokenChunk | None = None) -> EndWrite:
    end = JobEnd(state="finished", finish_reason="stop")
    return EndWrite(lease=LEASE, end=end, chunk=chunk, times=JobTimes(claimed_at=0.0, ended_at=1.0))


def test_a_write_stays_until_it_is_settled() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1))
    assert job.next_write() == job.next_write() == chunk_write(LEASE, 1)
    assert job.has_writes
    job.settle(0.0, KEEP_S)
    assert job.next_write() is None
    assert not job.has_writes


def test_writes_that_wait_become_one() -> None:
    job = a_held_job()
    for number, text in ((1, "a"), (2, ""), (3, "c")):
        job.add(chunk_write(LEASE, number, text))
    assert job.next_write() == ChunkWrite(
        lease=LEASE, chunk=TokenChunk(num_tokens=3, text="ac", token_ids=(1, 2, 3))
    )


def a_chunk(
    number: int,
    *,
    part: AnswerPart = "text",
    num_top: int = 0,
    num_prompt_tokens: int | None = None,
) -> ChunkWrite:
    """The write of one token with its log-probability and that of some others."""
    logprob = TokenLogprob(token=b"x", logprob=-number, top=((b"y", -1.0),) * num_top)
    return ChunkWrite(
        lease=LEASE,
        chunk=TokenChunk(
            num_tokens=number,
            text="x",
            token_ids=(number,),
            part=part,
            logprobs=(logprob,),
            num_prompt_tokens=num_prompt_tokens,
        ),
    )


def sent_one_by_one(job: HeldJob) -> Iterator[Write]:
    while (write := job.next_write()) is not None:
        yield write
        job.settle(0.0, KEEP_S)


def test_joined_chunks_keep_every_logprob_and_the_length_of_the_prompt() -> None:
    job = a_held_job()
    for number in (1, 2, 3):
        job.add(a_chunk(number, num_prompt_tokens=9 if number == 1 else None))
    [write] = sent_one_by_one(job)
    assert write.chunk is not None
    assert [one.logprob for one in write.chunk.logprobs] == [-1, -2, -3]
    assert (write.chunk.token_ids, write.chunk.num_prompt_tokens) == ((1, 2, 3), 9)


def test_chunks_of_different_parts_stay_apart_and_in_order() -> None:
    job = a_held_job()
    parts: tuple[AnswerPart, ...] = ("text", "text", "tool_calls", "tool_calls", "text")
    for number, part in enumerate(parts, 1):
        job.add(a_chunk(number, part=part))
    last = a_chunk(6, part="tool_calls").chunk
    job.add(an_end(last))
    assert job.has_end
    *chunks, end = [write.chunk for write in sent_one_by_one(job)]
    assert [(chunk.part, chunk.token_ids) for chunk in chunks if chunk is not None] == [
        ("text", (1, 2)),
        ("tool_calls", (3, 4)),
        ("text", (5,)),
    ]
    assert end == last


def test_joined_chunks_with_many_logprobs_stay_small_enough_for_the_wire() -> None:
    job = a_held_job()
    numbers = range(1, 3000)
    for number in numbers:
        job.add(a_chunk(number, num_top=20))
    chunks = [write.chunk for write in sent_one_by_one(job) if write.chunk is not None]
    assert [i for chunk in chunks for i in chunk.token_ids] == list(numbers)
    assert max(len(encode_chunk(chunk)) for chunk in chunks) < MAX_MESSAGE_BYTES / 2


def test_a_write_that_was_sent_never_changes() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1))
    job.next_write()
    job.add(chunk_write(LEASE, 2))
    job.add(chunk_write(LEASE, 3))
    assert job.next_write() == chunk_write(LEASE, 1)
    job.settle(0.0, KEEP_S)
    later = job.next_write()
    assert later is not None
    assert later.chunk is not None
    assert later.chunk.token_ids == (2, 3)


def test_an_end_takes_the_waiting_chunks_along() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1, "a"))
    job.add(an_end(TokenChunk(num_tokens=2, text="b", token_ids=(2,))))
    assert job.has_end
    assert job.next_write() == an_end(TokenChunk(num_tokens=2, text="ab", token_ids=(1, 2)))


def test_an_end_without_a_chunk_keeps_the_waiting_one() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1, "a"))
    job.add(an_end())
    assert job.next_write() == an_end(TokenChunk(num_tokens=1, text="a", token_ids=(1,)))


def test_an_end_behind_a_sent_chunk_waits_for_its_turn() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1))
    job.next_write()
    job.add(an_end())
    assert job.has_end
    assert job.next_write() == chunk_write(LEASE, 1)
    job.settle(0.0, KEEP_S)
    assert job.next_write() == an_end()


def calls_write(number: int, text: str) -> ChunkWrite:
    chunk = TokenChunk(num_tokens=number, text=text, token_ids=(number,), part="tool_calls")
    return ChunkWrite(lease=LEASE, chunk=chunk)


def test_text_and_tool_calls_that_wait_stay_apart_and_in_order() -> None:
    job = a_held_job()
    for write in (chunk_write(LEASE, 1, "a"), chunk_write(LEASE, 2, "b")):
        job.add(write)
    for write in (calls_write(3, "["), calls_write(4, "]")):
        job.add(write)
    job.add(an_end())
    assert job.has_end
    assert job.next_write() == ChunkWrite(
        lease=LEASE, chunk=TokenChunk(num_tokens=2, text="ab", token_ids=(1, 2))
    )
    assert job.has_end
    job.settle(0.0, KEEP_S)
    assert job.next_write() == an_end(
        TokenChunk(num_tokens=4, text="[]", token_ids=(3, 4), part="tool_calls")
    )
    job.settle(0.0, KEEP_S)
    assert not job.has_writes


def test_an_end_of_another_part_goes_behind_the_text() -> None:
    job = a_held_job()
    job.add(chunk_write(LEASE, 1, "a"))
    end = an_end(calls_write(2, "[").chunk)
    job.add(end)
    assert job.next_write() == chunk_write(LEASE, 1, "a")
    job.settle(0.0, KEEP_S)
    assert job.next_write() == end


def test_the_id_of_a_job_tells_how_long_it_waited() -> None:
    job_id = f"{1_700_000_000_500:012x}{'0' * 20}"
    assert waited_s(job_id, 1_700_000_002.0) == pytest.approx(1.5)


def test_a_new_id_has_hardly_waited() -> None:
    waited = waited_s(new_job_id(), time.time())
    assert waited is None or waited < 1.0


@pytest.mark.parametrize("now", [0.0, 1_700_000_000.0 + 2 * LONGEST_WAIT_S])
def test_an_impossible_wait_is_no_wait(now: float) -> None:
    assert waited_s(f"{1_700_000_000_000:012x}{'0' * 20}", now) is None


@pytest.mark.parametrize("job_id", ["job1", "c0ffee00-1111-2222-3333-444455556666", "Z" * 32])
def test_an_id_of_another_form_tells_no_time(job_id: str) -> None:
    assert waited_s(job_id, 1_700_000_000.0) is None


def a_written_job(*numbers: int, at: float = 0.0) -> HeldJob:
    """A job whose tokens up to each number were written, a chunk each, a second apart."""
    job = a_held_job()
    for seconds, number in enumerate(numbers):
        job.add(chunk_write(LEASE, number))
        job.next_write()
        job.settle(at + seconds, KEEP_S)
    return job


def numbers_sent(job: HeldJob) -> list[int]:
    return [write.chunk.num_tokens for write in sent_one_by_one(job) if write.chunk]


@pytest.mark.parametrize("num_kept", [0, 1, 2, 3])
def test_what_redis_has_lost_is_sent_again_as_it_was_and_then_what_follows(num_kept: int) -> None:
    job = a_written_job(1, 2, 3)
    job.add(chunk_write(LEASE, 4))
    job.next_write()
    for number in (5, 6):
        job.add(chunk_write(LEASE, number))
    assert job.send_again_after(num_kept) == (num_kept < 3)
    assert numbers_sent(job) == [*range(num_kept + 1, 5), 6]


def test_redis_may_lose_its_writes_again_before_it_has_them_all() -> None:
    job = a_written_job(1, 2, 3)
    assert job.send_again_after(1)
    job.next_write()
    job.settle(5.0, KEEP_S)
    assert job.send_again_after(0)
    assert numbers_sent(job) == [1, 2, 3]


def test_an_end_that_came_too_early_waits_for_what_goes_before() -> None:
    job = a_written_job(1, 2)
    end = an_end(TokenChunk(num_tokens=3, text="x", token_ids=(3,)))
    job.add(end)
    job.next_write()
    assert job.send_again_after(1)
    assert job.has_end
    assert list(sent_one_by_one(job)) == [chunk_write(LEASE, 2), end]
    assert not job.has_writes


def test_what_was_written_long_ago_or_ends_elsewhere_cannot_be_sent_again() -> None:
    job = a_written_job(1, 2, at=100.0)
    both = TokenChunk(num_tokens=4, text="xy", token_ids=(3, 4))
    job.add(ChunkWrite(lease=LEASE, chunk=both))
    job.next_write()
    job.settle(101.0 + KEEP_S, KEEP_S)
    assert not job.send_again_after(0)
    assert not job.send_again_after(3)
    assert not job.send_again_after(4)
    assert job.send_again_after(1)
