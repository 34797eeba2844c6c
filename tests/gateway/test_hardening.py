"""What no client sends: the gateway answers it in its own words, and lives."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.core.result import Ok

from mixfleet_broker.keys import CHANNEL
from support import hurried_gateway
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL
from support.raw_http import exchange, post, read_all
from support.redis_server import ALWAYS, RedisServer
from support.worker_process import until

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
REQUEST_S = 1.0
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """One gateway for all attacks, with a worker behind it; both must be well at the end."""
    directory = tmp_path_factory.mktemp("gateway")
    with (
        RedisServer() as server,
        EchoWorker(server.url) as worker,
        GatewayProcess(server.url, directory, "--log-level", "warning") as process,
    ):
        yield process
        answer = ask(process, json.dumps(BODY).encode())
        assert answer.json()["choices"][0]["message"]["content"] == "hi"
        assert worker.lost == []
        assert "request_failed" not in process.log
        assert "Traceback" not in process.log


def ask(gateway: GatewayProcess, body: bytes, path: str = CHAT) -> httpx2.Response:
    with gateway.client() as client:
        return client.post(path, content=body, headers={"content-type": "application/json"})


def check_error(value: Any) -> dict[str, Any]:
    """Return the error in a body of OpenAI's shape."""
    error: dict[str, Any] = value["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


def check_error_of(path: str, value: Any) -> None:
    """Check that a body is an error as the clients of a path read it."""
    if path.startswith("/v1/messages"):
        assert set(value) == {"type", "error", "request_id"}
        assert value["type"] == "error"
        assert set(value["error"]) - {"details"} == {"type", "message"}
    else:
        check_error(value)


def refusal(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"].startswith("application/json")
    return check_error(answer.json())


def is_proper(answer: httpx2.Response) -> None:
    """Whatever was asked, the answer is one, or an error that is not our fault."""
    assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text[:500]
    if answer.status_code >= 400:
        refusal(answer, answer.status_code)


def body_with(**more: Any) -> bytes:
    return json.dumps({**BODY, **more}).encode()


# Texts as JSON writes them, with half surrogate pairs among them.
json_texts = st.text(st.characters(), max_size=8) | st.just("\ud800") | st.just("a\udfff")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | json_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_texts, inner, max_size=4),
    max_leaves=10,
)
FIELDS = [
    *("model", "messages", "stream", "stream_options", "n", "temperature", "top_p", "top_k"),
    *("logit_bias", "seed", "stop", "max_tokens", "service_tier", "user", "metadata", "tools"),
    *("tool_choice", "response_format", "logprobs", "top_logprobs", "max_completion_tokens"),
]


@pytest.mark.slow
@bounded
@given(st.dictionaries(st.sampled_from(FIELDS) | json_texts, json_values, max_size=4))
def test_any_values_in_any_fields_are_answered(
    gateway: GatewayProcess, more: dict[str, Any]
) -> None:
    is_proper(ask(gateway, body_with(**{"max_tokens": 4, **more})))


@pytest.mark.slow
@bounded
@given(json_values)
def test_any_json_for_a_body_is_answered(gateway: GatewayProcess, value: Any) -> None:
    is_proper(ask(gateway, json.dumps(value).encode()))


