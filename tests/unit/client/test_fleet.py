import pytest

from mixfleet import ChatMessage, Client, new_job_id
from mixfleet.errors import (
    BrokerUnavailableError,
    InvalidMessagesError,
    StreamTimeoutError,
    UnknownJobError,
    UnknownModelError,
)
from mixfleet_broker.messages import (
    ChatJob,
    SamplingSettings,
)
from mixfleet_broker.settings import Settings
from mixfleet_broker.terms import JobTerms
from support.fake_transport import FakeClock, FakeTransport, answer, fleet


def client_of(
    transport: FakeTransport, clock: FakeClock, client_model: str | None = None, **settings: object
) -> Client:
    return Client(
        settings=Settings(**settings),  # type: ignore[arg-type]
        transport=transport,
        model=client_model,
        clock=clock,
    )


def only_job(transport: FakeTransport) -> ChatJob:
    (kept,) = transport.jobs.values()
    return kept.job


def test_a_question_becomes_one_user_turn_with_the_schemas_defaults() -> None:
    transport, clock = fleet(answer("Hi"))
    stream = client_of(transport, clock).chat("Hello?")
    assert only_job(transport) == ChatJob(
        job_id=stream.job_id,
        model="tiny",
        messages=(ChatMessage(role="user", content="Hello?"),),
        sampling=SamplingSettings(),
    )
    assert stream.result().text == "Hi"


def test_every_option_reaches_the_job() -> None:
    transport, clock = fleet()
    job_id = new_job_id()
    client_of(transport, clock).chat(
        [{"role": "user", "content": "a"}, ChatMessage(role="assistant", content="b")],
        model="big",
        system="Be brief.",
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        max_tokens=9,
        stop=["x", "y"],
        seed=0,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.0,
        frequency_penalty=-1.0,
        logit_bias={4: 2.0},
        logprobs=5,
        ignore_eos=True,
        job_id=job_id,
    )
    assert only_job(transport) == ChatJob(
        job_id=job_id,
        model="big",
        messages=(
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="a"),
            ChatMessage(role="assistant", content="b"),
        ),
        sampling=SamplingSettings(
            temperature=0.0,
            top_k=3,
            top_p=0.5,
            max_tokens=9,
            stop=("x", "y"),
            seed=0,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=0.0,
            frequency_penalty=-1.0,
            logit_bias=((4, 2.0),),
            logprobs=5,
            ignore_eos=True,
        ),
    )


def test_one_stop_text_needs_no_list() -> None:
    transport, clock = fleet()
    client_of(transport, clock).chat("a", stop="END")
    assert only_job(transport).sampling.stop == ("END",)


def test_complete_sends_plain_text() -> None:
    transport, clock = fleet(answer("upon a time"))
    result = client_of(transport, clock).complete("Once ", temperature=0, seed=4).result()
    job = only_job(transport)
    assert (job.prompt, job.messages) == ("Once ", ())
    assert job.sampling == SamplingSettings(temperature=0, seed=4)
    assert result.text == "upon a time"


def test_complete_sends_tokens_as_they_are() -> None:
    transport, clock = fleet(answer("upon a time"))
    client_of(transport, clock).complete([7, 9], logit_bias={5: 1.0, 3: -2.0}, logprobs=0)
    job = only_job(transport)
    assert (job.prompt, job.prompt_token_ids) == (None, (7, 9))
    assert job.sampling == SamplingSettings(logit_bias=((3, -2.0), (5, 1.0)), logprobs=0)


def test_the_same_job_id_is_one_job() -> None:
    transport, clock = fleet(answer("a"))
    client, job_id = client_of(transport, clock), new_job_id()
    results = [client.chat("a", job_id=job_id).result().text for _ in range(2)]
    assert results == ["a", "a"]
    assert len(transport.jobs) == 1


@pytest.mark.parametrize(
    "message",
    [{"role": "user"}, {"role": "user", "content": "a", "name": "b"}, {}],
    ids=["missing", "unknown", "empty"],
)
def test_a_message_of_other_fields_is_refused(message: dict[str, str]) -> None:
    transport, clock = fleet()
    with pytest.raises(InvalidMessagesError, match="role and content"):
        client_of(transport, clock).chat([message])
    assert not transport.jobs


def test_a_message_that_is_no_mapping_is_refused_without_being_shown() -> None:
    transport, clock = fleet()
    with pytest.raises(InvalidMessagesError, match="is a mapping, not str") as raised:
        client_of(transport, clock).chat(["secret"])  # type: ignore[list-item]
    assert "secret" not in str(raised.value)


def test_two_system_texts_are_refused() -> None:
    transport, clock = fleet()
    with pytest.raises(InvalidMessagesError, match="two system texts"):
        client_of(transport, clock).chat([{"role": "system", "content": "a"}], system="b")


