import re
from typing import Any

import pytest

from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import encode_job
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    OutputFormat,
    SamplingSettings,
    ToolCall,
    ToolSpec,
)
from mixfleet_engine.chat_format import chat_format
from mixfleet_engine.errors import InvalidMessagesError, PromptTooLongError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.request import SamplingParams
from mixfleet_worker.intake import AdmittedJob, CompleteJob, Intake, derived_seed
from support.byte_tokenizer import ByteTokenizer
from support.worker_jobs import MODEL, a_lease, a_payload, a_taken_job

TOKENIZER = ByteTokenizer()
CHATML = chat_format("chatml", TOKENIZER)
CONTEXT_LENGTH = 100
DEFAULTS = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.9)


def an_intake(tokenizer: ByteTokenizer = TOKENIZER, name: str = "chatml") -> Intake:
    return Intake(
        model=MODEL,
        tokenizer=tokenizer,
        chat_format=chat_format(name, tokenizer),
        context_length=CONTEXT_LENGTH,
        defaults=DEFAULTS,
    )


def admitted(payload: bytes, delivered: tuple[int, ...] = ()) -> AdmittedJob:
    job = an_intake().admit(a_taken_job(payload, delivered=delivered))
    assert isinstance(job, AdmittedJob)
    return job


def complete(payload: bytes, delivered: tuple[int, ...]) -> CompleteJob:
    job = an_intake().admit(a_taken_job(payload, delivered=delivered))
    assert isinstance(job, CompleteJob)
    return job


def test_a_conversation_becomes_the_prompt_of_the_chat_format() -> None:
    request = admitted(a_payload(question="Hi", max_tokens=5)).request
    start, end = TOKENIZER.control_id("<|im_start|>"), TOKENIZER.control_id("<|im_end|>")
    assert start is not None
    assert end is not None
    expected = [start, *b"user\nHi", end, *b"\n", start, *b"assistant\n"]
    assert list(request.prompt_token_ids) == expected
    assert request.stop_token_ids == CHATML.stop_token_ids
    assert (request.request_id, request.max_tokens) == ("job1", 5)


def test_a_plain_prompt_gets_the_beginning_of_text_and_no_chat_format() -> None:
    request = admitted(a_payload(prompt="Once upon")).request
    assert request.prompt_token_ids == (TOKENIZER.bos_id, *b"Once upon")
    assert request.stop_token_ids == {TOKENIZER.eos_id}


def test_the_first_space_of_a_continued_prompt_is_part_of_the_answer() -> None:
    tokenizer = ByteTokenizer(adds_leading_space=True)
    texts = []
    for payload in (a_payload(prompt="Once"), a_payload(question="Once")):
        job = an_intake(tokenizer, "mistral-v1").admit(a_taken_job(payload))
        assert isinstance(job, AdmittedJob)
        texts.append("".join(job.text.push(token_id).text for token_id in b" upon"))
    assert texts == [" upon", "upon"]


def test_without_max_tokens_the_answer_may_fill_the_rest_of_the_context() -> None:
    request = admitted(a_payload(prompt="x" * 29)).request
    assert len(request.prompt_token_ids) == 30
    assert request.max_tokens == CONTEXT_LENGTH - 30


@pytest.mark.parametrize("num_prompt_tokens", [100, 150])
def test_a_prompt_that_leaves_no_room_is_rejected_with_the_numbers(num_prompt_tokens: int) -> None:
    payload = a_payload(prompt="x" * (num_prompt_tokens - 1))
    with pytest.raises(PromptTooLongError) as caught:
        an_intake().admit(a_taken_job(payload))
    assert caught.value.prompt_tokens == num_prompt_tokens
    assert caught.value.context_length == CONTEXT_LENGTH


def test_the_last_free_token_can_be_the_answer() -> None:
    assert admitted(a_payload(prompt="x" * 98)).request.max_tokens == 1


def test_sampling_settings_reach_the_engine() -> None:
    payload = a_payload(temperature=0.0, top_k=0, top_p=1.0, seed=11)
    expected = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=11)
    assert admitted(payload).request.sampling == expected


def test_every_sampling_setting_reaches_the_engine() -> None:
    given: dict[str, Any] = {
        "temperature": 0.1,
        "top_k": 3,
        "top_p": 0.2,
        "min_p": 0.3,
        "repetition_penalty": 1.4,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.6,
        "logit_bias": ((5, -7.0), (6, 8.0)),
        "logprobs": 4,
        "seed": 11,
    }
    assert set(given) == set(SamplingParams.__slots__)
    assert admitted(a_payload(**given)).request.sampling == SamplingParams(**given)


def test_a_setting_of_zero_is_not_taken_for_one_that_was_left_open() -> None:
    zeros: dict[str, Any] = dict.fromkeys(("temperature", "top_k", "seed", "logprobs"), 0)
    sampling = admitted(a_payload(**zeros)).request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.logprobs) == (0, 0, 0, 0)


