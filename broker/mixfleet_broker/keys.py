"""Every key in Redis: its name, type, writer and lifetime. Names are made here and nowhere else.

Keys that start with ``rq:`` are rq's own layout, so that its tools see and feed the queue; keys
that start with ``mixfleet:`` are ours. The scripts get the same names: :func:`lua_key_table`
writes them as Lua. On a server that is shared with others a prefix stands before all of them.

The fields of a job's hash are rq's own and ours, which start with ``mf_``: ``mf_request`` (the
message, msgpack), ``mf_sum`` (its SHA-256), ``mf_bytes`` (of its prompt), ``mf_max`` (most
tokens of its answer, 0 where it says none), ``mf_tenant``,
``mf_class``, ``mf_cost`` and ``mf_answer`` (tokens expected in all and of the answer), ``mf_score``
(its place in the order), ``mf_place`` (its number in rq's list while it waits), ``mf_at``,
``mf_start_by`` and ``mf_end_by`` (submit and deadlines, ms of Redis's clock), ``mf_keep`` (s for
which its end is kept at least, with its stored response), ``mf_attended``
(1 if it ends with its reader, 2 if that one was missed once), ``mf_token`` (of the run that holds
it, or that ended it), ``mf_solo`` (1 if that run is alone on its worker), ``mf_attempt``,
``mf_losses``, ``mf_history`` (runs that did not end it, msgpack), and ``mf_reason`` and
``mf_message`` (of its end).
"""

import re
from dataclasses import dataclass
from typing import Final

_FIELD: Final = re.compile(r"\{(\w+)\}")
PREFIX: Final = re.compile(r"[A-Za-z0-9_.:{}-]{0,64}")
"""What may stand before all keys: what rq 3 takes for ``RQ_KEY_PREFIX``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One kind of key."""

    name: str
    """What the scripts call it."""
    template: str
    """The key with ``{field}`` where a name goes."""
    type: str
    """Redis's own word."""
    writers: str
    """Who changes it, by script or module."""
    lifetime: str
    """When it goes away."""
    meaning: str

    def __call__(self, *names: str, prefix: str = "") -> str:
        """Return the key with its fields filled in, in order, behind the server's prefix."""
        if len(names) != self.num_fields:
            raise TypeError(f"key {self.name} takes {self.num_fields} names, got {len(names)}")
        parts = iter(names)
        return prefix + _FIELD.sub(lambda _: next(parts), self.template)

    @property
    def num_fields(self) -> int:
        """How many names the key is made of."""
        return len(_FIELD.findall(self.template))


# rq's keys of one queue

QUEUES: Final = Key(
    name="queues",
    template="rq:queues",
    type="set",
    writers="submit; rq producers",
    lifetime="for ever, one member per model",
    meaning="the queues that rq's tools list",
)
QUEUE: Final = Key(
    name="queue",
    template="rq:queue:{model}",
    type="list",
    writers="submit, claim, reap, cancel; rq producers",
    lifetime="while a job is queued",
    meaning="mirror of who waits for rq's tools, and the inbox of rq producers; its length is the "
    "queue's depth",
)
WIP: Final = Key(
    name="wip",
    template="rq:wip:{model}",
    type="zset",
    writers="claim, renew, finish, reap, cancel",
    lifetime="while a job is started",
    meaning="started jobs for rq's tools, far in the future, so that their own clean-up "
    "never touches a job of ours",
)
FINISHED: Final = Key(
    name="finished",
    template="rq:finished:{model}",
    type="zset",
    writers="finish; trimmed by reap and by rq's tools",
    lifetime="a member expires with its job",
    meaning="finished jobs, by the time at which they expire",
)
FAILED: Final = Key(
    name="failed",
    template="rq:failed:{model}",
    type="zset",
    writers="finish, reap; trimmed by reap and by rq's tools",
    lifetime="a member expires with its job",
    meaning="failed jobs, which an operator may requeue with rq's tools",
)
CANCELED: Final = Key(
    name="canceled",
    template="rq:canceled:{model}",
    type="zset",
    writers="cancel; rq's Job.cancel; trimmed by reap",
    lifetime="a member expires with its job",
    meaning="cancelled jobs, by the time at which they expire",
)
SUSPENDED: Final = Key(
    name="suspended",
    template="rq:suspended",
    type="string",
    writers="`rq suspend`, `rq resume`",
    lifetime="as the operator says",
    meaning="while it exists nothing is claimed",
)

