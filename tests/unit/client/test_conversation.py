import json
from pathlib import Path

import pytest

from mixfleet.conversation import SETTING_NAMES, Conversation
from mixfleet_broker.errors import ConfigError, MessageError
from mixfleet_broker.messages import (
    ChatMessage,
    SamplingSettings,
)


def test_the_system_text_goes_before_the_turns() -> None:
    conversation = Conversation(system="Be brief.")
    conversation.note("a", "b")
    assert [(turn.role, turn.content) for turn in conversation.asking("c")] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_asking_notes_nothing() -> None:
    conversation = Conversation()
    conversation.asking("a")
    assert conversation.turns == []


def test_an_empty_answer_leaves_no_trace() -> None:
    conversation = Conversation()
    assert not conversation.note("a", "")
    assert conversation.turns == []


def test_taking_back_forgets_one_exchange() -> None:
    conversation = Conversation()
    conversation.note("a", "b")
    conversation.note("c", "d")
    conversation.take_back()
    assert [turn.content for turn in conversation.turns] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("top-p", "0.9", 0.9),
        ("max_tokens", "12", 12),
        ("max_tokens", "none", None),
        ("stop", "END|\\n", ("END", "\\n")),
        ("stop", "none", ()),
        ("seed", "7", 7),
        ("min-p", "0.05", 0.05),
        ("repetition_penalty", "1.2", 1.2),
        ("presence_penalty", "-1", -1.0),
        ("frequency_penalty", "none", None),
    ],
)
def test_a_setting_is_read_from_its_text(name: str, text: str, value: object) -> None:
    conversation = Conversation()
    conversation.set(name, text)
    assert getattr(conversation.sampling, name.replace("-", "_")) == value


def test_every_sampling_setting_can_be_set() -> None:
    for_programs = {"logit_bias", "logprobs", "ignore_eos"}
    assert set(SETTING_NAMES) == set(SamplingSettings.__slots__) - for_programs


@pytest.mark.parametrize(("name", "text"), [("top_k", "many"), ("beams", "4"), ("seed", "")])
def test_a_setting_that_cannot_be_read_is_named(name: str, text: str) -> None:
    conversation = Conversation()
    with pytest.raises(ConfigError, match=name):
        conversation.set(name, text)
    assert conversation.sampling == SamplingSettings()


@pytest.mark.parametrize(("name", "text"), [("temperature", "9"), ("top_p", "nan"), ("seed", "-1")])
def test_a_setting_outside_its_limits_is_refused_at_once(name: str, text: str) -> None:
    conversation = Conversation()
    with pytest.raises(MessageError, match=name):
        conversation.set(name, text)
    assert conversation.sampling == SamplingSettings()


def test_a_saved_conversation_loads_as_it_was(tmp_path: Path) -> None:
    conversation = Conversation(system="Sei kurz.")
    conversation.set("stop", "a|b")
    conversation.note("Größe?", "42 😀")
    conversation.save(tmp_path / "chat.json")
    assert Conversation.load(tmp_path / "chat.json") == conversation


def test_a_saved_conversation_is_its_owners_only(tmp_path: Path) -> None:
    Conversation().save(tmp_path / "chat.json")
    assert (tmp_path / "chat.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"system": None, "sampling": {"beams": 2, "stop": []}, "messages": []}),
        json.dumps({"system": None, "sampling": {"stop": []}, "messages": [{"role": "user"}]}),
        json.dumps(
            {
                "system": None,
                "sampling": {"stop": []},
                "messages": [{"role": "root", "content": "x"}],
            }
        ),
    ],
)
def test_a_file_that_is_no_conversation_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=r"chat\.json is not a saved conversation"):
        Conversation.load(file)


def test_files_that_cannot_be_reached_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        Conversation.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot write"):
        Conversation().save(tmp_path / "no" / "folder")


def test_turns_are_chat_messages() -> None:
    conversation = Conversation()
    conversation.note("a", "b")
    assert conversation.turns[0] == ChatMessage(role="user", content="a")


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "max_tokens", "seed"])
def test_none_gives_a_setting_back_to_the_model(name: str) -> None:
    conversation = Conversation()
    conversation.set(name, "1")
    conversation.set(name, "none")
    assert conversation.sampling == SamplingSettings()