@pytest.mark.parametrize("source", [{"question": "Hi"}, {"prompt": "Hi"}])
def test_an_answer_that_ignores_the_end_has_no_stop_tokens(source: dict[str, Any]) -> None:
    assert admitted(a_payload(**source)).request.stop_token_ids
    assert not admitted(a_payload(**source, ignore_eos=True)).request.stop_token_ids


def test_an_answer_that_ignores_the_end_is_continued_behind_one() -> None:
    end = TOKENIZER.control_id("<|im_end|>")
    assert end is not None
    job = admitted(a_payload(ignore_eos=True, max_tokens=9), delivered=(*b"abc", end))
    assert job.request.output_token_ids == (*b"abc", end)


def test_a_prompt_of_tokens_is_continued_as_it_is() -> None:
    tokenizer = ByteTokenizer(adds_leading_space=True)
    job = an_intake(tokenizer, "mistral-v1").admit(a_taken_job(a_payload(prompt_token_ids=(7, 9))))
    assert isinstance(job, AdmittedJob)
    assert job.request.prompt_token_ids == (7, 9)
    assert job.request.stop_token_ids == {tokenizer.eos_id}
    assert "".join(job.text.push(token_id).text for token_id in b" on") == " on"


def test_a_job_without_a_seed_gets_the_same_one_on_every_worker() -> None:
    first, again = (admitted(a_payload()).request.sampling.seed for _ in range(2))
    assert first == again == derived_seed("job1")


