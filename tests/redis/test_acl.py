"""The rules of least privilege: enough for each kind of process, and no more."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from mixfleet_broker.acl import PASSWORD, ROLES, acl_file, acl_lines
from mixfleet_broker.api_keys import ApiKeys, any_keys
from mixfleet_broker.attendance import attend
from mixfleet_broker.batch_store import BatchStore, NewBatch, Result
from mixfleet_broker.channel import FIRST, delivered_tokens, read_events
from mixfleet_broker.connection import connect
from mixfleet_broker.errors import BrokerError, RateLimitedError
from mixfleet_broker.file_store import FileStore, new_file_id
from mixfleet_broker.flush import Flush
from mixfleet_broker.inquiries import InquiryBox, ask
from mixfleet_broker.inquiry_codec import InquiryAnswer, TokenizeText, encode_answer
from mixfleet_broker.key_records import KeyTerms, Limits
from mixfleet_broker.key_sessions import KeySessions
from mixfleet_broker.keys import (
    API_CHARGE,
    API_JOBS,
    API_KEY,
    API_SECRET,
    API_USE,
    BATCHES_OPEN,
    CHANNEL,
    INQUIRIES,
    JOB,
    LEASES,
    QUEUE,
    READY,
    RQ_WORKER,
    WORKER,
)
from mixfleet_broker.limits import KeyLimits
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.overview import model_statuses
from mixfleet_broker.queue import CancelOutcome, JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord, models, workers
from mixfleet_broker.responses_store import (
    StoredResponse,
    create_response,
    delete_response,
    end_response,
    find_response,
)
from mixfleet_broker.terms import PRIORITIES, JobTerms, QueueRules
from support.queue_jobs import DONE, MODEL, chat_job, chunk, end_all_leases
from support.redis_server import RedisServer
from support.worker_process import until

PREFIX = "{team}:"
SECRET = "a secret"
EVERY_LIMIT = Limits(
    requests_per_min=10, tokens_per_min=100, tokens_per_day=100, max_parallel_jobs=1
)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server that was started with the file as it stands in deploy, passwords put in."""
    with tempfile.TemporaryDirectory(prefix="mixfleet-") as folder:
        file = Path(folder) / "users.acl"
        lines = [
            *acl_lines(),
            *(line.replace(" mixfleet-", " team-") for line in acl_lines(PREFIX)),
        ]
        file.write_text("\n".join(lines).replace(f">{PASSWORD}", ">secret") + "\n")
        with RedisServer("--aclfile", str(file)) as server:
            yield server


@pytest.fixture
def admin(server: RedisServer) -> Iterator[Redis]:
    with server.client() as redis:
        redis.flushall()
        yield redis


@pytest.fixture
def connected(server: RedisServer, admin: Redis) -> Iterator[Callable[[str], Redis]]:
    """Connects as one of the users, as our programs do."""
    assert admin.ping()
    opened: list[Redis] = []

    def as_user(name: str) -> Redis:
        path = server.url.removeprefix("unix://")
        opened.append(connect(f"unix://{name}:secret@{path}"))
        return opened[-1]

    yield as_user
    for redis in opened:
        redis.close()


def test_the_file_in_deploy_is_made_from_the_code() -> None:
    file = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
    assert file.read_text() == acl_file()


