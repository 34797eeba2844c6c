"""Every setting of every process: one table that makes flags, variables, TOML keys and docs.

A setting is a field of :class:`Settings`; ``max_batch_size`` is the flag ``--max-batch-size``,
the variable ``MIXFLEET_MAX_BATCH_SIZE`` and the TOML key ``max_batch_size``. The first of these
that is given wins, then the default. This is the only module that reads the environment.
"""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, cast

from platformdirs import user_config_path, user_data_path

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.keys import PREFIX
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.setting_kinds import (
    Kind,
    choice,
    file_path,
    gibibytes,
    identifier,
    listen_address,
    redis_url,
    seconds,
    switch,
    text,
    whole,
    whole_or_auto,
)

ENV_PREFIX: Final = "MIXFLEET_"
CONFIG_VARIABLE: Final = "MIXFLEET_CONFIG"
CONFIG_FLAG: Final = "config"

_SERVICE_LINK: Final = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)
"""Kubernetes puts such variables into every pod beside a Service named mixfleet or mixfleet-x."""


def default_data_dir() -> Path:
    """Return the user's data directory for mixfleet, as the operating system has it."""
    return user_data_path("mixfleet")


def default_config_file() -> Path:
    """Return where the TOML file is read when ``MIXFLEET_CONFIG`` is not set."""
    return user_config_path("mixfleet") / "config.toml"