def test_seeds_of_different_jobs_differ_and_fit_63_bits() -> None:
    seeds = {derived_seed(f"job{i}") for i in range(200)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bytes_that_are_no_job_are_a_message_error() -> None:
    with pytest.raises(MessageError):
        an_intake().admit(a_taken_job(b"\xc1 nonsense"))


def test_a_job_under_another_jobs_id_is_rejected() -> None:
    with pytest.raises(MessageError, match=r"job1.*other"):
        an_intake().admit(a_taken_job(a_payload("other"), lease=a_lease("job1")))


def test_a_job_for_another_model_is_rejected() -> None:
    with pytest.raises(MessageError, match="huge"):
        an_intake().admit(a_taken_job(a_payload(model="huge")))


def test_an_impossible_conversation_is_rejected_by_the_chat_format() -> None:
    intake = an_intake(name="mistral-v1")
    job = a_taken_job(a_payload(role="assistant"))
    with pytest.raises(InvalidMessagesError):
        intake.admit(job)


def test_a_continued_answer_keeps_its_tokens_and_the_state_of_its_text() -> None:
    half, rest = "né".encode()[:2], "né".encode()[2:]
    job = admitted(a_payload(max_tokens=10), delivered=tuple(half))
    assert job.request.output_token_ids == tuple(half)
    assert job.request.max_tokens == 10
    assert job.text.push(rest[0]).text == "é"


def test_a_continued_answer_remembers_the_beginning_of_a_stop_string() -> None:
    job = admitted(a_payload(stop=("STOP",), max_tokens=10), delivered=tuple(b"ab ST"))
    assert not job.text.push(ord("O")).stopped
    piece = job.text.push(ord("P"))
    assert (piece.text, piece.stopped) == ("", True)


def test_an_answer_of_full_length_is_complete() -> None:
    job = complete(a_payload(max_tokens=3), delivered=tuple(b"abc"))
    assert (job.finish_reason, job.num_tokens, job.chunk) == ("length", 3, None)


def test_an_answer_that_holds_its_stop_token_is_complete() -> None:
    end = TOKENIZER.control_id("<|im_end|>")
    assert end is not None
    job = complete(a_payload(max_tokens=9), delivered=(*b"abc", end))
    assert (job.finish_reason, job.num_tokens) == ("stop", 4)


def test_an_answer_that_holds_its_stop_string_is_complete() -> None:
    job = complete(a_payload(stop=("bc",), max_tokens=9), delivered=tuple(b"abc"))
    assert (job.finish_reason, job.chunk, job.stop_string) == ("stop", None, "bc")


def test_text_held_back_in_a_complete_answer_is_delivered_after_all() -> None:
    job = complete(a_payload(stop=("cd",), max_tokens=3), delivered=tuple(b"abc"))
    assert job.finish_reason == "length"
    assert job.chunk is not None
    assert (job.chunk.text, job.chunk.token_ids, job.chunk.num_tokens) == ("c", (), 3)
    assert job.chunk.num_prompt_tokens == job.num_prompt_tokens > 0
    assert job.stop_string is None


def test_a_channel_with_missing_tokens_is_rejected_with_the_numbers() -> None:
    with pytest.raises(MessageError, match=r"2.*5"):
        an_intake().admit(a_taken_job(a_payload(), delivered=(1, 2), num_delivered=5))


def test_tokens_that_only_the_models_padding_has_can_be_continued() -> None:
    padding = TOKENIZER.vocab_size + 5
    job = admitted(a_payload(max_tokens=9), delivered=(padding, ord("a")))
    assert job.request.output_token_ids == (padding, ord("a"))


def test_what_a_job_leaves_open_is_the_models_own_default() -> None:
    sampling = admitted(a_payload(temperature=None, seed=11)).request.sampling
    assert sampling == SamplingParams(temperature=0.5, top_k=7, top_p=0.9, seed=11)


def test_an_output_format_becomes_the_grammar_of_the_request() -> None:
    payload = a_payload(output_format=OutputFormat(kind="json_object"), max_tokens=5)
    grammar = admitted(payload, delivered=tuple(b"{")).request.grammar
    assert grammar is not None
    assert "%json" in grammar
    assert admitted(a_payload(max_tokens=5)).request.grammar is None


# --- tools --------------------------------------------------------------------------------------

WITH_TOOLS = ByteTokenizer(adds_tool_tokens=True)
CALLS = WITH_TOOLS.control_id("[TOOL_CALLS]") or 0
CLOCK = ToolSpec(name="clock")
HISTORY = (
    ChatMessage(role="user", content="What time?"),
    ChatMessage(
        role="assistant",
        content="",
        tool_calls=(ToolCall(call_id="call_1", name="clock", arguments="{}"),),
    ),
    ChatMessage(role="tool", content="noon", call_id="call_1"),
)


def tool_job(
    name: str = "mistral-v3", delivered: tuple[int, ...] = (), **fields: Any
) -> AdmittedJob | CompleteJob:
    messages = fields.pop("messages", HISTORY[:1])
    settings = SamplingSettings(max_tokens=20, stop=fields.pop("stop", ()))
    job = ChatJob(job_id="job1", model=MODEL, messages=messages, sampling=settings, **fields)
    intake = Intake(
        model=MODEL,
        tokenizer=WITH_TOOLS,
        chat_format=chat_format(name, WITH_TOOLS),
        context_length=1000,
        defaults=DEFAULTS,
    )
    return intake.admit(a_taken_job(encode_job(job), delivered=delivered))


def prompt_of(**fields: Any) -> str:
    """Return the prompt of a job, its control tokens spelled out."""
    job = tool_job(**fields)
    assert isinstance(job, AdmittedJob)
    ids = job.request.prompt_token_ids
    controls = WITH_TOOLS.control_ids
    return "".join(WITH_TOOLS.id_to_piece(i) if i in controls else chr(i) for i in ids)


CLOCK_TEXT = (
    '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "clock", "description": "", '
    '"parameters": {}}}][/AVAILABLE_TOOLS]'
)


@pytest.mark.parametrize("choice", ["auto", "required", "=clock"])
def test_tools_that_may_be_called_are_shown_to_the_model(choice: str) -> None:
    shown = prompt_of(tools=(CLOCK,), tool_choice=choice)
    assert shown == f"<s>{CLOCK_TEXT}[INST]What time?[/INST]"


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert prompt_of(tools=(CLOCK,), tool_choice="none") == "<s>[INST]What time?[/INST]"


def test_a_foreign_id_is_the_same_nine_letters_in_call_and_result() -> None:
    shown = prompt_of(messages=HISTORY)
    (call_id, result_id) = re.findall(r'id": "([a-zA-Z0-9]{9})"', shown)
    assert call_id == result_id
    assert "call_1" not in shown


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_are_a_part_of_their_own_where_tools_are_offered(choice: str) -> None:
    job = tool_job(tools=(CLOCK,), tool_choice=choice)
    assert isinstance(job, AdmittedJob)
    job.text.push(CALLS)
    assert job.text.push(ord("[")).part == "tool_calls"


@pytest.mark.parametrize("fields", [{}, {"tools": (CLOCK,), "tool_choice": "none"}])
def test_calls_of_a_model_that_was_offered_none_are_text(fields: dict[str, Any]) -> None:
    job = tool_job(**fields)
    assert isinstance(job, AdmittedJob)
    job.text.push(CALLS)
    assert job.text.push(ord("[")).part == "text"


def test_a_job_that_is_continued_amid_its_calls_is_still_in_them() -> None:
    job = tool_job(tools=(CLOCK,), delivered=(*b"ab", CALLS, *b'[{"na'), stop=("na",))
    assert isinstance(job, AdmittedJob)
    piece = job.text.push(ord("m"))
    assert (piece.text, piece.part, piece.stopped) == ("m", "tool_calls", False)


def test_the_rest_of_complete_calls_is_delivered_as_calls() -> None:
    job = tool_job(tools=(CLOCK,), delivered=(CALLS, *b"[" * 18, 0xC3))
    assert isinstance(job, CompleteJob)
    assert job.chunk is not None
    assert (job.chunk.text, job.chunk.part) == ("\ufffd", "tool_calls")


@pytest.mark.parametrize("name", ["mistral-v1", "aime", "chatml", "plain"])
def test_tools_for_a_model_that_knows_none_are_refused(name: str) -> None:
    with pytest.raises(InvalidMessagesError, match=f"knows no tools.*{name}"):
        tool_job(name, tools=(CLOCK,))
    with pytest.raises(InvalidMessagesError, match=f"message 1 calls tools.*{name}"):
        tool_job(name, messages=HISTORY)
    assert isinstance(tool_job(name, tools=(CLOCK,), tool_choice="none"), AdmittedJob)
