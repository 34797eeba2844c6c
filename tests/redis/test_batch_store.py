"""Batches in Redis: one driver, each line once, and nothing that stays for ever."""

from dataclasses import replace

import pytest
from redis import Redis

from mixfleet_broker.batch_store import (
    ENDS,
    BatchStore,
    NewBatch,
    Result,
    Status,
    is_done,
)
from mixfleet_broker.errors import BrokerError
from mixfleet_broker.file_store import MAX_FILES, FilesFull, FileStore, new_file_id
from mixfleet_broker.keys import BATCH, BATCH_DONE, BATCHES_OPEN, FILE, OWN_FILES
from support.worker_process import until

BATCH_ID = f"batch_{'a' * 32}"
FIELDS = {"filename": "x.jsonl", "purpose": "batch"}
LINES = [Result(place=i, is_error=False, line=b"%d\n" % i, completion_tokens=2) for i in range(3)]


@pytest.fixture(params=["", "{team}:"])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def files(redis: Redis, prefix: str) -> FileStore:
    return FileStore(redis, prefix=prefix)


@pytest.fixture
def store(redis: Redis, prefix: str) -> BatchStore:
    return BatchStore(redis, prefix=prefix)


@pytest.fixture
def new(files: FileStore) -> NewBatch:
    return NewBatch(
        batch_id=BATCH_ID,
        tenant="t",
        key_id="",
        endpoint="/v1/chat/completions",
        input_file=upload(files, b"one\ntwo\n"),
        window="1h",
        window_s=3600,
        ttl_s=60,
        in_flight=2,
        metadata={"a": "b"},
    )


def upload(files: FileStore, *pieces: bytes, tenant: str = "t") -> str:
    file_id = new_file_id()
    for piece in pieces:
        files.upload(file_id, piece)
    assert files.add(file_id, tenant, FIELDS, ttl_s=60, max_bytes=1 << 20) is None
    return file_id


def output(store: BatchStore, files: FileStore) -> tuple[bytes, bytes]:
    batch = store.find(BATCH_ID)
    assert batch is not None
    return files.read(batch.output_file, 0, 999), files.read(batch.error_file, 0, 999)


def test_a_file_is_read_from_any_place(files: FileStore) -> None:
    file_id = upload(files, b"one\n", b"two")
    found = files.find(file_id)
    assert found is not None
    assert (found.num_bytes, found.filename, found.tenant) == (7, "x.jsonl", "t")
    assert found.expires_at == found.created_at + 60
    assert (files.read(file_id, 2, 3), files.read(file_id, 7, 3)) == (b"e\nt", b"")
    assert files.own("t") == [found]
    assert files.delete(file_id)
    assert not files.delete(file_id)
    assert files.find(file_id) is None
    assert files.own("t") == []


def test_files_that_have_expired_make_room(files: FileStore, redis: Redis, prefix: str) -> None:
    first = upload(files, b"x")
    for _ in range(MAX_FILES - 1):
        upload(files)
    full = files.add(new_file_id(), "t", FIELDS, ttl_s=60, max_bytes=1)
    assert full == FilesFull(unit="files", held=MAX_FILES, limit=MAX_FILES)
    redis.delete(FILE(first, prefix=prefix))  # as if it had expired
    upload(files)
    assert redis.zcard(OWN_FILES("t", prefix=prefix)) == MAX_FILES


def test_each_line_is_written_once(store: BatchStore, files: FileStore, new: NewBatch) -> None:
    assert store.open(new) == "opened"
    assert store.lease(BATCH_ID, "one", 60)
    assert store.append(BATCH_ID, "one", [LINES[1], replace(LINES[0], is_error=True)])
    assert store.append(BATCH_ID, "one", [LINES[1], LINES[0], LINES[2]])  # the reply was lost
    assert output(store, files) == (b"1\n2\n", b"0\n")
    batch = store.find(BATCH_ID)
    assert batch is not None
    assert (batch.completed, batch.failed, batch.completion_tokens) == (2, 1, 6)
    marks = store.done(BATCH_ID)
    assert [is_done(marks, place) for place in range(10)] == [True] * 3 + [False] * 7