@pytest.mark.slow
@bounded
@given(st.binary(max_size=200))
def test_any_bytes_for_a_body_are_refused(gateway: GatewayProcess, body: bytes) -> None:
    is_proper(ask(gateway, body))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_nothing_that_the_published_schema_allows_or_forbids_breaks_it(
    gateway: GatewayProcess,
) -> None:
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    num_operations = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        num_operations += 1

        @settings(bounded, max_examples=25)
        @given(case=operation.as_strategy())
        def attack(case: Any) -> None:
            answer = case.call(timeout=15)
            assert answer.status_code < 500 or answer.status_code in (503, 504), answer.content
            is_health = case.path in ("/readyz", "/health")
            if answer.status_code >= 400 and not is_health and case.method != "HEAD":
                check_error_of(case.path, answer.json())

        attack()
    assert num_operations >= 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e308),
        ("max_tokens", 10**30),
        ("max_tokens", -1),
        ("max_tokens", 2**63),
        ("seed", 10**400),
        ("seed", -(2**64)),
        ("n", 10**9),
        ("logit_bias", {"9" * 400: 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": float("nan")}),
        ("top_logprobs", 2**40),
        ("stop", ["x"] * 100_000),
        ("messages", []),
        ("model", ""),
        ("model", "../../etc/passwd"),
        ("model", "x" * 100_000),
    ],
)
def test_numbers_and_names_without_measure_are_refused(
    gateway: GatewayProcess, field: str, value: Any
) -> None:
    answer = ask(gateway, body_with(**{field: value}))
    refusal(answer, 404 if field == "model" else 400)
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 10_000 + b"]" * 10_000, id="deep list"),
        pytest.param(
            body_with(annotations=0).replace(b"0", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
            id="deep map",
        ),
        pytest.param(body_with(user="X").replace(b"X", b"\xff\xfe"), id="bad UTF-8"),
        pytest.param(body_with(seed=0).replace(b"0", b"1" * 5000), id="number of 5,000 digits"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"null", id="null"),
        pytest.param(body_with()[:-1], id="cut off"),
        pytest.param(body_with() + b"{}", id="two bodies"),
    ],
)
def test_json_that_is_none_or_too_much_is_refused(gateway: GatewayProcess, body: bytes) -> None:
    error = refusal(ask(gateway, body))
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "a\ud800b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
        {"stop": ["\ud800"]},
        {"\ud800": 1},
        {"logit_bias": {"\ud800": 1}},
        {"tools": [{"type": "function", "function": {"name": "\ud800"}}]},
        {"tools": [{**TOOL, "\ud800": 1}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "\ud800"}}},
    ],
)
def test_half_a_surrogate_pair_is_refused(gateway: GatewayProcess, more: dict[str, Any]) -> None:
    refusal(ask(gateway, body_with(**more)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
def test_half_a_surrogate_pair_is_no_fault_of_ours(
    gateway: GatewayProcess, path: str, stream: bool
) -> None:
    more = {"stream": stream, "max_tokens": 4, "input": "hi"}
    names = ["input"] if path != "/v1/responses" else ["messages", "max_tokens"]
    body = {name: value for name, value in {**BODY, **more}.items() if name not in names}
    assert ask(gateway, json.dumps(body).encode(), path).status_code == 200
    for bad in ({"model": "\ud800"}, {"\ud800": 1}, {"stop": ["\ud800"]}):
        answer = ask(gateway, json.dumps({**body, **bad}).encode(), path)
        assert answer.status_code in (400, 404), answer.text
        check_error_of(path, answer.json())


def test_a_byte_order_mark_is_read_over(gateway: GatewayProcess) -> None:
    assert ask(gateway, b"\xef\xbb\xbf" + body_with()).status_code == 200


def test_a_deep_schema_of_a_tool_is_refused(gateway: GatewayProcess) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    refusal(ask(gateway, body_with(tools=tools)))


def test_of_a_key_given_twice_the_last_counts(gateway: GatewayProcess) -> None:
    body = b'{"messages": [], ' + body_with()[1:]
    assert ask(gateway, body).status_code == 200


def test_a_body_over_the_limit_is_refused_by_its_announced_length(gateway: GatewayProcess) -> None:
    error = refusal(ask(gateway, b" " * (5 << 20)), 413)
    assert error["code"] == "body_too_large"
    assert error["details"] == {"limit": 4 << 20}


def test_a_body_over_the_limit_is_refused_where_no_length_was_announced(
    gateway: GatewayProcess,
) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = exchange(gateway.port, head.encode(), *[piece] * 5, b"0\r\n\r\n")
    assert answer.status == 413
    assert check_error(json.loads(answer.body))["code"] == "body_too_large"


@pytest.mark.parametrize(
    "header",
    [b"x-long: " + b"x" * 100_000 + b"\r\n", b"x-many: " + b"y" * 90 + b"\r\n"],
    ids=["one", "many"],
)
def test_headers_of_100_kib_are_refused(gateway: GatewayProcess, header: bytes) -> None:
    num = 100_000 // len(header) + 1
    request = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + header * num + b"\r\n"
    for pieces in ([request], [request[i : i + 1000] for i in range(0, len(request), 1000)]):
        answer = exchange(gateway.port, *pieces)
        assert answer.statuses == [431]
        assert check_error(json.loads(answer.body))["code"] == "headers_too_large"


def test_a_long_url_is_refused(gateway: GatewayProcess) -> None:
    request = b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    assert exchange(gateway.port, request).statuses == [431]


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "99999999999999999999999", "5, 6", "+5"])
def test_a_content_length_that_is_none_is_refused(gateway: GatewayProcess, length: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
    assert exchange(gateway.port, head.encode()).status in (400, 413)


def test_two_lengths_are_refused(gateway: GatewayProcess) -> None:
    body = body_with()
    for more in ("content-length: 5", "transfer-encoding: chunked"):
        assert exchange(gateway.port, post(CHAT, body, more)).statuses == [400]


@pytest.mark.parametrize(
    "junk", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"G" * 200_000]
)
def test_bytes_that_are_not_http_are_refused(gateway: GatewayProcess, junk: bytes) -> None:
    answer = exchange(gateway.port, junk)
    assert answer.statuses in ([400], [431])
    assert b"\r\ncontent-type: application/json\r\n" in answer.data
    assert check_error(json.loads(answer.body))["code"] in ("invalid_http", "headers_too_large")