# rq's keys of one job and of one worker

JOB: Final = Key(
    name="job",
    template="rq:job:{job_id}",
    type="hash",
    writers="submit, claim, renew, finish, reap, cancel; rq producers",
    lifetime="none while queued or started; then the result's, 1 day failed, 300 s cancelled",
    meaning="the job: rq's fields, and ours with the prefix mf_",
)
RESULTS: Final = Key(
    name="results",
    template="rq:results:{job_id}",
    type="stream",
    writers="finish, reap",
    lifetime="as the job's hash",
    meaning="outcome for rq's tools: why a job failed, and the answer of a job from an rq producer",
)
EXECUTION: Final = Key(
    name="execution",
    template="rq:execution:{job_id}:{token}",
    type="hash",
    writers="claim, renew, finish, reap, cancel",
    lifetime="2 h after the last renewal",
    meaning="one run, for rq's tools",
)
EXECUTIONS: Final = Key(
    name="executions",
    template="rq:executions:{job_id}",
    type="zset",
    writers="claim, renew, finish, reap, cancel",
    lifetime="2 h after the last renewal",
    meaning="runs of one job, for rq's tools",
)
WORKER_EXECUTIONS: Final = Key(
    name="worker_executions",
    template="rq:worker:{worker_id}:executions",
    type="set",
    writers="claim, renew, finish, reap, cancel",
    lifetime="2 h after the last renewal",
    meaning="what a worker runs, for rq's tools",
)
RQ_WORKER: Final = Key(
    name="rq_worker",
    template="rq:worker:{worker_id}",
    type="hash",
    writers="registry; finish counts its jobs",
    lifetime="some beats of the worker's heart",
    meaning="the worker for rq's tools",
)
RQ_WORKERS: Final = Key(
    name="rq_workers",
    template="rq:workers",
    type="set",
    writers="registry; rq's tools",
    lifetime="a member goes with its worker",
    meaning="all workers, for rq's tools",
)
RQ_QUEUE_WORKERS: Final = Key(
    name="rq_queue_workers",
    template="rq:workers:{model}",
    type="set",
    writers="registry; rq's tools",
    lifetime="a member goes with its worker",
    meaning="workers of one queue, for rq's tools",
)

# Our own

