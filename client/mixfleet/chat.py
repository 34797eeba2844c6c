"""``mixfleet chat``: a chat in the terminal, one question, or a question from a pipe."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from mixfleet.console import Console
from mixfleet.conversation import Conversation
from mixfleet.display import Display, NoteHandler, stats_line
from mixfleet.fleet import Client
from mixfleet.local import local_command
from mixfleet.stream import ChatResult
from mixfleet_broker.errors import ConfigError
from mixfleet_broker.messages import (
    SamplingSettings,
)
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings

HISTORY_FILE = "chat_history"


@click.command()
@click.option("-q", "--question", help="Ask this, print the answer, and leave.")
@click.option("--system", help="Instruction put before the conversation.")
@click.option("--temperature", type=float, help="0 always takes the most likely token.")
@click.option("--top-k", type=int, help="Choose among the K most likely tokens; 0 is all.")
@click.option("--top-p", type=float, help="Choose among the tokens that reach this probability.")
@click.option("--min-p", type=float, help="Choose among tokens of this share of the likeliest's.")
@click.option("--repetition-penalty", type=float, help="Above 1, words that were there come less.")
@click.option("--presence-penalty", type=float, help="Above 0, words of the answer come less.")
@click.option("--frequency-penalty", type=float, help="The same, by how often they are there.")
@click.option("--max-tokens", type=int, help="Longest answer, in tokens.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@click.option("--seed", type=int, help="The same seed and question give the same answer.")
@click.option("--stats", is_flag=True, help="Say what each answer took, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="With one question: print a JSON object.")
@click.option(
    "--local",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Load this checkpoint and chat with it here, without any fleet.",
)
@setting_options(
    "redis", "model", "data_dir", "key_prefix", "tenant", "first_token_timeout_s", "log_level"
)
def chat(
    settings: Settings,
    question: str | None,
    system: str | None,
    stats: bool,
    as_json: bool,
    local: Path | None,
    **sampling: Any,
) -> None:
    """Chat with a model of the fleet.

    In a terminal this is a conversation: /help lists its commands, Ctrl-C stops an answer and
    Ctrl-D leaves. With -q, or when something is piped in, it answers once: the answer goes to
    stdout and all else to stderr.
    """
    if sys.stdout is None:
        raise click.UsageError("no stdout to write an answer to")
    given = {name: value for name, value in sampling.items() if value not in (None, ())}
    if question is None and not stdin_is_terminal():
        question = _piped_text()
    if as_json and question is None:
        raise click.UsageError("--json needs a question: -q or a pipe")
    if local is not None:
        if as_json:
            raise click.UsageError("--json works with a fleet only")
        command = local_command(
            local, question=question, system=system, sampling=given, shows_stats=stats
        )
        os.execv(command[0], command)
    conversation = Conversation(system=system, sampling=SamplingSettings(**given))
    display = Display(sys.stdout, sys.stderr)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[NoteHandler(display)])
    with _leaving_on_signals(), Client(settings=settings) as client:
        if question is not None:
            _answer_once(client, conversation, question, display, stats=stats, as_json=as_json)
            return
        model = client.choose_model()
        display.note(f"{model} listens. /help lists the commands, Ctrl-D leaves.")
        read_line = line_reader(settings.data_dir)
        Console(client, model, conversation, display, read_line, shows_stats=stats).run()


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Leave all blocks, which cancels the answer, when the terminal closes or a kill asks."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answer_once(
    client: Client,
    conversation: Conversation,
    question: str,
    display: Display,
    *,
    stats: bool,
    as_json: bool,
) -> None:
    if not question.strip():
        raise click.UsageError("the question is empty")
    sampling = conversation.settings()
    with client.chat(
        conversation.asking(question), priority="interactive", on_disconnect="cancel", **sampling
    ) as stream:
        if as_json:
            result = stream.result()
            click.echo(_as_json(result))
        else:
            workers = client.num_workers(stream.model)
            result = display.answer(stream, num_workers=workers)
    if stats:
        display.note(stats_line(result))


def _piped_text() -> str:
    if sys.stdin is None:
        raise click.UsageError("no question: -q gives one where nothing can be piped in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"what is piped in is not {error.encoding} text") from error


def _as_json(result: ChatResult) -> str:
    shown = asdict(result)
    del shown["logprobs"]  # which are bytes, and no flag asks for them
    return json.dumps(shown, ensure_ascii=False)


def stdin_is_terminal() -> bool:
    """Return whether somebody is there to type."""
    # Python has no stdin at all where it was closed, as a daemon's is.
    return sys.stdin is not None and sys.stdin.isatty()


def line_reader(data_dir: Path) -> Callable[[str], str]:
    """Return a reader of lines with editing and a history that outlives the chat.

    Raises:
        ConfigError: The history cannot be kept in ``data_dir``.
    """
    # Here, because it takes a third of a second that a question with -q need not wait.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    history = data_dir / HISTORY_FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)  # it holds what the user wrote
    except OSError as error:
        raise ConfigError(f"data_dir={data_dir}: {error.strerror}") from error
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)))
    return session.prompt
