"""rq-dashboard, as it is, shows the queue."""

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.queue import JobQueue
from support.queue_jobs import DONE, MODEL, chat_job, submit_and_claim

rq_dashboard = pytest.importorskip("rq_dashboard")
flask = pytest.importorskip("flask")


@pytest.fixture
def page(redis_url: str) -> Iterator[Any]:
    app = flask.Flask("dashboard")
    app.config.from_object(rq_dashboard.default_settings)
    app.config["RQ_DASHBOARD_REDIS_URL"] = redis_url
    rq_dashboard.web.setup_rq_connection(app)
    app.register_blueprint(rq_dashboard.blueprint, url_prefix="")
    with app.test_client() as client:
        yield client
    app.redis_conn.close()


def test_it_lists_the_queue_with_its_counts(redis: Redis, page: Any) -> None:
    queue = JobQueue(redis, MODEL)
    queue.finish(submit_and_claim(queue).lease, DONE)
    queue.finish(submit_and_claim(queue).lease, JobEnd(state="failed", code="x", message="boom"))
    submit_and_claim(queue)
    queue.submit(chat_job())
    queue.cancel(submit_and_claim(queue).lease.job_id)
    assert page.get("/0/view/queues", follow_redirects=True).status_code == 200
    [shown] = page.get("/0/data/queues.json").json["queues"]
    assert shown["name"] == MODEL
    counts = {
        name: shown[f"{name}_job_registry_count"]
        for name in ("failed", "started", "finished", "canceled")
    }
    assert counts == {"failed": 1, "started": 1, "finished": 1, "canceled": 1}
    assert shown["count"] == 1


@pytest.mark.parametrize("registry", ["queued", "started", "finished", "failed", "canceled"])
def test_it_lists_the_jobs_of_each_registry_without_their_prompts(
    redis: Redis, page: Any, registry: str
) -> None:
    queue = JobQueue(redis, MODEL)
    job = chat_job("the secret question")
    queue.submit(job)
    if registry in ("started", "finished", "failed"):
        [claimed] = queue.claim("w1", 1, "c1")
        failure = JobEnd(state="failed", code="engine_failed", message="boom")
        if registry != "started":
            queue.finish(claimed.lease, DONE if registry == "finished" else failure)
    elif registry == "canceled":
        queue.cancel(job.job_id)
    answer = page.get(f"/0/data/jobs/{MODEL}/{registry}/8/asc/1.json")
    [shown] = answer.json["jobs"]
    assert (shown["id"], shown["description"]) == (job.job_id, "chat")
    assert "secret" not in answer.text
    assert ("boom" in answer.text) == (registry == "failed")


def test_it_shows_one_job(redis: Redis, page: Any) -> None:
    job = chat_job("the secret question")
    JobQueue(redis, MODEL).submit(job)
    answer = page.get(f"/0/data/job/{job.job_id}.json")
    assert answer.status_code == 200
    assert answer.json["status"] == "queued"
    assert "secret" not in answer.text
    assert page.get(f"/0/view/job/{job.job_id}").status_code == 200