READY: Final = Key(
    name="ready",
    template="mixfleet:ready:{model}",
    type="zset",
    writers="submit, claim, reap, cancel, requeue",
    lifetime="while a job is queued",
    meaning="the true order of queued jobs: class * 1e12 + the fair queue's tag",
)
SUSPECTS: Final = Key(
    name="suspects",
    template="mixfleet:suspects:{model}",
    type="zset",
    writers="reap, claim, cancel",
    lifetime="while a job is queued",
    meaning="queued jobs to be run alone, as each may have killed workers; by ms since when",
)
QUARANTINE: Final = Key(
    name="quarantine",
    template="mixfleet:quarantine:{model}",
    type="string",
    writers="claim",
    lifetime="2 leases",
    meaning="the worker that takes no more jobs until it has none, to run a suspect",
)
WAITING: Final = Key(
    name="waiting",
    template="mixfleet:waiting:{model}",
    type="hash",
    writers="submit, claim, reap, cancel, requeue",
    lifetime="a field as long as its job is queued",
    meaning="every queued job: class, tokens expected, of them of the answer, tenant",
)
LOADS: Final = Key(
    name="loads",
    template="mixfleet:loads:{model}",
    type="hash",
    writers="submit, claim, reap, cancel, requeue",
    lifetime="a field as long as it is above 0",
    meaning="sums over waiting: tokens, answers, and jobs:<tenant>, tokens:<tenant>",
)
TAGS: Final = Key(
    name="tags",
    template="mixfleet:tags:{model}:{klass}",
    type="zset",
    writers="submit, claim, finish, reap, requeue",
    lifetime="while a job is queued; a tenant that owes nothing is trimmed",
    meaning="the fair queue of one class: where each tenant's next job begins, and the virtual "
    "time under the empty name",
)
WEIGHTS: Final = Key(
    name="weights",
    template="mixfleet:weights",
    type="hash",
    writers="`mixfleet queue weight`",
    lifetime="for ever, as the operator says",
    meaning="shares of tenants that are not 1",
)
AGEING: Final = Key(
    name="ageing",
    template="mixfleet:ageing:{model}",
    type="zset",
    writers="submit, claim, reap, cancel",
    lifetime="while a job is queued",
    meaning="queued jobs by the ms at which they move up a class",
)
DEADLINES: Final = Key(
    name="deadlines",
    template="mixfleet:deadlines:{model}",
    type="zset",
    writers="submit, claim, finish, reap, cancel",
    lifetime="until the job has ended",
    meaning="jobs by the ms at which their time is over",
)
RATES: Final = Key(
    name="rates",
    template="mixfleet:rates:{model}",
    type="hash",
    writers="finish",
    lifetime="7 days after the last finished job",
    meaning="means over finished jobs: service_ms, answer_tokens, expected_tokens (of its "
    "answer, as one of its kind is foreseen), bytes_per_token; and their number, samples",
)
CAPACITY: Final = Key(
    name="capacity",
    template="mixfleet:capacity:{model}",
    type="hash",
    writers="beat; trimmed by reap",
    lifetime="1 day after the last beat",
    meaning="by worker: the jobs that it takes at once, and the ms until which it counts as alive",
)
LIST_BASE: Final = Key(
    name="list_base",
    template="mixfleet:list_base:{model}",
    type="string",
    writers="submit, claim, reap, cancel, requeue",
    lifetime="while a job is queued",
    meaning="the number of the head of rq's list, see scripts/parts/mirror.lua",
)
UNLISTED: Final = Key(
    name="unlisted",
    template="mixfleet:unlisted:{model}",
    type="set",
    writers="cancel; swept by claim and reap",
    lifetime="until somebody who may has swept it",
    meaning="cancelled jobs that are still in rq's list: their client may not touch it",
)
LEASES: Final = Key(
    name="leases",
    template="mixfleet:leases:{model}",
    type="zset",
    writers="claim, renew, finish, reap, cancel",
    lifetime="while a job is started",
    meaning="the true leases: member job_id:token, score the deadline in ms of Redis's clock",
)
CLAIM: Final = Key(
    name="claim",
    template="mixfleet:claim:{model}:{worker_id}:{claim_token}",
    type="list",
    writers="claim",
    lifetime="2 leases",
    meaning="what one claim gave, so that its repetition gives the same",
)
CHANNEL: Final = Key(
    name="channel",
    template="mixfleet:channel:{job_id}",
    type="stream",
    writers="claim, append, finish, reap, cancel",
    lifetime="2 h after the last renewal; after the end the result's",
    meaning="the answer: entries k (a: run started, t: tokens, q: queued again, e: end) and d "
    "(msgpack), ids <run>-<tokens so far>",
)
BELL: Final = Key(
    name="bell",
    template="mixfleet:bell:{model}",
    type="list",
    writers="submit, claim, reap; popped by waiting workers",
    lifetime="1 h after the last ring; at most 64 elements",
    meaning="wakes idle workers; a lost ring costs a moment, never a job",
)
READER_BELL: Final = Key(
    name="reader_bell",
    template="mixfleet:reader_bell:{gateway_id}",
    type="stream",
    writers="the gateway itself; read by its readers of channels",
    lifetime="1 h after the last ring",
    meaning="tells a reader of many channels that its list of channels has changed",
)
READER: Final = Key(
    name="reader",
    template="mixfleet:reader:{job_id}",
    type="string",
    writers="submit; the reader renews it (attendance.py)",
    lifetime="30 s after the reader's last sign of life; goes with the job's end",
    meaning="somebody reads the answer of a job that is to end with its reader",
)
ORDER: Final = Key(
    name="order",
    template="mixfleet:order:{worker_id}",
    type="string",
    writers="`mixfleet worker pause|drain|resume`; beat renews it",
    lifetime="as long as its worker",
    meaning="what an operator told a worker to do: pause or drain; it claims nothing meanwhile",
)
CONTROL: Final = Key(
    name="control",
    template="mixfleet:control:{worker_id}",
    type="list",
    writers="cancel, reap, claim, orders.py; popped by the worker at each step",
    lifetime="60 s after the last word",
    meaning="words for a worker: c:<job>:<token> a run is not its own any more, o: read your order",
)
INQUIRIES: Final = Key(
    name="inquiries",
    template="mixfleet:inquiries:{model}",
    type="list",
    writers="ask; popped by workers",
    lifetime="30 s after the last question; at most 64 elements",
    meaning="small questions to any worker of the model: deadline (13 digits, ms), id (32 hex "
    "digits), body (msgpack)",
)
INQUIRY_ANSWER: Final = Key(
    name="inquiry_answer",
    template="mixfleet:answer:{inquiry_id}",
    type="list",
    writers="the worker that answers; popped by who asked",
    lifetime="30 s",
    meaning="the answer to one question (msgpack)",
)
WORKER: Final = Key(
    name="worker",
    template="mixfleet:worker:{worker_id}",
    type="hash",
    writers="registry",
    lifetime="some beats of the worker's heart",
    meaning="what a worker says of itself",
)
WORKERS: Final = Key(
    name="workers",
    template="mixfleet:workers",
    type="zset",
    writers="registry",
    lifetime="a member is trimmed when its worker has long been silent",
    meaning="worker ids by the time of their last beat",
)
MODELS: Final = Key(
    name="models",
    template="mixfleet:models",
    type="zset",
    writers="registry",
    lifetime="a member is trimmed when its model has long not been served",
    meaning="models by the time at which they were last served",
)

