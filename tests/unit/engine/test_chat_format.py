import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException, TokenizerException
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixfleet_engine.chat_format import (
    FORMATS,
    ChatFormat,
    Message,
    chat_format,
    default_format,
    encode_prompt,
)
from mixfleet_engine.errors import ConfigError, InvalidMessagesError, InvalidRequestError
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.byte_tokenizer import ByteTokenizer
from support.tokenizer_files import NASTY_TEXTS, mistral_file, write_byte_level_json

MISTRAL_VERSIONS = ("v1", "v2", "v3")

SEED_EXAMPLE = (
    "<s> [INST] <<SYS>> System prompt <</SYS>> First user question [/INST] First assistant answer "
    "</s> <s> [INST] Second user question [/INST] Second assistant answer </s> <s> [INST] Third "
    "user question [/INST] Third assistant answer </s>"
)
"""The example of the article, word for word."""

CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
"""The demo model's own."""


def conversation(*turns: str) -> list[Message]:
    """Return messages written as "user: Hello"."""
    roles_and_texts = (turn.split(": ", 1) for turn in turns)
    return [Message(role=role, content=content) for role, content in roles_and_texts]


THREE_TURNS = conversation(
    "system: System prompt",
    "user: First user question",
    "assistant: First assistant answer",
    "user: Second user question",
)


class MistralOracle:
    """mistral-common: Mistral's own code."""

    def __init__(self, version: str) -> None:
        self._tokenizer: Any = MistralTokenizer.from_file(str(mistral_file(version)))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        found: list[Any] = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                last = index == len(messages) - 1
                found.append(AssistantMessage(content=message.content, prefix=last))
            else:
                kind = {"system": SystemMessage, "user": UserMessage}[message.role]
                found.append(kind(content=message.content))
        request: Any = ChatCompletionRequest(messages=found)
        ids: list[int] = self._tokenizer.encode_chat_completion(request).tokens
        return ids