def test_requests_one_after_the_other_in_one_piece_are_answered_in_order(
    gateway: GatewayProcess,
) -> None:
    first = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    second = post(CHAT, body_with()).replace(b"connection: close\r\n", b"")
    last = post(CHAT, b"{}")
    answer = exchange(gateway.port, first + second + last)
    assert answer.statuses == [200, 200, 400]
    assert b'"hi"' in answer.data


def test_http_1_0_is_answered(gateway: GatewayProcess) -> None:
    assert exchange(gateway.port, post(CHAT, body_with(), version="1.0")).statuses == [200]
    assert exchange(gateway.port, b"GET /livez HTTP/1.0\r\n\r\n").statuses == [200]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "OPTIONS", "PROPFIND"])
def test_methods_that_a_route_does_not_have_are_refused(
    gateway: GatewayProcess, method: str
) -> None:
    with gateway.client() as client:
        error = refusal(client.request(method, CHAT), 405)
        assert error["code"] == "http_405"


def test_methods_that_http_does_not_have_are_refused(gateway: GatewayProcess) -> None:
    request = f"BREW {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert exchange(gateway.port, request.encode()).status == 400


@pytest.mark.parametrize("path", ["/nope", "/v1/%ed%a0%80", "/v1//chat", "/%00", "/v1/jobs/%2e%2e"])
def test_routes_that_there_are_none_are_refused(gateway: GatewayProcess, path: str) -> None:
    with gateway.client() as client:
        answer = client.get(path)
    refusal(answer, answer.status_code)
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize("host", ["[", "a b", "[::1", "x:y:z", "\xff"])
def test_a_host_that_is_none_is_refused(gateway: GatewayProcess, host: str) -> None:
    request = f"GET /nope HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    assert exchange(gateway.port, request.encode("latin-1")).status in (400, 403)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-mixfleet-start-within-s", "nan"),
        ("x-mixfleet-start-within-s", "1e999"),
        ("x-mixfleet-finish-within-s", "-5"),
        ("x-mixfleet-finish-within-s", "soon"),
        ("x-mixfleet-priority", "urgent"),
        ("x-mixfleet-on-disconnect", "explode"),
        ("idempotency-key", "x" * 5000),
        ("idempotency-key", ""),
    ],
)
def test_headers_of_ours_that_cannot_be_used_are_refused(
    gateway: GatewayProcess, name: str, value: str
) -> None:
    with gateway.client() as client:
        refusal(client.post(CHAT, json=BODY, headers={name: value}))