# API keys, for gateways

API_KEYS: Final = Key(
    name="api_keys",
    template="mixfleet:api_keys",
    type="zset",
    writers="key_create, key_revoke",
    lifetime="a member is forgotten with its key, by `mixfleet key revoke --forget`",
    meaning="ids of all API keys, revoked ones too, by the ms of their making; as long as it "
    "exists a gateway asks for keys",
)
API_KEY: Final = Key(
    name="api_key",
    template="mixfleet:api_key:{key_id}",
    type="hash",
    writers="key_create, key_change, key_rotate, key_revoke",
    lifetime="until `mixfleet key revoke --forget`",
    meaning="one API key: the digest of its secret, its terms and limits",
)
API_SECRET: Final = Key(
    name="api_secret",
    template="mixfleet:api_secret:{digest}",
    type="string",
    writers="key_create, key_rotate, key_revoke",
    lifetime="until its key is revoked or rotated, or the grace time of that is over",
    meaning="the id of the API key whose secret has this SHA-256",
)
API_USE: Final = Key(
    name="api_use",
    template="mixfleet:api_use:{key_id}",
    type="hash",
    writers="admit, settle",
    lifetime="2 days after the last request",
    meaning="what an API key has used: requests and tokens (of the minute: level and ms of it, in "
    "1/60000), day and day_tokens (UTC), swept (ms)",
)
API_JOBS: Final = Key(
    name="api_jobs",
    template="mixfleet:api_jobs:{key_id}",
    type="zset",
    writers="admit, settle",
    lifetime="31 days after the last request; swept by admit where the limit is reached",
    meaning="unfinished jobs of an API key that has a limit of them, by the ms of their admission",
)
API_CHARGE: Final = Key(
    name="api_charge",
    template="mixfleet:api_charge:{job_id}",
    type="string",
    writers="admit, settle",
    lifetime="until it is settled, at most until nothing of it could be given back",
    meaning="what a job was charged: key id, tokens, day, ms, level of the minute's tokens with "
    "it, and that of its requests if the request was charged with it",
)
AIME_SESSION: Final = Key(
    name="aime_session",
    template="mixfleet:aime_session:{digest}",
    type="string",
    writers="key_sessions.py, at a login of AIME's clients",
    lifetime="1 day; it opens nothing once its API key opens nothing",
    meaning="the SHA-256 of the secret that logged in, by that of the session's own key",
)

# Stored responses, for gateways

RESPONSE: Final = Key(
    name="response",
    template="mixfleet:response:{job_id}",
    type="string",
    writers="responses_store.py; its lifetime also submit, requeue and who ends the job",
    lifetime="MIXFLEET_RESPONSE_TTL_S after the end of its job, however long that one waits",
    meaning="a response of `/v1/responses` (JSON): v, tenant, created_at, request (what the "
    "response repeats of it), items (its input) and final (the response, once it has ended)",
)

# Files and batches, for gateways

