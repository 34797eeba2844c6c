"""Endpoint files in AIME's TOML form, checked when the gateway starts.

What they say of keys and workers is passed over: here keys are those of `mixfleet key`, and a
worker needs none.
"""

import logging
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from mixfleet_broker.errors import ConfigError, MessageError
from mixfleet_broker.gateway.aime_endpoints import (
    DEFAULT_OUTPUTS,
    DEFAULT_PROGRESS_OUTPUTS,
    IMPLICIT_INPUTS,
    Endpoint,
    Input,
    inputs_of_chat,
)
from mixfleet_broker.names import check_model_name

logger = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 1 << 20
_TYPES: Final = {"str": "string", "int": "integer"}
"""Short and long names of the same types."""
_TYPES_OF_INPUTS: Final[dict[str, tuple[str, ...]]] = {
    "prompt_input": ("string",),
    "chat_context": ("json", "chat_context"),
    "text_context": ("text_context", "string"),
    "top_k": ("integer",),
    "top_p": ("float",),
    "temperature": ("float",),
    "max_gen_tokens": ("integer",),
    "seed": ("integer",),
}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERNS: Final = ("**/*.cfg", "**/*.toml")


def read_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """Return the endpoints of a file, or of all files below a directory.

    Raises:
        ConfigError: There is none, or one cannot be used; the text names the file and the field.
    """
    files = [path] if path.is_file() else sorted({f for p in _PATTERNS for f in path.glob(p)})
    if not files:
        raise ConfigError(f"aime_endpoints={path}: no such file, and no *.cfg or *.toml below it")
    found: dict[str, Path] = {}
    endpoints = []
    for file in files:
        endpoint = read_endpoint(file)
        if endpoint.name in found:
            raise ConfigError(
                f"{file}: ENDPOINT.name={endpoint.name!r}: {found[endpoint.name]} has it too"
            )
        found[endpoint.name] = file
        endpoints.append(endpoint)
    return tuple(endpoints)


def check_names(endpoints: Sequence[Endpoint], is_taken: Callable[[str], bool]) -> None:
    """Raise unless every endpoint can be reached: other routes come first.

    Args:
        endpoints: Of files.
        is_taken: Whether another route has a path.

    Raises:
        ConfigError: One is called like a path of the gateway's own.
    """
    for endpoint in endpoints:
        if is_taken(f"/{endpoint.name}"):
            raise ConfigError(
                f"ENDPOINT.name={endpoint.name!r}: /{endpoint.name} is a path of the gateway's own"
            )


def read_endpoint(file: Path) -> Endpoint:
    """Return the endpoint that a file describes.

    Raises:
        ConfigError: It cannot be used; the text names the file and the field.
    """
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: more than {MAX_FILE_BYTES} bytes")
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return _Reader(file).endpoint(content)


