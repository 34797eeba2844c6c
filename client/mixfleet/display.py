"""Shows answers and notes on a terminal, and plainly in a pipe.

Answers go to stdout; all else goes to stderr, so that ``mixfleet chat -q ... > file`` holds the
answer only.
"""

import logging
from typing import TextIO

import click
from rich.console import Console

from mixfleet.stream import ChatResult, ChatStream
from mixfleet_broker.messages import (
    JobEnd,
    TokenChunk,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.shown import format_age

POSITION_EVERY_S = 0.5
"""How often its place is looked up on a terminal; tokens are pushed, not looked up."""

# A model may write anything; on a terminal a control character would be a command to it.
_VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), ord("�"))}


class Display:
    """Where one chat is shown.

    Args:
        out: The answers' stream.
        err: The notes' stream.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err
        self._out_is_terminal = Console(file=out).is_terminal
        console = Console(file=err)
        self._shows_status = console.is_terminal and not console.is_dumb_terminal
        self._status = ""

    def answer(self, stream: ChatStream, *, num_workers: int) -> ChatResult:
        """Show an answer while it is written, and its place in the queue before it begins.

        Args:
            stream: The answer; read up to its end.
            num_workers: How many workers serve its model; for the note that there is none.

        Raises:
            JobError: The job did not end with an answer.
        """
        if not num_workers:
            self.note(f"no worker serves {stream.model!r} yet; the question waits in the queue")
        try:
            self._wait_for_first_token(stream)
            self._write(stream.text)
            for text in stream:
                self._write(text)
        finally:
            self._set_status("")
            if stream.text and not stream.text.endswith("\n"):
                self._write("\n")
        result = stream.result()
        if result.finish_reason == "length":
            self.note("[cut at the longest answer allowed; --max-tokens or /set max_tokens]")
        return result

    def note(self, text: str) -> None:
        """Show a line that is not part of an answer."""
        self._set_status("")
        click.echo(text, file=self._err)

    def _wait_for_first_token(self, stream: ChatStream) -> None:
        if not self._shows_status:
            return
        while True:
            self._set_status(waiting_line(stream.status()))
            event = stream.next_event(timeout_s=POSITION_EVERY_S)
            if isinstance(event, JobEnd | TokenChunk):
                self._set_status("")
                return

    def _write(self, text: str) -> None:
        if self._out_is_terminal:
            text = text.translate(_VISIBLE_CONTROLS)
        self._out.write(text)
        self._out.flush()

    def _set_status(self, text: str) -> None:
        """Overwrite the status line in place; empty removes it."""
        if text == self._status:
            return
        self._err.write("\r" + text.ljust(len(self._status)))
        if not text:
            self._err.write("\r")
        self._err.flush()
        self._status = text


class NoteHandler(logging.Handler):
    """Shows log lines as notes, so that they do not run into the status line."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show one line."""
        self._display.note(f"{record.levelname.lower()}: {record.getMessage()}")


def waiting_line(info: JobInfo) -> str:
    """Return what is happening to a job that has said nothing yet, in a few words."""
    if info.outlook == "suspect":
        return "queued, to be run alone: workers that ran it died"
    if info.position is None:
        return "reading the prompt"
    line = f"queued, position {info.position + 1}"
    if info.outlook == "no_worker":
        return f"{line}, no worker yet"
    if info.outlook == "paused":
        return f"{line}, the workers are paused"
    return line if info.eta_s is None else f"{line}, about {format_age(info.eta_s)}"


def stats_line(result: ChatResult) -> str:
    """Return what an answer took, in one line."""
    parts = [f"{result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens"]
    if result.ttft_s is not None and result.total_s is not None:
        parts.append(f"first token {result.ttft_s * 1000:.0f} ms")
        decode_s = result.total_s - result.ttft_s
        if result.usage.completion_tokens > 1 and decode_s > 0:
            parts.append(f"{(result.usage.completion_tokens - 1) / decode_s:.1f} tokens/s")
        parts.append(f"total {result.total_s:.1f} s")
    if result.worker_ids:
        parts.append(f"worker {', '.join(result.worker_ids)}")
    parts.append(f"job {result.job_id}")
    return f"[{' · '.join(parts)}]"
