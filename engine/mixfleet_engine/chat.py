"""A chat in the terminal with an engine of its own: ``python -m mixfleet_engine.chat``.

Under ``torchrun --nproc-per-node N`` the N processes share the model, and the first one talks.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO, get_args

from mixfleet_engine.chat_format import FORMATS, chat_format, default_format
from mixfleet_engine.config import Backend, EngineConfig, WeightDtype, checkpoint_layout
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.errors import EngineError
from mixfleet_engine.generation import sampling_defaults
from mixfleet_engine.local_chat import LocalChat
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.terminal_chat import TerminalChat
from mixfleet_engine.tokenizer import load_tokenizer

PLAIN = "plain"
_INTERRUPTED = 130
"""What a shell says of a program ended by Ctrl-C: 128 + SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        # What is still in the buffer goes nowhere, or Python would complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixfleet_engine.chat", description=__doc__)
    add = parser.add_argument
    add("--ckpt-dir", "--ckpt_dir", type=Path, required=True, help="the checkpoint's directory")
    add("--tokenizer", "--tokenizer_path", type=Path, help="default: the checkpoint's own")
    add("--chat-format", choices=sorted(FORMATS), help="default: as the checkpoint was trained")
    add("--plain", action="store_true", help="continue a text instead of answering in turns")
    add("--system", default="", help="instruction in front of the conversation")
    add("--question", "-q", help="answer this and leave")
    add("--temperature", type=float, help="0 always takes the most likely token")
    add("--top-k", "--top_k", type=int)
    add("--top-p", "--top_p", type=float)
    add("--seed", type=int, default=0)
    add("--max-tokens", "--max_gen_tokens", type=int, help="longest answer")
    add("--context-length", "--max_seq_len", type=int)
    add("--dtype", default="auto")
    add("--weight-dtype", choices=get_args(WeightDtype), default="auto")
    add("--backend", choices=get_args(Backend), default="auto")
    add("--device", default="auto")
    add("--threads", type=int)
    add("--stats", action="store_true", help="say what each answer took")
    return parser


def _run(given: argparse.Namespace) -> int:
    checkpoint_layout(given.ckpt_dir)  # a wrong directory is found before anything is loaded
    tokenizer = load_tokenizer(given.tokenizer or given.ckpt_dir)
    found = None
    if not given.plain:
        name = given.chat_format or default_format(tokenizer, given.tokenizer or given.ckpt_dir)
        found = None if name == PLAIN else chat_format(name, tokenizer)
    with _engine(given) as engine:
        if engine is None:  # a rank that followed the first one to its end
            return 0
        chat = LocalChat(
            engine,
            tokenizer,
            found,
            sampling=_sampling(given),
            max_tokens=given.max_tokens,
            system_prompt=given.system,
        )
        terminal = TerminalChat(chat, sys.stdout, sys.stderr, shows_stats=given.stats)
        if given.question is None:
            terminal.run(input)
        else:
            terminal.answer(given.question)
    return 0


@contextmanager
def _engine(given: argparse.Namespace) -> Iterator[GenerationEngine | None]:
    """Give the engine, or None on a rank that has followed the first one until its end."""
    # Here, because torch takes seconds that a wrong flag need not wait for.
    from mixfleet_engine.loading import load_engine, load_runner
    from mixfleet_engine.rank_runner import follow

    config = EngineConfig(
        max_batch_size=1,
        context_length=given.context_length,
        dtype=given.dtype,
        weight_dtype=given.weight_dtype,
        backend=given.backend,
        device=given.device,
        threads=given.threads,
    )
    rendezvous = Rendezvous.from_environment()
    if rendezvous is None:
        yield load_engine(given.ckpt_dir, config, _progress(sys.stderr))
        return
    from mixfleet_engine.parallel import TensorParallel

    with TensorParallel.connect(rendezvous, given.device) as ranks:
        own = replace(config, device=ranks.device)
        if ranks.shard.rank == 0:
            yield load_engine(given.ckpt_dir, own, _progress(sys.stderr), ranks)
            return
        runner = load_runner(given.ckpt_dir, own, ranks=ranks)
        # Ctrl-C goes to all processes of a terminal, and the first one stops an answer with it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        follow(runner, ranks)
        yield None


def _sampling(given: argparse.Namespace) -> SamplingParams:
    own = sampling_defaults(given.ckpt_dir)
    return SamplingParams(
        temperature=own.temperature if given.temperature is None else given.temperature,
        top_k=own.top_k if given.top_k is None else given.top_k,
        top_p=own.top_p if given.top_p is None else given.top_p,
        seed=given.seed,
    )


def _progress(notes: TextIO) -> Callable[[int, int], None]:
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if notes.isatty() and percent != shown:
            shown = percent
            end = "\n" if done == total else ""
            print(f"\rloading {percent:3d} %", end=end, file=notes, flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main())