FILE: Final = Key(
    name="file",
    template="mixfleet:file:{file_id}",
    type="hash",
    writers="file_add, file_delete, batch_open, batch_move",
    lifetime="MIXFLEET_BATCH_TTL_S after its upload, or after the end of its batch",
    meaning="a file of `/v1/files`: tenant, filename, purpose, batch (whose output it is), "
    "created_ms and expires_ms",
)
FILE_CONTENT: Final = Key(
    name="file_content",
    template="mixfleet:file_content:{file_id}",
    type="string",
    writers="file_store.py during an upload, batch_append; file_delete",
    lifetime="as its file; 1 h while it is uploaded",
    meaning="the bytes of a file",
)
OWN_FILES: Final = Key(
    name="own_files",
    template="mixfleet:own_files:{tenant}",
    type="zset",
    writers="file_add, file_delete, batch_open",
    lifetime="as the file that was added last; what is gone is trimmed at the next",
    meaning="ids of a tenant's files by the ms of their making",
)
BATCH: Final = Key(
    name="batch",
    template="mixfleet:batch:{batch_id}",
    type="hash",
    writers="batch_open, batch_lease, batch_append, batch_move",
    lifetime="MIXFLEET_BATCH_TTL_S after its end; an open one as much longer as its window is",
    meaning="a batch: its terms, status, counts, the ms of each status, and lease (the token of "
    "the gateway that drives it)",
)
BATCH_DONE: Final = Key(
    name="batch_done",
    template="mixfleet:batch_done:{batch_id}",
    type="string",
    writers="batch_append, batch_move",
    lifetime="until the batch has ended, at most as long as its record",
    meaning="a bit for each line of a batch: whether its result is in one of the files",
)
OWN_BATCHES: Final = Key(
    name="own_batches",
    template="mixfleet:own_batches:{tenant}",
    type="zset",
    writers="batch_open",
    lifetime="as the batch that was added last; what is gone is trimmed at the next",
    meaning="ids of a tenant's batches by the ms of their making",
)
BATCHES_OPEN: Final = Key(
    name="batches_open",
    template="mixfleet:batches_open",
    type="zset",
    writers="batch_open, batch_lease, batch_move",
    lifetime="a member goes with the end of its batch",
    meaning="batches that have not ended, by the ms until which a gateway drives each; 0: none "
    "does",
)

KEYS: Final[tuple[Key, ...]] = (
    QUEUES,
    QUEUE,
    WIP,
    FINISHED,
    FAILED,
    CANCELED,
    SUSPENDED,
    JOB,
    RESULTS,
    EXECUTION,
    EXECUTIONS,
    WORKER_EXECUTIONS,
    RQ_WORKER,
    RQ_WORKERS,
    RQ_QUEUE_WORKERS,
    READY,
    SUSPECTS,
    QUARANTINE,
    WAITING,
    LOADS,
    TAGS,
    WEIGHTS,
    AGEING,
    DEADLINES,
    RATES,
    CAPACITY,
    LIST_BASE,
    UNLISTED,
    LEASES,
    CLAIM,
    CHANNEL,
    BELL,
    READER_BELL,
    READER,
    ORDER,
    CONTROL,
    INQUIRIES,
    INQUIRY_ANSWER,
    WORKER,
    WORKERS,
    MODELS,
    API_KEYS,
    API_KEY,
    API_SECRET,
    API_USE,
    API_JOBS,
    API_CHARGE,
    RESPONSE,
    AIME_SESSION,
    FILE,
    FILE_CONTENT,
    OWN_FILES,
    BATCH,
    BATCH_DONE,
    OWN_BATCHES,
    BATCHES_OPEN,
)


def lua_key_table(prefix: str = "") -> str:
    """Return Lua source that defines ``key``, a table with one function per kind of key."""
    lines = ["local key = {}"]
    for key in KEYS:
        fields = _FIELD.findall(key.template)
        pieces = _FIELD.split(key.template)
        pieces[0] = prefix + pieces[0]
        # re.split puts the field names at the odd places.
        names = (p if i % 2 else f"'{p}'" for i, p in enumerate(pieces) if p)
        lines.append(f"function key.{key.name}({', '.join(fields)}) return {'..'.join(names)} end")
    return "\n".join(lines) + "\n"