def _setting(kind: Kind, default: Any, help_text: str, *, shown: str = "", also: str = "") -> Any:
    """Declare one setting; ``shown`` words the default, ``also`` is a second variable."""
    metadata = {"kind": kind, "help": help_text, "shown": shown, "also": also}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings in force, checked."""

    redis: str | None = _setting(
        redis_url(),
        None,
        "Redis: redis://, rediss:// (TLS), unix:// or redis+sentinel://, see operations.md.",
        shown="the server that `mixfleet up` runs",
        also="REDIS_URL",
    )
    key_prefix: str = _setting(
        text(PREFIX.pattern, "must be up to 64 letters, digits and _ . : - { }"),
        "",
        "Before all keys in Redis, on a server that is shared; rq's tools from version 3 on follow "
        "with `RQ_KEY_PREFIX=<prefix>rq`.",
        shown="none",
    )
    data_dir: Path = _setting(  # noqa: RUF009 - it returns a dataclasses.field
        file_path(),
        default_data_dir,
        "Directory of downloaded models and of the embedded Redis.",
        shown="the user's data directory",
    )
    log_level: str = _setting(
        choice("debug", "info", "warning", "error"),
        "info",
        "Least severe log line shown; prompts and answers appear at debug only.",
    )

    model: str | None = _setting(
        identifier(),
        None,
        "Name of the model, which is the name of its queue.",
        shown="the only model served",
    )
    queue_limit: int = _setting(
        whole(at_least=1), 10_000, "Most jobs waiting for one model; more are refused."
    )
    queue_token_limit: int = _setting(
        whole(at_least=1),
        50_000_000,
        "Most tokens expected of the jobs waiting for one model, prompts and answers.",
    )
    tenant: str = _setting(
        identifier(), "default", "Whose jobs these are: fair shares and limits go by it."
    )
    tenant_queue_limit: int | None = _setting(
        whole(at_least=1),
        None,
        "Most jobs of one tenant waiting for one model.",
        shown="as `queue_limit`",
    )
    tenant_token_limit: int | None = _setting(
        whole(at_least=1),
        None,
        "Most tokens of one tenant waiting for one model.",
        shown="as `queue_token_limit`",
    )
    ageing_s: float = _setting(
        seconds(above=0),
        120.0,
        "How long a job waits before it moves up a class of priority, in seconds.",
    )
    durability: str = _setting(
        choice("server", "fsync", "replica"),
        "server",
        "What must have a job before its submit returns: Redis itself, its disk, or a replica.",
    )
    result_ttl_s: float = _setting(
        seconds(at_least=1), 900.0, "How long an answer can be read after its end, in seconds."
    )
    first_token_timeout_s: float | None = _setting(
        seconds(above=0),
        None,
        "Longest wait for the first piece of an answer, in seconds.",
        shown="no limit",
    )

    worker_id: str | None = _setting(
        identifier(),
        None,
        "Name of a worker, unique in the fleet.",
        shown="host name, process id and a random part",
    )
    model_path: Path | None = _setting(  # noqa: RUF009 - it returns a dataclasses.field
        file_path(), None, "Directory of the model's checkpoint.", shown="the demo model's"
    )
    chat_format: str | None = _setting(
        choice("mistral-v1", "mistral-v2", "mistral-v3", "aime", "chatml", "plain"),
        None,
        "How a conversation becomes a prompt.",
        shown="as the checkpoint was trained",
    )
    max_batch_size: int | None = _setting(
        whole_or_auto(at_least=1),
        None,
        "Most jobs that a worker generates at the same time.",
        shown="auto: what the memory holds, at most 32 on a CPU",
    )
    max_step_tokens: int = _setting(
        whole(at_least=1), 512, "Most tokens in one step; a longer prompt goes in chunks."
    )
    context_length: int | None = _setting(
        whole(at_least=1),
        None,
        "Most tokens of prompt and answer together.",
        shown="the model's own",
    )
    kv_cache_gib: float | None = _setting(
        gibibytes(),
        None,
        "Memory for the KV cache, in GiB; one request can use no more tokens than it holds.",
        shown="what a full batch needs, within reason",
    )
    prefix_cache: bool = _setting(
        switch(),
        default=True,
        help_text="Whether jobs share the KV cache of equal beginnings.",
        shown="`on`",
    )
    itl_target_s: float = _setting(
        seconds(above=0),
        0.1,
        "Longest pause between two tokens that prefilling another prompt may cause, in seconds.",
    )
    dtype: str = _setting(
        choice("auto", "float32", "bfloat16", "float16"),
        "auto",
        "Number type of weights, activations and KV cache.",
    )
    weight_dtype: str = _setting(
        choice("auto", "fp8", "int8", "int4"),
        "auto",
        "How the large matrices are stored; they are quantised while loading.",
        shown="auto: as in an AWQ or GPTQ checkpoint, else in `dtype`",
    )
    kv_dtype: str = _setting(
        choice("auto", "fp8"),
        "auto",
        "How keys and values are stored; fp8 takes half of bf16.",
        shown="auto: in `dtype`",
    )
    device: str = _setting(
        text(r"auto|cpu|cuda(:\d+)?", "must be auto, cpu, cuda or cuda:N"),
        "auto",
        "Where the engine computes.",
    )
    backend: str = _setting(
        choice("auto", "reference", "cpu", "native", "cuda"),
        "auto",
        "Which arithmetic the engine uses.",
    )
    batch_invariant: bool = _setting(
        switch(),
        default=True,
        help_text="Whether an answer may not depend, in its last bits, on who else is in the "
        "batch; off, a GPU takes shorter ways for few sequences.",
        shown="`on`",
    )
    cuda_graphs: bool = _setting(
        switch(),
        default=True,
        help_text="Whether decode steps are recorded as CUDA graphs.",
        shown="`on`",
    )
    tuning_s: float = _setting(
        seconds(at_least=0),
        15.0,
        "Longest time at a worker's start and first steps for choosing a GPU's tile sizes; the "
        "choices are kept on disk.",
    )
    threads: int | None = _setting(
        whole(at_least=1),
        None,
        "CPU threads of the engine, of each process that shares the model.",
        shown="all cores but one; shared out with --tp",
    )
    lease_s: float = _setting(
        seconds(at_least=1),
        15.0,
        "How long a worker that says nothing keeps its jobs, a gateway its batches, in seconds.",
    )
    max_losses: int = _setting(
        whole(at_least=1),
        3,
        "Workers that may die on a job before it has failed; its last run is alone on its worker.",
    )
    stall_s: float = _setting(
        seconds(above=0),
        60.0,
        "How long the engine may take for one step before its jobs go to another worker.",
    )
    drain_s: float = _setting(
        seconds(at_least=0),
        30.0,
        "How long a worker or gateway that was told to stop may finish its work, in seconds.",
    )

    listen: str = _setting(
        listen_address(),
        "127.0.0.1:8000",
        "Where a gateway listens; elsewhere than on loopback there must be an API key. "
        "Port 0 takes a free one.",
    )
    require_key: bool = _setting(
        switch(),
        default=False,
        help_text="Whether a gateway on loopback asks for an API key even while there is none.",
        shown="`off`",
    )
    on_disconnect: str = _setting(
        choice("cancel", "continue"),
        "cancel",
        "What becomes of a job whose HTTP client goes away, unless its request says otherwise.",
    )
    keep_alive_s: float = _setting(
        seconds(above=0),
        15.0,
        "How often a stream over HTTP that has nothing to say shows that it lives, in seconds.",
    )
    response_ttl_s: float = _setting(
        seconds(at_least=1),
        86_400.0,
        "How long a stored response of `/v1/responses` is kept after its end, in seconds.",
    )
    batch_max_bytes: int = _setting(
        whole(at_least=1024),
        64 << 20,
        "Largest file of requests for a batch, in bytes; a line of it is at most `max_body_bytes`.",
        shown="64 MiB",
    )
    batch_max_lines: int = _setting(
        whole(at_least=1), 50_000, "Most lines of a file of requests for a batch."
    )
    batch_stored_bytes: int = _setting(
        whole(at_least=1024),
        1 << 30,
        "How much the files of one tenant hold when another may be added, in bytes.",
        shown="1 GiB",
    )
    batch_in_flight: int = _setting(
        whole(at_least=1), 32, "Most lines of a batch that wait or run at the same time."
    )
    batch_ttl_s: float = _setting(
        seconds(at_least=1),
        604_800.0,
        "How long a file is kept after its upload, and a batch with its files after its end, in "
        "seconds.",
    )
    max_body_bytes: int = _setting(
        whole(at_least=1024), 4 << 20, "Largest body of an HTTP request, in bytes."
    )
    max_connections: int = _setting(
        whole(at_least=1), 8192, "Most HTTP connections of one gateway; more are refused."
    )
    cors_origins: str | None = _setting(
        text(r"\*|(https?://[^,\s]+)(,https?://[^,\s]+)*", "must be * or URLs with commas between"),
        None,
        "Web sites whose pages may call the gateway from a browser: URLs, or `*`.",
        shown="none",
    )
    aime_endpoints: Path | None = _setting(  # noqa: RUF009 - it returns a dataclasses.field
        file_path(),
        None,
        "An endpoint file in AIME's TOML form, or a directory of them.",
        shown="one endpoint per model, called like it",
    )
    vllm_metric_aliases: bool = _setting(
        switch(),
        default=False,
        help_text="Whether `/metrics` shows its numbers under vLLM's names too.",
        shown="`off`",
    )
    log_json: bool = _setting(
        switch(),
        default=False,
        help_text="Whether log lines are JSON objects.",
        shown="`off`",
    )


_TRACES_ENDPOINTS: Final = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table."""

    name: str
    """Field of :class:`Settings`, and its TOML key."""
    kind: Kind
    help: str
    default: str
    """In words, for people."""
    second_variable: str
    """Another variable that is honoured after its own; empty for none."""

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """Its variable in the environment."""
        return f"{ENV_PREFIX}{self.name.upper()}"