@pytest.mark.parametrize(
    ("call", "client", "setting", "chosen"),
    [
        ("a", "b", "c", "a"),
        (None, "b", "c", "b"),
        (None, None, "c", "c"),
        (None, None, None, "tiny"),
    ],
)
def test_the_model_is_the_nearest_that_is_named_or_else_the_only_one(
    call: str | None, client: str | None, setting: str | None, chosen: str
) -> None:
    transport, clock = fleet()
    stream = client_of(transport, clock, client, model=setting).chat("x", model=call)
    assert stream.model == chosen


def test_no_model_to_choose_is_an_error_that_says_what_to_start() -> None:
    transport, clock = fleet()
    transport.served = ()
    with pytest.raises(UnknownModelError, match="mixfleet worker"):
        client_of(transport, clock).chat("x")


def test_several_models_are_listed() -> None:
    transport, clock = fleet()
    transport.served = ("big", "tiny")
    with pytest.raises(UnknownModelError, match="big, tiny") as raised:
        client_of(transport, clock).chat("x")
    assert raised.value.models == ("big", "tiny")


def test_a_model_that_is_served_now_goes_before_those_of_last_week() -> None:
    transport, clock = fleet()
    transport.served, transport.live = ("big", "tiny"), ("tiny",)
    assert client_of(transport, clock).chat("x").model == "tiny"


def test_the_only_model_of_last_week_is_taken_when_none_is_served_now() -> None:
    transport, clock = fleet()
    transport.workers = 0
    assert client_of(transport, clock).chat("x").model == "tiny"


def test_status_and_cancel_of_an_unknown_job_say_so() -> None:
    transport, clock = fleet()
    client = client_of(transport, clock)
    for call in (client.status, client.cancel):
        with pytest.raises(UnknownJobError):
            call(new_job_id())


def test_times_count_from_before_the_submit() -> None:
    transport, clock = fleet(answer("a", delay_s=1.0))
    original = transport.submit

    def slow_submit(job: ChatJob, terms: JobTerms) -> int:
        clock.sleep(3.0)
        return original(job, terms)

    transport.submit = slow_submit  # type: ignore[method-assign]
    assert client_of(transport, clock).chat("x").result().ttft_s == 5.0


def test_attach_reads_any_job_from_any_point_any_number_of_times() -> None:
    transport, clock = fleet(answer("a", "b", "c"))
    client = client_of(transport, clock)
    stream = client.chat("x")
    next(iter(stream))
    for _ in range(2):
        assert client.attach(stream.job_id).result().text == "abc"
        assert client.attach(stream.job_id, stream.last_event_id).result().text == "bc"
    assert client.attach(stream.job_id).model == "tiny"
    assert stream.result().text == "abc"


def test_leaving_an_attached_stream_leaves_the_job() -> None:
    transport, clock = fleet(answer("a", "b"))
    client = client_of(transport, clock)
    with client.attach(client.chat("x").job_id):
        pass
    assert transport.cancelled == []


def test_attach_to_nothing_is_unknown_at_once() -> None:
    transport, clock = fleet()
    started = clock.now
    with pytest.raises(UnknownJobError):
        client_of(transport, clock).attach(new_job_id())
    assert clock.now == started


@pytest.mark.parametrize("by_call", [True, False])
def test_the_first_token_timeout_comes_from_the_call_or_the_settings(by_call: bool) -> None:
    transport, clock = fleet()
    if by_call:
        client = client_of(transport, clock, first_token_timeout_s=99.0)
        stream = client.chat("x", first_token_timeout_s=3.0)
    else:
        stream = client_of(transport, clock, first_token_timeout_s=3.0).chat("x")
    with pytest.raises(StreamTimeoutError) as raised:
        stream.result()
    assert raised.value.limit_s == 3.0


def test_the_total_timeout_is_the_calls() -> None:
    transport, clock = fleet(answer(*"abcdefgh", delay_s=1.0))
    with (
        pytest.raises(StreamTimeoutError),
        client_of(transport, clock).chat("x", total_timeout_s=4.0) as stream,
    ):
        stream.result()
    assert transport.cancelled == [stream.job_id]


def test_status_cancel_models_and_workers_are_the_fleets() -> None:
    transport, clock = fleet()
    client = client_of(transport, clock)
    job_id = client.chat("x").job_id
    assert client.status(job_id).state == "queued"
    client.cancel(job_id)
    assert transport.cancelled == [job_id]
    assert client.models() == ("tiny",)
    assert (client.num_workers("tiny"), client.num_workers("big")) == (1, 0)


def test_closing_closes_the_transport() -> None:
    transport, clock = fleet()
    with client_of(transport, clock):
        assert not transport.closed
    assert transport.closed


def test_a_broker_that_is_away_is_said_at_submit() -> None:
    transport, clock = fleet()
    transport.outage_until = clock.now + 10.0
    with pytest.raises(BrokerUnavailableError):
        client_of(transport, clock).chat("x", model="tiny")
