"""What Anthropic's client says of keys that do not serve, and of requests beyond a limit."""

from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.connection import connect
from mixfleet_broker.key_records import KeyTerms, Limits
from support.answer_worker import AnswerWorker, Scripted
from support.api_keys import SECRET
from support.gateway import GatewayProcess
from support.redis_server import RedisServer

MODEL = "tiny"
MAX_BODY_BYTES = 2048


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: RedisServer) -> Iterator[AnswerWorker]:
    with AnswerWorker(server.url, MODEL) as worker:
        yield worker


@pytest.fixture(scope="module")
def url(
    server: RedisServer, worker: AnswerWorker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    del worker  # its model is known before the gateway looks
    new_key(server, KeyTerms(name="first"))
    directory = tmp_path_factory.mktemp("gateway")
    options = ("--require-key", "on", "--max-body-bytes", str(MAX_BODY_BYTES))
    with GatewayProcess(server.url, directory, *options) as gateway:
        yield gateway.url


def new_key(server: RedisServer, terms: KeyTerms) -> str:
    with connect(server.url) as redis:
        return ApiKeys(redis).create(terms)[1]


def ask(url: str, secret: str, text: str = "x") -> anthropic.types.Message:
    with Anthropic(base_url=url, api_key=secret, max_retries=0) as client:
        return client.messages.create(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": text}]
        )


def kind_of(error: anthropic.APIStatusError) -> str:
    assert isinstance(error.body, dict)
    return str(error.body["error"]["type"])


def test_a_key_that_was_never_made_is_no_authentication(url: str) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="not valid") as caught:
        ask(url, SECRET)
    assert kind_of(caught.value) == "authentication_error"


def test_a_key_for_another_model_has_no_permission(server: RedisServer, url: str) -> None:
    secret = new_key(server, KeyTerms(name="other", models=frozenset({"other"})))
    with pytest.raises(anthropic.PermissionDeniedError, match="may not use the model") as caught:
        ask(url, secret)
    assert kind_of(caught.value) == "permission_error"


def test_the_second_request_of_a_key_for_one_a_minute_is_limited(
    server: RedisServer, url: str, worker: AnswerWorker
) -> None:
    secret = new_key(server, KeyTerms(name="slow", limits=Limits(requests_per_min=1)))
    worker.script.append(Scripted((("text", "a"),)))
    assert ask(url, secret).stop_reason == "end_turn"
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(url, secret)
    assert kind_of(caught.value) == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_body_beyond_the_limit_is_too_large(server: RedisServer, url: str) -> None:
    secret = new_key(server, KeyTerms(name="long"))
    # Before routes and keys are looked at, and yet in this client's words.
    with pytest.raises(anthropic.APIStatusError, match="the limit is 2048") as caught:
        ask(url, secret, "x" * MAX_BODY_BYTES)
    assert caught.value.status_code == 413
    assert kind_of(caught.value) == "request_too_large"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["request_id"] == caught.value.request_id