def _table() -> dict[str, Setting]:
    return {
        row.name: Setting(
            name=row.name,
            kind=row.metadata["kind"],
            help=row.metadata["help"],
            default=row.metadata["shown"] or f"`{row.default}`",
            second_variable=row.metadata["also"],
        )
        for row in fields(Settings)
    }


SETTINGS: Final[Mapping[str, Setting]] = _table()
"""All settings by name."""


def resolve(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Settings:
    """Return the settings in force: flags, then environment, then TOML, then defaults.

    Args:
        flags: Values by setting name; None stands for a flag that was not given.
        environ: Default: the environment of this process. An empty variable is not set.
        config_file: Default: ``MIXFLEET_CONFIG``, else the user's, which may be missing.

    Raises:
        ConfigError: A value cannot be used, or a name is unknown; the text names both.
    """
    environ = os.environ if environ is None else environ
    _refuse_unknown_variables(environ)
    values = _read_toml(config_file, environ) | _read_environment(environ)
    for name, value in (flags or {}).items():
        if name not in SETTINGS:
            raise ConfigError(f"{name}: no such setting{_nearest(name, SETTINGS)}")
        if value is not None:
            values[name] = _checked(SETTINGS[name], value, "")
    return Settings(**cast("Any", values))


def _checked(setting: Setting, value: object, source: str) -> object:
    try:
        return setting.kind.read(value)
    except ValueError as error:
        shown = safe_redis_url(value) if isinstance(value, str) else value
        where = f" ({source})" if source else ""
        raise ConfigError(f"{setting.name}={shown}: {error}{where}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for setting in SETTINGS.values():
        for variable in (setting.variable, setting.second_variable):
            if value := environ.get(variable):
                values[setting.name] = _checked(setting, value, variable)
                break
    return values


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {setting.variable for setting in SETTINGS.values()} | {CONFIG_VARIABLE}
    for variable in sorted(environ):
        if (
            variable.startswith(ENV_PREFIX)
            and variable not in known
            and not _SERVICE_LINK.search(variable)
        ):
            raise ConfigError(f"{variable}: no such setting{_nearest(variable, known)}")


def _read_toml(config_file: Path | None, environ: Mapping[str, str]) -> dict[str, object]:
    if config_file is None and environ.get(CONFIG_VARIABLE):
        config_file = Path(environ[CONFIG_VARIABLE]).expanduser()
    required = config_file is not None
    file = config_file or default_config_file()
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{CONFIG_FLAG}={file}: no such file") from None
        return {}
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, or not TOML
        raise ConfigError(f"{CONFIG_FLAG}={file}: {error}") from error
    for key in content:
        if key not in SETTINGS:
            raise ConfigError(f"{key}: no such setting{_nearest(key, SETTINGS)} (in {file})")
    return {key: _checked(SETTINGS[key], value, f"in {file}") for key, value in content.items()}


def _nearest(name: str, known: Iterable[str]) -> str:
    # One wrong word in a long name is still near: MIXFLEET_BATCH_SIZE, max_batch.
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else "; docs/settings.md lists them all"


def settings_markdown() -> str:
    """Return the table of docs/settings.md, which a test compares with this."""
    lines = ["| flag | variable | default | what it sets |", "|---|---|---|---|"]
    for setting in SETTINGS.values():
        variables = f"`{setting.variable}`"
        if setting.second_variable:
            variables += f", then `{setting.second_variable}`"
        flag = f"`{setting.flag} {setting.kind.metavar}`".replace("|", "\\|")
        lines.append(f"| {flag} | {variables} | {setting.default} | {setting.help} |")
    return "\n".join(lines) + "\n"


def traces_exporter(environ: Mapping[str, str] | None = None) -> str | None:
    """Return where OpenTelemetry's own variables send traces; None if they ask for none."""
    environ = os.environ if environ is None else environ
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    default = "otlp" if any(environ.get(name) for name in _TRACES_ENDPOINTS) else "none"
    exporter = environ.get("OTEL_TRACES_EXPORTER") or default
    return None if exporter == "none" else exporter