class _Reader:
    """Reads one file; every error names it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def endpoint(self, content: Mapping[str, Any]) -> Endpoint:
        section = self._table(content, "ENDPOINT", "ENDPOINT")
        worker = self._table(content, "WORKER", "WORKER")
        progress = self._table(content, "PROGRESS", "PROGRESS", needed=False)
        name = self._text(section, "ENDPOINT.name")
        if not _NAME.fullmatch(name):
            raise self._wrong("ENDPOINT.name", name, f"must match {_NAME.pattern}")
        return Endpoint(
            name=name,
            model=self._model(worker),
            title=self._text(section, "ENDPOINT.title", name),
            description=self._text(section, "ENDPOINT.description", ""),
            version=self._version(section),
            methods=self._methods(section),
            category=self._text(section, "ENDPOINT.category", "chat"),
            inputs=self._inputs(self._table(content, "INPUTS", "INPUTS", needed=False)),
            outputs=self._outputs(content, "OUTPUTS", DEFAULT_OUTPUTS),
            progress_outputs=self._outputs(
                progress, "OUTPUTS", DEFAULT_PROGRESS_OUTPUTS, "PROGRESS.OUTPUTS"
            ),
        )

    def _version(self, section: Mapping[str, Any]) -> int:
        given = self._number(section, "ENDPOINT.version", whole=True)
        return 1 if given is None else int(given)

    def _model(self, worker: Mapping[str, Any]) -> str:
        name = self._text(worker, "WORKER.job_type")
        try:
            return check_model_name(name)
        except MessageError as error:
            raise ConfigError(f"{self._file}: WORKER.job_type: {error}") from None

    def _methods(self, section: Mapping[str, Any]) -> tuple[str, ...]:
        given = section.get("methods", ["GET", "POST"])
        known = isinstance(given, list) and all(m in ("GET", "POST") for m in given)
        if not known or not given:
            raise self._wrong("ENDPOINT.methods", given, "must be a list of GET and POST")
        return tuple(given)

    def _inputs(self, section: Mapping[str, Any]) -> tuple[Input, ...]:
        if not section:
            return inputs_of_chat()
        inputs = [
            self._input(name, self._table(section, name, f"INPUTS.{name}"))
            for name in section
            if name not in IMPLICIT_INPUTS
        ]
        if not {"prompt_input", "chat_context", "text_context"} & {one.name for one in inputs}:
            raise ConfigError(
                f"{self._file}: INPUTS: there must be prompt_input, chat_context or text_context"
            )
        return tuple(inputs)

    def _input(self, name: str, table: Mapping[str, Any]) -> Input:
        where = f"INPUTS.{name}"
        if name not in _TYPES_OF_INPUTS:
            known = ", ".join(_TYPES_OF_INPUTS)
            raise ConfigError(f"{self._file}: {where}: cannot be served; inputs are {known}")
        given = self._text(table, f"{where}.type")
        kind = _TYPES.get(given, given)
        if kind not in _TYPES_OF_INPUTS[name]:
            must = " or ".join(_TYPES_OF_INPUTS[name])
            raise self._wrong(f"{where}.type", given, f"must be {must}")
        required = table.get("required", False)
        if not isinstance(required, bool):
            raise self._wrong(f"{where}.required", required, "must be true or false")
        whole = kind == "integer"
        most = self._number(table, f"{where}.max_length", whole=True)
        found = Input(
            name=name,
            type=kind,
            minimum=self._bound(table, where, ("minimum", "min"), whole=whole),
            maximum=self._bound(table, where, ("maximum", "max"), whole=whole),
            max_length=None if most is None else int(most),
            default=table.get("default"),
            required=required,
        )
        self._check_default(found, where)
        return found

    def _check_default(self, one: Input, where: str) -> None:
        low, high = one.minimum, one.maximum
        if low is not None and high is not None and low > high:
            raise self._wrong(f"{where}.minimum", low, f"is above the maximum {high}")
        if one.default is None:
            return
        if one.type not in ("integer", "float"):
            if not isinstance(one.default, str):
                raise self._wrong(f"{where}.default", one.default, "must be a text")
            return
        whole = one.type == "integer"
        value = self._number({"default": one.default}, f"{where}.default", whole=whole)
        assert value is not None
        if (low is not None and value < low) or (high is not None and value > high):
            raise self._wrong(f"{where}.default", value, f"must be from {low} to {high}")

    def _outputs(
        self, content: Mapping[str, Any], name: str, known: Mapping[str, str], where: str = ""
    ) -> Mapping[str, str]:
        where = where or name
        section = self._table(content, name, where, needed=False)
        if not section:
            return known
        found = {}
        for output in section:
            self._table(section, output, f"{where}.{output}")
            if output in known:
                found[output] = known[output]
            elif output != "error":  # an error is an answer of its own, with a status
                logger.warning("%s: %s.%s: is never given", self._file, where, output)
        return found

    def _bound(
        self, table: Mapping[str, Any], where: str, names: Sequence[str], *, whole: bool
    ) -> float | None:
        for name in names:
            if name in table:
                return self._number(table, f"{where}.{name}", whole=whole)
        return None

    def _number(self, table: Mapping[str, Any], where: str, *, whole: bool) -> float | None:
        value = table.get(where.rpartition(".")[2])
        if value is None:
            return None
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "a whole number" if whole else "a number"
            raise self._wrong(where, value, f"must be {what}")
        return cast("float", value)

    def _text(self, table: Mapping[str, Any], where: str, default: str | None = None) -> str:
        value = table.get(where.rpartition(".")[2], default)
        if value is None:
            raise ConfigError(f"{self._file}: {where}: is missing")
        if not isinstance(value, str):
            raise self._wrong(where, value, "must be a text")
        return value

    def _table(
        self, content: Mapping[str, Any], name: str, where: str, *, needed: bool = True
    ) -> Mapping[str, Any]:
        value = content.get(name)
        if value is None and not needed:
            return {}
        if not isinstance(value, dict):
            what = "is missing" if value is None else "must be a table"
            raise ConfigError(f"{self._file}: {where}: {what}")
        return value

    def _wrong(self, where: str, value: object, must: str) -> ConfigError:
        return ConfigError(f"{self._file}: {where}={value!r:.80}: {must}")