@pytest.fixture(scope="module", params=MISTRAL_VERSIONS)
def mistral(request: pytest.FixtureRequest) -> tuple[ChatFormat, MistralOracle]:
    version = request.param
    tokenizer = load_tokenizer(mistral_file(version))
    return chat_format(f"mistral-{version}", tokenizer), MistralOracle(version)


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return ids as text, control tokens spelled out."""
    parts = [
        tokenizer.id_to_piece(token_id).encode()
        if token_id in tokenizer.control_ids
        else tokenizer.token_bytes(token_id)
        for token_id in ids
    ]
    return b"".join(parts).decode()


# --- Mistral's own formats ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "length", "start", "text"),
    [
        (
            "v1",
            29,
            [1, 733, 16289, 28793],
            "<s> [INST] System prompt\n\nFirst user question [/INST] First assistant answer</s>"
            " [INST] Second user question [/INST]",
        ),
        (
            "v2",
            19,
            [1, 3, 4973],
            "<s>[INST] First user question[/INST] First assistant answer</s>"
            "[INST] System prompt\n\nSecond user question[/INST]",
        ),
        (
            "v3",
            19,
            [1, 3, 4973],
            "<s>[INST] First user question[/INST] First assistant answer</s>"
            "[INST] System prompt\n\nSecond user question[/INST]",
        ),
    ],
)
def test_mistral_formats_write_the_gold_strings(
    version: str, length: int, start: list[int], text: str
) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    ids = chat_format(f"mistral-{version}", tokenizer).encode(THREE_TURNS)
    assert decoded(tokenizer, ids) == text
    assert len(ids) == length
    assert ids[: len(start)] == start


@pytest.mark.parametrize(
    "turns",
    [
        ["user: Hello"],
        ["user: "],
        ["system: Be kind."],
        ["system: ", "user: Hello"],
        ["system: Be kind.", "user: Hello"],
        ["system: Be kind.", "system: ", "system: Be brief.", "user: Hello"],
        ["user: Hello", "system: Be kind."],
        ["user: One", "user: Two"],
        ["user: One", "user: ", "user: Two"],
        ["user: One", "system: Be kind.", "user: Two"],
        ["system: Be kind.", "assistant: Hi!", "user: Hello"],
        ["assistant: Hi!", "user: Hello"],
        ["user: Hello", "assistant: Hi", "assistant: there", "user: Bye"],
        ["user: Hello", "assistant: The answer is"],
        ["user: Hello", "assistant: The answer is  "],
        ["user: Hello", "assistant:  x  ", "user: y"],
        ["user:  spaces  ", "assistant: \n", "user: 漢字 🙂"],
        ["system: S", "user: 1", "assistant: 2", "user: 3", "assistant: 4", "user: 5"],
    ],
)
def test_mistral_formats_equal_mistral_common(
    turns: list[str], mistral: tuple[ChatFormat, MistralOracle]
) -> None:
    ours, oracle = mistral
    messages = conversation(*turns)
    assert ours.encode(messages) == oracle.encode(messages)


random_messages = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["system", "user", "user", "assistant"]),
        content=st.sampled_from(["", " ", "Hi", " a b ", "x\n\ny", "</s>", "[INST] no [/INST]"]),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(messages=random_messages)
def test_mistral_formats_accept_and_refuse_what_mistral_common_does(
    messages: list[Message], mistral: tuple[ChatFormat, MistralOracle]
) -> None:
    ours, oracle = mistral
    try:
        expected = oracle.encode(messages)
    except (MistralCommonException, TokenizerException):
        with pytest.raises(InvalidMessagesError):
            ours.encode(messages)
    else:
        assert ours.encode(messages) == expected


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "the conversation is empty"),
        (["assistant: Hi"], "message 0 is the assistant's and there is no other"),
        (["user: a", "assistant: ", "user: b"], "message 1, the assistant's, is empty"),
        (["user: a", "assistant: b", "system: c"], "message 2 is the system's"),
        (["user: a", "robot: b"], "message 1 has role 'robot', not one of system, user, assistant"),
    ],
)
@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3", "aime"])
def test_impossible_conversations_are_refused_by_name(
    turns: list[str], message: str, name: str
) -> None:
    with pytest.raises(InvalidMessagesError, match=message):
        chat_format(name, ByteTokenizer()).encode(conversation(*turns))


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_free_formats_refuse_empty_conversations_and_unknown_roles(name: str) -> None:
    free = chat_format(name, ByteTokenizer())
    with pytest.raises(InvalidMessagesError, match="the conversation is empty"):
        free.encode([])
    with pytest.raises(InvalidMessagesError, match="message 0 has role 'robot'"):
        free.encode(conversation("robot: x"))


# --- the article's format -----------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["v1", "v3", "bytes"])
def test_aime_is_the_example_of_the_article(tokenizer: str) -> None:
    model = ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(mistral_file(tokenizer))
    messages = conversation(
        "system: System prompt",
        "user: First user question",
        "assistant: First assistant answer",
        "user: Second user question",
        "assistant: Second assistant answer",
        "user: Third user question",
        "assistant: Third assistant answer",
    )
    # The last answer is one to be continued: its end is what the model would write.
    prompt = decoded(model, chat_format("aime", model).encode(messages))
    assert prompt + " </s>" == SEED_EXAMPLE
    question = decoded(model, chat_format("aime", model).encode(messages[:-1]))
    assert SEED_EXAMPLE.startswith(question)
    assert question.endswith("Third user question [/INST]")


def test_aime_marks_every_pair_with_bos_and_eos() -> None:
    tokenizer = load_tokenizer(mistral_file("v1"))
    ids = chat_format("aime", tokenizer).encode(THREE_TURNS)
    assert [token_id for token_id in ids if token_id in tokenizer.control_ids] == [1, 2, 1]


def test_aime_without_a_system_prompt_has_no_system_tags() -> None:
    ids = chat_format("aime", ByteTokenizer()).encode(conversation("user: Hello"))
    assert decoded(ByteTokenizer(), ids) == "<s> [INST] Hello [/INST]"


def test_aime_keeps_two_questions_in_one_pair() -> None:
    messages = conversation("user: One", "system: S", "user: Two")
    ids = chat_format("aime", ByteTokenizer()).encode(messages)
    assert decoded(ByteTokenizer(), ids) == (
        "<s> [INST] <<SYS>> S <</SYS>> One [/INST] [INST] Two [/INST]"
    )


# --- ChatML -------------------------------------------------------------------------------------


def render(template: str, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(template).render(messages=turns, add_generation_prompt=True)


@pytest.mark.parametrize(
    "turns",
    [
        ["user: Hello"],
        ["system: Be kind.", "user: Hello"],
        ["user: Hello", "assistant: Hi\nthere", "user: 漢字 🙂"],
        ["assistant: Hi", "user: Hello"],
        ["user: a", "user: b", "system: late"],
    ],
)
def test_chatml_equals_the_rendered_template(turns: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path, chat_template=CHATML_TEMPLATE))
    messages = conversation(*turns)
    ids = chat_format("chatml", tokenizer).encode(messages)
    rendered = render(CHATML_TEMPLATE, messages)
    assert decoded(tokenizer, ids) == rendered
    # Token by token: each stretch of text between control tokens is encoded by itself.
    expected: list[int] = []
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", rendered):
        control = tokenizer.control_id(part)
        expected += tokenizer.encode(part) if control is None else [control]
    assert ids == expected


def test_chatml_continues_a_last_message_of_the_assistant(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    ids = chat_format("chatml", tokenizer).encode(conversation("user: Hi", "assistant: I am"))
    assert decoded(tokenizer, ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI am"
    )


@pytest.mark.parametrize(
    ("template", "begins_with"),
    [
        (None, "<|im_start|>user\n"),
        ("{{ '<|im_start|>' + message['role'] }}", "<|im_start|>user\n"),
        (r"{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}", "<|im_start|>system\nBe kind."),
        ("<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>system\nBe kind.<|im_end|>\n"),
        ("<|im_start|>system\n{{ system }}<|im_end|>\n", "<|im_start|>user\n"),
    ],
)
def test_the_default_system_prompt_is_the_template_own(
    template: str | None, begins_with: str
) -> None:
    tokenizer = ByteTokenizer(chat_template=template)
    ids = chat_format("chatml", tokenizer).encode(conversation("user: Hi"))
    assert decoded(tokenizer, ids).startswith(begins_with)


def test_chatml_ends_with_any_of_its_end_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path, eos_token="<|im_end|>"))
    assert chat_format("chatml", tokenizer).stop_token_ids == {0, 2}
    fake = ByteTokenizer()
    ends = {fake.eos_id, fake.control_id("<|im_end|>")}
    assert chat_format("chatml", fake).stop_token_ids == ends


# --- plain text ---------------------------------------------------------------------------------


def test_plain_is_the_text_alone() -> None:
    messages = conversation("system: Once", "user: upon a", "assistant: time")
    ids = chat_format("plain", ByteTokenizer()).encode(messages)
    assert decoded(ByteTokenizer(), ids) == "<s>Once\n\nupon a\n\ntime"


def test_a_prompt_is_bos_and_its_text() -> None:
    tokenizer = load_tokenizer(mistral_file("v1"))
    assert encode_prompt(tokenizer, "Once") == [1, *tokenizer.encode("Once")]
    assert encode_prompt(tokenizer, "") == [1]


def test_a_prompt_without_any_token_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        encode_prompt(tokenizer, "")
    with pytest.raises(InvalidMessagesError, match="the prompt is empty"):
        chat_format("plain", tokenizer).encode(conversation("user: "))


# --- all formats --------------------------------------------------------------------------------


def every_format(directory: Path) -> list[tuple[ChatFormat, Tokenizer]]:
    chatml = load_tokenizer(write_byte_level_json(directory, chat_template=CHATML_TEMPLATE))
    v1, v2, v3 = (load_tokenizer(mistral_file(version)) for version in MISTRAL_VERSIONS)
    chosen = [("mistral-v1", v1), ("mistral-v2", v2), ("mistral-v3", v3)]
    chosen += [("aime", v1), ("aime", v3), ("plain", v3), ("plain", v1)]
    chosen += [("chatml", chatml), ("chatml", ByteTokenizer()), ("mistral-v3", ByteTokenizer())]
    assert {name for name, _ in chosen} == set(FORMATS)
    return [(chat_format(name, tokenizer), tokenizer) for name, tokenizer in chosen]


def test_messages_never_add_a_control_token(tmp_path: Path) -> None:
    """Whatever the messages contain, the prompt has the control tokens of harmless ones."""

    def controls(ours: ChatFormat, tokenizer: Tokenizer, text: str) -> list[int]:
        messages = [
            Message(role=role, content=f"{text}.")
            for role in ("system", "user", "assistant", "user")
        ]
        return [token_id for token_id in ours.encode(messages) if token_id in tokenizer.control_ids]

    for ours, tokenizer in every_format(tmp_path):
        expected = controls(ours, tokenizer, "harmless")
        names = [tokenizer.id_to_piece(token_id) for token_id in tokenizer.control_ids]
        for text in (*NASTY_TEXTS, *names[:40], " ".join(names)):
            assert controls(ours, tokenizer, text) == expected, (ours.name, text)


def test_text_that_cannot_be_encoded_is_refused_by_every_format(tmp_path: Path) -> None:
    for ours, _ in every_format(tmp_path):
        with pytest.raises(InvalidMessagesError, match=r"message 1: .*surrogate"):
            ours.encode(conversation("system: fine", "user: \ud800"))


def test_every_format_says_its_own_name(tmp_path: Path) -> None:
    for ours, tokenizer in every_format(tmp_path):
        assert chat_format(ours.name, tokenizer).name == ours.name


def test_mistral_answers_end_with_eos() -> None:
    for name in ("mistral-v1", "mistral-v2", "mistral-v3", "aime", "plain"):
        tokenizer = load_tokenizer(mistral_file("v3"))
        assert chat_format(name, tokenizer).stop_token_ids == {2}


def test_only_a_cut_answer_is_continued_in_mistral_formats() -> None:
    for name in ("mistral-v1", "mistral-v3", "aime"):
        ours = chat_format(name, ByteTokenizer())
        assert not ours.continues(THREE_TURNS)
        assert ours.continues(THREE_TURNS[:-1])
    for name in ("chatml", "plain"):
        assert chat_format(name, ByteTokenizer()).continues(THREE_TURNS)


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="chat_format='alpaca': must be one of mistral-v1, "):
        chat_format("alpaca", ByteTokenizer())


@pytest.mark.parametrize(
    ("name", "token"), [("mistral-v3", r"\[INST\]"), ("chatml", r"<\|im_start\|>")]
)
def test_a_format_whose_control_tokens_are_missing_is_refused(name: str, token: str) -> None:
    with pytest.raises(ConfigError, match=f"the tokenizer has no {token} token"):
        chat_format(name, load_tokenizer(mistral_file("v1")))


# --- the default --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", MISTRAL_VERSIONS)
def test_the_default_follows_the_version_in_the_file_name(version: str, tmp_path: Path) -> None:
    file = tmp_path / f"tokenizer.model.{version}"
    shutil.copy(mistral_file(version), file)
    for path in (file, tmp_path):
        assert default_format(load_tokenizer(path), path) == f"mistral-{version}"


@pytest.mark.parametrize(("version", "expected"), [("v1", "mistral-v1"), ("v3", "mistral-v3")])
def test_the_default_follows_the_size_of_the_vocabulary(
    version: str, expected: str, tmp_path: Path
) -> None:
    shutil.copy(mistral_file(version), tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert default_format(tokenizer, tmp_path) == expected
    assert default_format(tokenizer) == expected


def test_the_default_is_chatml_where_its_control_tokens_are(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    assert default_format(load_tokenizer(path), tmp_path) == "chatml"


def test_the_default_is_plain_where_nothing_is_known(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        def control_id(self, name: str) -> int | None:
            return None if name.startswith("<|im") else super().control_id(name)

    assert default_format(Other(), tmp_path) == "plain"


def test_the_model_name_never_counts(tmp_path: Path) -> None:
    directory = tmp_path / "mixtral-8x22b-instruct-v3"
    directory.mkdir()
    shutil.copy(mistral_file("v1"), directory / "tokenizer.model")
    assert default_format(load_tokenizer(directory), directory) == "mistral-v1"