def test_a_request_id_that_cannot_stand_in_a_header_is_not_repeated(
    gateway: GatewayProcess,
) -> None:
    with gateway.client() as client:
        good = client.get("/livez", headers={"x-request-id": "mine-1"})
        assert good.headers["x-request-id"] == "mine-1"
        for bad in ("a b", "x" * 129, "<script>"):
            answer = client.get("/livez", headers={"x-request-id": bad})
            assert answer.headers["x-request-id"].startswith("req_")


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway that gives a request a second to arrive."""
    program = (str(Path(hurried_gateway.__file__)), str(REQUEST_S))
    directory = tmp_path_factory.mktemp("hurried")
    with (
        RedisServer() as server,
        EchoWorker(server.url, hold_after=1) as worker,
        GatewayProcess(server.url, directory, program=program) as process,
    ):
        worker.go.set()
        yield process


@pytest.mark.slow
@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /livez HTTP/1.1\r\nx-slow: ", id="headers"),
        pytest.param(post(CHAT, b" " * 100_000)[:400], id="body"),
    ],
)
def test_a_connection_that_says_a_byte_at_a_time_is_closed(
    hurried: GatewayProcess, begin: bytes
) -> None:
    stop = threading.Event()
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=10.0) as connection:
        connection.sendall(begin)

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    connection.sendall(b"x" if begin else b"\r")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        begun = time.monotonic()
        dripping.start()
        try:
            data = read_all(connection)
        finally:
            stop.set()
            dripping.join()
    assert data.startswith(b"HTTP/1.1 408 ")
    assert data.count(b"HTTP/1.1") == 1
    error = check_error(json.loads(data.partition(b"\r\n\r\n")[2]))
    assert (error["code"], error["details"]) == ("request_timeout", {"limit_s": REQUEST_S})
    assert REQUEST_S * 0.9 < time.monotonic() - begun < REQUEST_S + 5.0
    with hurried.client() as client:
        assert client.get("/livez").status_code == 200


@pytest.mark.slow
def test_an_answer_may_take_longer_than_a_request(tmp_path: Path) -> None:
    program = (str(Path(hurried_gateway.__file__)), "0.3")
    with (
        RedisServer() as server,
        EchoWorker(server.url, hold_after=1) as worker,
        GatewayProcess(server.url, tmp_path, program=program) as process,
        socket.create_connection(("127.0.0.1", process.port), timeout=10.0) as connection,
    ):
        connection.sendall(
            post(CHAT, body_with(stream=True)).replace(b"connection: close", b"a: b")
        )
        # Half of a next request, whose time begins when it is its turn.
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        begun = time.monotonic()
        until(lambda: time.monotonic() - begun > 1.0, "three times the limit has passed")
        worker.go.set()
        data = read_all(connection)
    answer, done, rest = data.partition(b"data: [DONE]")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" not in answer
    assert done
    assert b"HTTP/1.1 408" in rest


@pytest.mark.slow
def test_an_event_that_is_none_ends_its_own_stream_as_our_fault(tmp_path: Path) -> None:
    with (
        RedisServer() as server,
        EchoWorker(server.url, hold_after=1) as worker,
        GatewayProcess(server.url, tmp_path) as process,
        process.client() as client,
    ):
        with client.stream("POST", CHAT, json={**BODY, "stream": True}) as stream:
            job_id = stream.headers["x-job-id"]
            lines = stream.iter_lines()
            while '"h"' not in next(lines):
                pass
            with server.client() as redis:
                redis.xadd(CHANNEL(job_id), {"x": "y"}, id="*")
            rest = [line for line in lines if line.startswith("data: ")]
        error = check_error(json.loads(rest[-1][6:]))
        assert (error["code"], error["type"]) == ("invalid_event", "server_error")
        worker.go.set()
        assert client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.slow
def test_without_redis_requests_are_refused_until_it_is_back(tmp_path: Path) -> None:
    with (
        RedisServer(*ALWAYS) as server,
        GatewayProcess(server.url, tmp_path) as process,
        process.client() as client,
    ):
        server.kill()
        refused = client.post(CHAT, json=BODY)
        assert refusal(refused, 503)["code"] == "broker_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        server.start()
        with EchoWorker(server.url):
            until(lambda: client.post(CHAT, json=BODY).status_code == 200, "it serves again")