def test_who_lost_the_lease_can_write_nothing(
    store: BatchStore, files: FileStore, new: NewBatch
) -> None:
    store.open(new)
    assert store.lease(BATCH_ID, "one", 0.05)
    assert store.lease(BATCH_ID, "two", 60) is None
    until(lambda: store.lease(BATCH_ID, "two", 60) is not None, "the lease is over")
    assert store.lease(BATCH_ID, "one", 60) is None
    assert not store.append(BATCH_ID, "one", LINES)
    assert store.move(BATCH_ID, "one", "completed") is None
    store.let_go(BATCH_ID, "one")
    assert store.lease(BATCH_ID, "three", 60) is None
    assert store.append(BATCH_ID, "two", LINES)
    assert output(store, files) == (b"0\n1\n2\n", b"")
    store.let_go(BATCH_ID, "two")
    assert store.lease(BATCH_ID, "three", 60) is not None


def test_a_batch_that_is_to_be_cancelled_never_completes(store: BatchStore, new: NewBatch) -> None:
    store.open(new)
    store.lease(BATCH_ID, "one", 60)
    assert store.move(BATCH_ID, "", "completed") == "validating"  # not its owner's to say
    assert store.move(BATCH_ID, "", "cancelling") == "cancelling"
    steps: list[Status] = ["in_progress", "finalizing", "completed", "expired"]
    assert {store.move(BATCH_ID, "one", step) for step in steps} == {"cancelling"}
    assert store.move(BATCH_ID, "one", "cancelled") == "cancelled"
    assert store.move(BATCH_ID, "", "cancelling") == "cancelled"


@pytest.mark.parametrize("end", sorted(ENDS))
def test_an_ended_batch_is_kept_for_its_time_and_no_longer(
    store: BatchStore, files: FileStore, new: NewBatch, redis: Redis, prefix: str, end: Status
) -> None:
    store.open(new)
    store.lease(BATCH_ID, "one", 60)
    store.append(BATCH_ID, "one", LINES)
    for raw in redis.scan_iter():
        if raw.decode() != BATCHES_OPEN(prefix=prefix):
            assert 3600 < int(redis.ttl(raw)) <= 3660, raw
    assert store.move(BATCH_ID, "one", end) == end
    assert store.open_ids() == []
    assert not redis.exists(BATCH_DONE(BATCH_ID, prefix=prefix))
    assert not store.append(BATCH_ID, "one", LINES)
    batch = store.find(BATCH_ID)
    assert batch is not None
    for name in (BATCH(BATCH_ID, prefix=prefix), FILE(batch.output_file, prefix=prefix)):
        assert 0 < int(redis.ttl(name)) <= 60
    found = files.find(batch.output_file)
    assert found is not None
    assert found.expires_at <= found.created_at + 61


def test_an_open_batch_that_was_forgotten_is_forgotten_by_who_looks(
    store: BatchStore, new: NewBatch, redis: Redis, prefix: str
) -> None:
    store.open(new)
    redis.delete(BATCH(BATCH_ID, prefix=prefix))  # as if nobody had driven it until it expired
    assert store.open_ids() == [BATCH_ID]
    assert store.lease(BATCH_ID, "one", 60) is None
    assert store.open_ids() == []


def test_no_batch_of_a_file_that_is_gone(
    store: BatchStore, files: FileStore, new: NewBatch
) -> None:
    files.delete(new.input_file)
    assert store.open(new) == "no_file"
    assert store.find(BATCH_ID) is None


def test_a_record_that_cannot_be_read_is_an_error(
    store: BatchStore, redis: Redis, prefix: str
) -> None:
    redis.hset(BATCH(BATCH_ID, prefix=prefix), "status", "what")
    with pytest.raises(BrokerError, match=f"record of {BATCH_ID} cannot be read"):
        store.find(BATCH_ID)