def a_registration(redis: Redis, prefix: str = "") -> Registration:
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=4, context_length=64, started_at=0.0
    )
    return Registration(redis, record, lease_s=15.0, prefix=prefix)


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call fails for want of permission, and for nothing else."""
    with pytest.raises((ResponseError, BrokerError)) as caught:
        call()
    error = caught.value
    is_forbidden = isinstance(error, NoPermissionError)
    is_forbidden |= isinstance(error.__cause__, NoPermissionError)
    # A script that meets a forbidden command says so in its own words.
    reasons = ("no permissions", "script can't run", "script can't access")
    assert is_forbidden or any(reason in str(error) for reason in reasons), error
    return True


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_client_can_do_all_that_a_client_does(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    user = connected("team-client" if prefix else "mixfleet-client")
    queue = JobQueue(user, MODEL, prefix=prefix)
    jobs = [chat_job() for _ in PRIORITIES]
    for job, priority in zip(jobs, PRIORITIES, strict=True):
        terms = JobTerms(
            priority=priority, start_within_s=50, finish_within_s=60, ends_with_reader=True
        )
        queue.submit(job, terms)
        queue.submit(job, terms)
    info = queue.info(jobs[2].job_id)
    assert (info.position, info.tokens_ahead) == (2, 2 * 257)
    assert queue.depth() == 3
    attend(user, [jobs[0].job_id], prefix=prefix)
    assert queue.cancel(jobs[2].job_id, "not needed") is CancelOutcome.CANCELED
    assert queue.depth() == 2
    own = JobQueue(admin, MODEL, prefix=prefix)
    first, second = own.claim("w1", 3, "c1")
    flush = Flush(own)
    flush.append(first.lease, chunk(1, 5))
    flush.send()
    assert len(read_events(user, jobs[0].job_id, FIRST, 0.1, prefix=prefix)) == 2
    assert queue.cancel(second.lease.job_id) is CancelOutcome.CANCELED
    assert own.finish(first.lease, DONE)
    assert queue.info(jobs[0].job_id).outlook == "ended"
    assert own.depth() == 0
    assert models(user, prefix=prefix) == []
    assert workers(user, prefix=prefix) == []


def test_a_client_can_end_its_job_when_its_time_is_over(
    admin: Redis, connected: Callable[[str], Redis]
) -> None:
    queue = JobQueue(connected("mixfleet-client"), MODEL)
    job = chat_job()
    queue.submit(job, JobTerms(start_within_s=0.001))
    until(lambda: queue.expire(job.job_id), "the job's time to be over")
    assert queue.info(job.job_id).state == "failed"
    assert admin.zcard(READY(MODEL)) == 0


def test_what_a_client_cancels_leaves_rqs_list_with_the_next_claim(
    admin: Redis, connected: Callable[[str], Redis]
) -> None:
    queue = JobQueue(connected("mixfleet-client"), MODEL)
    jobs = [chat_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    queue.cancel(jobs[1].job_id)
    assert (queue.depth(), admin.llen(QUEUE(MODEL))) == (2, 3)
    own = JobQueue(admin, MODEL)
    [claimed] = own.claim("w1", 1, "c1")
    assert claimed.lease.job_id == jobs[0].job_id
    assert (own.depth(), admin.llen(QUEUE(MODEL))) == (1, 1)


def test_a_client_can_neither_claim_nor_list_nor_destroy(
    admin: Redis, connected: Callable[[str], Redis]
) -> None:
    own, job = JobQueue(admin, MODEL), chat_job(SECRET)
    own.submit(job)
    [claimed] = own.claim("w1", 1, "c1")
    own.submit(chat_job(SECRET))
    a_registration(admin).beat(state="idle", in_flight=0)
    user = connected("mixfleet-client")
    queue = JobQueue(user, MODEL)
    for call in (
        lambda: queue.claim("w9", 1, "c2"),
        lambda: queue.reap(),
        lambda: queue.release([claimed.lease]),
        lambda: queue.finish(claimed.lease, DONE),
        lambda: user.keys("*"),
        lambda: user.scan(),
        lambda: user.flushall(),
        lambda: user.flushdb(),
        lambda: user.config_get("*"),
        lambda: user.acl_list(),
        lambda: user.eval("return 1", 0),
        lambda: user.zrange(READY(MODEL), 0, -1),
        lambda: user.zpopmin(READY(MODEL)),
        lambda: user.zrange(LEASES(MODEL), 0, -1),
        lambda: user.lrange(QUEUE(MODEL), 0, -1),
        lambda: user.lpop(QUEUE(MODEL)),
        lambda: user.lindex(QUEUE(MODEL), 0),
        lambda: user.delete(READY(MODEL)),
        lambda: user.delete(LEASES(MODEL)),
        lambda: user.delete(JOB(job.job_id)),
        lambda: user.hgetall(JOB(job.job_id)),
        lambda: user.set("elsewhere", 1),
        lambda: user.hset(WORKER("w1"), "state", "idle"),
        lambda: user.hset(RQ_WORKER("w1"), "state", "idle"),
        lambda: give_order(user, "w1", "drain"),
        lambda: InquiryBox(user, MODEL).wait(0.1),
        lambda: user.lrange(INQUIRIES(MODEL), 0, -1),
        lambda: user.delete(INQUIRIES(MODEL)),
        lambda: user.publish("x", "y"),
    ):
        assert refused(call)
    assert own.info(job.job_id).state == "started"


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_worker_can_do_all_that_a_worker_does(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    own = JobQueue(admin, MODEL, prefix=prefix)
    jobs = [chat_job() for _ in range(6)]
    for job in jobs:
        own.submit(job, JobTerms(priority="batch", finish_within_s=60))
    user = connected("team-worker" if prefix else "mixfleet-worker")
    queue = JobQueue(user, MODEL, QueueRules(ageing_s=0.001), prefix=prefix)
    registration = a_registration(user, prefix)
    assert registration.beat(state="idle", in_flight=0) is None
    assert queue.wait_for_jobs_or_word("w1", 0.1) == ""
    leases = [claimed.lease for claimed in queue.claim("w1", 6, "c1")]
    assert queue.renew("w1", leases) == set()
    flush = Flush(queue, "w1")
    flush.append(leases[0], chunk(1, 5))
    assert flush.send().outcomes == ("done",)
    assert delivered_tokens(user, leases[0].job_id, prefix=prefix) == (5,)
    assert queue.finish(leases[0], DONE, chunk(2, 6))
    assert queue.release([leases[1]]) == 1
    assert queue.isolate([leases[2]]) == 1
    [alone] = queue.claim("w1", 6, "c2")
    assert alone.alone
    end_all_leases(admin, MODEL) if not prefix else None
    queue.reap()
    registration.deregister()


def test_a_worker_cannot_empty_the_server(admin: Redis, connected: Callable[[str], Redis]) -> None:
    user = connected("mixfleet-worker")
    for call in (
        lambda: user.flushall(),
        lambda: user.keys("*"),
        lambda: user.config_set("maxmemory", 1),
        lambda: user.acl_list(),
        lambda: user.client_kill_filter(_type="normal"),
        lambda: user.set("elsewhere", 1),
    ):
        assert refused(call)
    assert admin.ping()


def test_a_gateway_looks_after_the_queue_and_claims_nothing(
    admin: Redis, connected: Callable[[str], Redis]
) -> None:
    user = connected("mixfleet-gateway")
    own, queue = JobQueue(admin, MODEL), JobQueue(user, MODEL)
    a_registration(admin).beat(state="idle", in_flight=0)
    for _ in range(3):
        queue.submit(chat_job())
    first, second = own.claim("w1", 2, "c1")
    queue.cancel(first.lease.job_id)
    end_all_leases(admin)
    assert queue.reap().requeued == (second.lease.job_id,)
    [status] = model_statuses(user)
    assert (status.num_queued, status.num_workers) == (2, 1)
    own.finish(own.claim("w1", 1, "c2")[0].lease, DONE)
    assert refused(lambda: queue.claim("w9", 1, "c3"))
    assert refused(lambda: user.flushall())
    assert refused(lambda: user.keys("*"))
    assert admin.exists(CHANNEL(first.lease.job_id))


def test_a_gateway_gives_orders_and_takes_them_back(
    admin: Redis, connected: Callable[[str], Redis]
) -> None:
    user = connected("mixfleet-gateway")
    registration = a_registration(admin)
    registration.beat(state="idle", in_flight=0)
    give_order(user, "w1", "pause")
    assert registration.beat(state="idle", in_flight=0) == "pause"
    withdraw_order(user, "w1")
    assert registration.beat(state="paused", in_flight=0) is None


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_gateway_knows_and_charges_keys_and_makes_none(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    user = connected("team-gateway" if prefix else "mixfleet-gateway")
    own, keys = ApiKeys(admin, prefix=prefix), ApiKeys(user, prefix=prefix)
    limits = KeyLimits(user, prefix=prefix)
    assert not any_keys(user, prefix=prefix)
    record, secret = own.create(KeyTerms(name="x", limits=EVERY_LIMIT))
    assert any_keys(user, prefix=prefix)
    assert keys.find(secret) == record
    admission = limits.admit(record, ["a"], 10)
    with pytest.raises(RateLimitedError, match="unfinished jobs"):
        limits.admit(record, ["b"], 10)
    assert limits.refund(record, admission) == 1
    limits.admit(record, ["c"], 10)
    assert limits.settle(record, {"c": 5}) == 1
    sessions = KeySessions(user, prefix=prefix)
    assert sessions.find(sessions.open(secret)) == record
    for call in (
        lambda: keys.create(KeyTerms(name="y")),
        lambda: keys.rotate(record.key_id),
        lambda: keys.revoke(record.key_id),
        lambda: keys.change(record, replace(record, name="z")),
        lambda: user.hset(API_KEY(record.key_id, prefix=prefix), "scopes", "admin"),
        lambda: user.set(API_SECRET("0" * 64, prefix=prefix), record.key_id),
        lambda: keys.all(),
    ):
        assert refused(call)
    assert own.all() == [record]


@pytest.mark.parametrize("name", ["client", "worker"])
def test_clients_and_workers_see_nothing_of_keys(
    admin: Redis, connected: Callable[[str], Redis], name: str
) -> None:
    user = connected(f"mixfleet-{name}")
    own, keys, limits = ApiKeys(admin), ApiKeys(user), KeyLimits(user)
    record, secret = own.create(KeyTerms(name="x", limits=EVERY_LIMIT))
    KeyLimits(admin).admit(record, ["a"], 10)
    session = KeySessions(admin).open(secret)
    before = admin.dbsize()
    for call in (
        lambda: keys.find(secret),
        lambda: KeySessions(user).open(secret),
        lambda: KeySessions(user).find(session),
        lambda: keys.all(),
        lambda: any_keys(user),
        lambda: keys.create(KeyTerms(name="y")),
        lambda: keys.revoke(record.key_id),
        lambda: limits.states(record),
        lambda: limits.settle(record, {"a": 0}),
        lambda: user.get(API_CHARGE("a")),
        lambda: user.delete(API_USE(record.key_id)),
        lambda: user.zrange(API_JOBS(record.key_id), 0, -1),
    ):
        assert refused(call)
    assert admin.dbsize() == before


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_gateway_keeps_responses_and_nobody_else_sees_them(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    assert admin.ping()
    team = "team-" if prefix else "mixfleet-"
    record = StoredResponse(
        job_id="j1", tenant="t", created_at=1, request={"model": MODEL}, items=[]
    )
    gateway = connected(f"{team}gateway")
    create_response(gateway, record, 60, prefix=prefix)
    assert end_response(gateway, record, {}, 60, 60, prefix=prefix)
    for name in ("client", "worker", "keys"):
        user = connected(f"{team}{name}")
        assert refused(partial(find_response, user, "j1", prefix=prefix))
        assert refused(partial(delete_response, user, "j1", 60, prefix=prefix))
    assert delete_response(gateway, "j1", 60, prefix=prefix)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_gateway_drives_batches_and_nobody_else_sees_them(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    assert admin.ping()
    team = "team-" if prefix else "mixfleet-"
    user = connected(f"{team}gateway")
    files, batches = FileStore(user, prefix=prefix), BatchStore(user, prefix=prefix)
    file_id, gone = new_file_id(), f"batch_{'b' * 32}"
    files.upload(file_id, b"x\n")
    files.add(file_id, "t", {"filename": "x", "purpose": "batch"}, ttl_s=9, max_bytes=9)
    new = NewBatch(
        batch_id=f"batch_{'a' * 32}",
        tenant="t",
        key_id="",
        endpoint="/v1/completions",
        input_file=file_id,
        window="9s",
        window_s=9,
        ttl_s=9,
        in_flight=1,
        metadata={},
    )
    assert batches.open(new) == "opened"
    admin.zadd(BATCHES_OPEN(prefix=prefix), {gone: 0})
    assert batches.lease(gone, "token", 9) is None
    assert batches.lease(new.batch_id, "token", 9)
    batches.let_go(new.batch_id, "token")
    assert batches.open_ids() == [new.batch_id]
    assert batches.lease(new.batch_id, "token", 9)
    assert batches.append(new.batch_id, "token", [Result(place=0, is_error=False, line=b"x")])
    assert batches.done(new.batch_id)
    assert batches.move(new.batch_id, "token", "completed") == "completed"
    [batch] = batches.own("t")
    assert [file.file_id for file in files.own("t")].count(batch.output_file) == 1
    assert files.read(batch.output_file, 0, 9) == b"x"
    for name in ("client", "worker", "keys"):
        other = connected(f"{team}{name}")
        assert refused(partial(BatchStore(other, prefix=prefix).find, new.batch_id))
        assert refused(partial(FileStore(other, prefix=prefix).read, file_id, 0, 9))
        assert refused(partial(FileStore(other, prefix=prefix).delete, file_id))
    assert files.delete(file_id)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_who_keeps_the_keys_needs_no_other_right(
    admin: Redis, connected: Callable[[str], Redis], prefix: str
) -> None:
    user = connected("team-keys" if prefix else "mixfleet-keys")
    keys = ApiKeys(user, prefix=prefix)
    record, _ = keys.create(KeyTerms(name="x", limits=EVERY_LIMIT), life_s=60.0)
    secret = keys.rotate(record.key_id, 60.0)
    assert ApiKeys(admin, prefix=prefix).find(secret)
    changed = keys.change(record, replace(record, name="y"), for_ever=True)
    KeyLimits(admin, prefix=prefix).admit(record, ["a"], 10)
    used = KeyLimits(user, prefix=prefix).states(record)
    assert [state.remaining for state in used] == [9, 90, 90, 0]
    assert keys.all()[0].name == changed.name == "y"
    JobQueue(admin, MODEL, prefix=prefix).submit(chat_job(job_id="a"))
    for call in (
        lambda: KeyLimits(user, prefix=prefix).admit(record, ["b"], 1),
        lambda: user.hgetall(JOB("a", prefix=prefix)),
        lambda: JobQueue(user, MODEL, prefix=prefix).cancel("a"),
        lambda: user.keys("*"),
    ):
        assert refused(call)
    keys.revoke(record.key_id)
    keys.revoke(record.key_id, forget=True)
    assert keys.all() == []


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("asker", ["client", "gateway"])
def test_clients_and_gateways_ask_and_workers_answer(
    admin: Redis, connected: Callable[[str], Redis], prefix: str, asker: str
) -> None:
    team = "team" if prefix else "mixfleet"
    a_registration(admin, prefix).beat(state="busy", in_flight=1)
    box = InquiryBox(connected(f"{team}-worker"), MODEL, prefix=prefix)
    answer = InquiryAnswer(num_tokens=1, context_length=64, max_answer_tokens=63)

    def work() -> None:
        inquiry = box.wait(10.0)
        if inquiry is not None:
            box.give(inquiry.inquiry_id, encode_answer(answer))

    thread = threading.Thread(target=work)
    thread.start()
    user = connected(f"{team}-{asker}")
    assert ask(user, MODEL, TokenizeText(text="x"), prefix=prefix) == answer
    thread.join()
    assert refused(lambda: InquiryBox(user, MODEL, prefix=prefix).wait(0.1))


def test_every_role_has_a_user() -> None:
    assert [line.split()[1] for line in acl_lines()] == [f"mixfleet-{role.name}" for role in ROLES]
