"""A client that speaks as AIME's Python client does, written from what that sends and expects.

It logs in with GET, submits with POST and JSON, polls with GET and the key in the query, takes any
status but 200 as the end, and reads exactly the fields that AIME's reads.
"""

import time
from collections.abc import Iterator
from typing import Any

import requests

TIMEOUT_S = 30.0
POLL_S = 0.02
"""AIME's waits 0.3 s."""
VERSION = "Python AIME API Client Interface 0.8.9"


class AimeError(Exception):
    """AIME's client raises ConnectionError or BrokenPipeError with the status and the body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


class AimeClient:
    """One user of one endpoint.

    Args:
        server: URL of the gateway.
        endpoint: Its name.
        key: API key; None sends JSON null, as theirs does.
    """

    def __init__(self, server: str, endpoint: str, key: str | None = None) -> None:
        self.server = server
        self.endpoint = endpoint
        self.key = key
        self.session_key: str | None = None
        self._http = requests.Session()
        self._http.trust_env = False

    def login(self, user: str = "aime") -> str:
        query = {"version": VERSION, "user": user, "key": self.key}
        answer = self.get(f"/{self.endpoint}/login", **query)
        assert answer["success"] is True
        key: str = answer["client_session_auth_key"]
        self.session_key = key
        return key

    def request(self, **params: Any) -> dict[str, Any]:
        """Submit and wait in one call."""
        return self.post(f"/{self.endpoint}", **self._keys(), wait_for_result=True, **params)

    def submit(self, **params: Any) -> str:
        answer = self.post(f"/{self.endpoint}", **self._keys(), wait_for_result=False, **params)
        assert answer["success"] is True
        job_id: str = answer["job_id"]
        return job_id

    def poll(self, job_id: str) -> dict[str, Any]:
        keys = {name: key for name, key in self._keys().items() if key is not None}
        return self.get(f"/{self.endpoint}/progress", **keys, job_id=job_id)

    def generate(self, **params: Any) -> Iterator[dict[str, Any]]:
        """Submit, and yield what AIME's generator yields, to the result."""
        job_id = self.submit(**params)
        yield {"job_id": job_id, "success": True, "job_state": "started"}
        while True:
            answer = self.poll(job_id)
            head = {name: answer[name] for name in ("job_id", "success", "job_state")}
            if answer["job_state"] == "done":
                yield {**head, "progress": 100, "result_data": answer["job_result"]}
                return
            progress = answer["progress"]
            shown = ("progress", "queue_position", "estimate", "progress_data")
            yield {**head, **{name: progress[name] for name in shown}}
            time.sleep(POLL_S)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return _read(self._http.get(self.server + path, params=query, timeout=TIMEOUT_S))

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        return _read(self._http.post(self.server + path, json=body, timeout=TIMEOUT_S))

    def _keys(self) -> dict[str, str | None]:
        if self.session_key is not None:
            return {"client_session_auth_key": self.session_key}
        return {"key": self.key}


def _read(response: requests.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    if response.status_code != 200:
        raise AimeError(response.status_code, body)
    return body
