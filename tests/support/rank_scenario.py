"""A batch that meets everything a scheduler does, and a program that runs it on one of N ranks.

    torchrun --nproc-per-node 2 -m support.rank_scenario CHECKPOINT ANSWERS.json DTYPE BACKEND

`MIXFLEET_*` settings play no part here: this is the engine alone.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from mixfleet_engine.config import Backend, EngineConfig
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import load_engine, load_runner
from mixfleet_engine.rank_runner import follow
from mixfleet_engine.request import GenerateRequest, SamplingParams
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.tiny_model import tiny_config

MODEL = tiny_config(vocab_size=301, n_heads=8, n_kv_heads=4, hidden_dim=128)
"""A vocabulary that neither 2 nor 4 ranks share equally, heads that both do."""
CONFIG = EngineConfig(
    dtype="float32",
    device="cpu",
    block_size=16,
    num_blocks=11,
    max_batch_size=5,
    max_step_tokens=24,
    itl_target_s=10.0,
)
NUM_TOKENS = 40
"""Of each answer; they make the prompts outgrow the cache together."""
GRAMMARS = {1: "start: /[a-c ]+/", 2: "start: /([0-9]{3}, )+/", 5: "start: /[^\\x00-\\x7f]+/"}
"""Of some requests, by their numbers; all go on for ever."""
TOKENIZER = ByteTokenizer()
JOIN_AT = {0: 3, 4: 2, 9: 1}
"""Step -> how many requests join before it."""


def requests() -> list[GenerateRequest]:
    """Long and short prompts, greedy and warm in turns."""
    lengths = (40, 3, 57, 1, 26, 33)
    generator = torch.Generator().manual_seed(5)
    warm = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7, repetition_penalty=1.1)
    return [
        make_request(
            str(number),
            prompt=torch.randint(MODEL.vocab_size, (length,), generator=generator).tolist(),
            max_tokens=NUM_TOKENS,
            sampling=warm if number % 2 else SamplingParams(logprobs=0),
            grammar=GRAMMARS.get(number),
        )
        for number, length in enumerate(lengths)
    ]


def run_scenario(engine: Engine, coming: Sequence[GenerateRequest] | None = None) -> Answers:
    """Return the answers; the last request joins in the middle of the others' answers."""
    coming = list(requests() if coming is None else coming)
    answers: Answers = {}
    step = 0
    while engine.has_work or coming:
        for _ in range(JOIN_AT.get(step, 0)):
            engine.submit(coming.pop(0))
        step_into(answers, engine)
        step += 1
    return answers


def config_of(dtype: str, backend: str) -> EngineConfig:
    """The scenario's settings with another arithmetic."""
    return replace(CONFIG, dtype=dtype, backend=cast("Backend", backend))


def main(checkpoint: Path, answers_file: Path, config: EngineConfig) -> None:
    """Run one rank; the first one writes what came of it.

    That is the answers, the number of preemptions, and the answers to each request alone.
    """
    from mixfleet_engine.parallel import TensorParallel
    from mixfleet_engine.rendezvous import Rendezvous

    rendezvous = Rendezvous.from_environment()
    assert rendezvous is not None, "start this with torchrun"
    with TensorParallel.connect(rendezvous, "cpu") as ranks:
        if rendezvous.shard.rank > 0:
            follow(load_runner(checkpoint, config, None, ranks), ranks)
            return
        engine = load_engine(checkpoint, config, None, ranks, TOKENIZER)
        found: dict[str, object] = {"answers": run_scenario(engine)}
        found["preemptions"] = engine.num_preemptions
        found["alone"] = {
            name: answer
            for request in requests()
            for name, answer in run_to_end(engine, [request]).items()
        }
        answers_file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), config_of(*sys.argv[3:]))
