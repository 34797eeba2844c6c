"""A conversation kept on the client's side: its turns, its system text and its settings."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixfleet_broker.errors import ConfigError, MessageError
from mixfleet_broker.job_codec import (
    validate,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    SamplingSettings,
    new_job_id,
)
from mixfleet_broker.sampling_codec import read_sampling, sampling_map
from mixfleet_broker.schema import Fields


def _integer_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _stop_strings(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else tuple(text.split("|"))


_READERS: dict[str, Callable[[str], Any]] = {
    "temperature": _number_or_none,
    "top_k": _integer_or_none,
    "top_p": _number_or_none,
    "max_tokens": _integer_or_none,
    "stop": _stop_strings,
    "seed": _integer_or_none,
    "min_p": _number_or_none,
    "repetition_penalty": _number_or_none,
    "presence_penalty": _number_or_none,
    "frequency_penalty": _number_or_none,
}
SETTING_NAMES = tuple(_READERS)


@dataclass(slots=True, kw_only=True)
class Conversation:
    """The turns so far; an answer that never came leaves no trace in them."""

    system: str | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    turns: list[ChatMessage] = field(default_factory=list)

    def asking(self, question: str) -> tuple[ChatMessage, ...]:
        """Return the messages to send when ``question`` comes next; nothing is noted yet."""
        system = (ChatMessage(role="system", content=self.system),) if self.system else ()
        return (*system, *self.turns, ChatMessage(role="user", content=question))

    def note(self, question: str, answer: str) -> bool:
        """Add a question and its answer, and say so; an empty answer adds neither."""
        if answer:
            self.turns.append(ChatMessage(role="user", content=question))
            self.turns.append(ChatMessage(role="assistant", content=answer))
        return bool(answer)

    def take_back(self) -> None:
        """Forget the last question and its answer, if there is one."""
        del self.turns[-2:]

    def settings(self) -> dict[str, Any]:
        """Return the settings by name; None, or nothing in it, is the fleet's own."""
        return {name: getattr(self.sampling, name) for name in SETTING_NAMES}

    def set(self, name: str, value: str) -> None:
        """Change one setting from its text; ``none`` unsets, stop strings are split at ``|``.

        Raises:
            ConfigError: There is no such setting, or the text is not of its type.
            MessageError: The value is outside its limits.
        """
        name = name.replace("-", "_")
        if name not in _READERS:
            raise ConfigError(f"no setting {name!r}; there are: {', '.join(SETTING_NAMES)}")
        try:
            sampling = replace(self.sampling, **{name: _READERS[name](value)})
        except ValueError as error:
            raise ConfigError(f"{name}={value}: {error}") from error
        # Now, rather than at the next question.
        validate(ChatJob(job_id=new_job_id(), model="any", prompt="any", sampling=sampling))
        self.sampling = sampling

    def save(self, path: Path) -> None:
        """Write the conversation to a JSON file that only its owner may read.

        Raises:
            ConfigError: The file cannot be written.
        """
        content = {
            "system": self.system,
            "sampling": sampling_map(self.sampling),
            "messages": [{"role": turn.role, "content": turn.content} for turn in self.turns],
        }
        try:
            path.touch(mode=0o600)
            path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file cannot be read or is not a saved conversation.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            turns = [_turn(entry) for entry in content["messages"]]
            sampling = read_sampling(Fields(content["sampling"], "sampling"))
            return cls(system=content["system"], sampling=sampling, turns=turns)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, MessageError) as error:
            raise ConfigError(f"{path} is not a saved conversation: {error}") from error


def _turn(entry: dict[str, Any]) -> ChatMessage:
    role, content = entry["role"], entry["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError(f"a turn of role {role!r}")
    return ChatMessage(role=role, content=content)
