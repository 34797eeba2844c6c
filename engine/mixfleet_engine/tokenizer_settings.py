"""What a checkpoint's small JSON files say about its tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mixfleet_engine.errors import CheckpointError

_MODEL_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """The keys of ``tokenizer_config.json`` and its neighbours that mixfleet reads."""

    bos_token: str | None = None
    eos_token: str | None = None
    bos_token_id: int | None = None
    """From the model's own config; it counts where ``bos_token`` is not given."""
    eos_token_id: int | None = None
    add_bos: bool = True
    """Whether a prompt begins with the BOS token."""
    chat_template: str | None = None

    @classmethod
    def beside(cls, tokenizer_file: Path) -> Self:
        """Return the settings of the checkpoint that ``tokenizer_file`` lies in.

        Files that are not there are no error: Mistral's own layout has none of them.

        Raises:
            CheckpointError: A file is no JSON object, or a key has the wrong type.
        """
        path = tokenizer_file.parent / "tokenizer_config.json"
        found = read_json_object(path)
        add_bos = found.get("add_bos_token", True)
        if not isinstance(add_bos, bool):
            raise CheckpointError(f"{path}: add_bos_token={add_bos!r}: must be true or false")
        model = [read_json_object(tokenizer_file.parent / name) for name in _MODEL_FILES]
        template = found.get("chat_template")
        return cls(
            bos_token=_token_text(found.get("bos_token")),
            eos_token=_token_text(found.get("eos_token")),
            bos_token_id=_first_id(model, "bos_token_id"),
            eos_token_id=_first_id(model, "eos_token_id"),
            add_bos=add_bos,
            # A list of named templates holds tool-use variants; none of them is read here.
            chat_template=template if isinstance(template, str) else None,
        )


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in ``path``, an empty one where there is no such file.

    Raises:
        CheckpointError: The file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return found


def _token_text(value: Any) -> str | None:
    """Return a token's spelling; older files wrap it as ``{"content": "<s>", ...}``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _first_id(configs: list[Mapping[str, Any]], key: str) -> int | None:
    """Return the first id given for ``key``; some files list several, the main one first."""
    for config in configs:
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None
