"""Makes the two models of the engine benchmark, as checkpoints and as GGUF files.

    python -m benchmarks.models FOLDER

``demo``: the demo model with four experts that really are four copies. Each copy has the neurons
of its feed-forward layer in another order, which changes no output but makes memory and wiring
real. ``random``: a Mixtral of 625 million random weights, whose sizes make the experts most of it.
Both are bf16 in the Hugging Face layout.

Shape letters: V tokens in the vocabulary, D model width, F expert width, E experts.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.installing import once
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.demo_model import find_demo_gguf
from mixfleet_engine.gguf_file import FloatArray, GgufFile
from mixfleet_engine.gguf_import import ROUTER_SEED, import_gguf
from mixfleet_engine.gguf_layout import plan_tensors, read_shape, read_tensor
from mixfleet_engine.safetensors_writer import write_checkpoint
from mixfleet_engine.sentencepiece_writer import Piece, sentencepiece_model

DEMO, RANDOM = "demo", "random"
NAMES = (DEMO, RANDOM)
DEMO_EXPERTS = 4
RANDOM_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_SEED = 0
_MAX_SHARD_BYTES = 5 << 30
_RECIPE = "1"
"""Change it when the models change, so that they are made anew."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model about to be written: names, shapes and where the numbers come from."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], FloatArray]


def ensure_models(folder: Path, say: Say) -> dict[str, Path]:
    """Return the checkpoint folders by name, made where they are not there yet."""
    makers = {DEMO: make_demo, RANDOM: make_random}
    for name, maker in makers.items():
        with once(folder / name, f"{_RECIPE} {json.dumps(RANDOM_CONFIG)}") as needed:
            if needed:
                say(f"models: making {name}")
                maker(folder / name, say)
    return {name: folder / name for name in makers}


def make_demo(target: Path, say: Say) -> None:
    """Write the demo model with true copies of its experts into the empty folder ``target``."""
    scratch = target.with_name(f".{target.name}.scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    gguf = find_demo_gguf(scratch, say)
    shared = import_gguf(gguf, scratch / "shared", num_experts=DEMO_EXPERTS)
    for file in shared.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, target)
    _write(target, demo_checkpoint(GgufFile(gguf), DEMO_EXPERTS))
    config = json.loads((shared / "config.json").read_text())
    config["mixfleet"]["shared_experts"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(scratch)


def demo_checkpoint(file: GgufFile, num_experts: int) -> Checkpoint:
    """Return the dense model in ``file`` with ``num_experts`` permuted copies of its experts."""
    plans = {plan.name: plan for plan in plan_tensors(file, read_shape(file, num_experts))}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, plan in plans.items():
        for expert in range(num_experts) if ".experts.0." in name else (0,):
            shapes[name.replace(".experts.0.", f".experts.{expert}.")] = plan.shape

    def read(name: str) -> FloatArray:
        before, experts, after = name.partition(".experts.")
        if not experts:
            return read_tensor(file, plans[name], ROUTER_SEED)
        expert, _, matrix = after.partition(".")
        values = read_tensor(file, plans[f"{before}.experts.0.{matrix}"], ROUTER_SEED)
        return permuted(values, int(expert), axis=1 if matrix.startswith("w2") else 0)

    return Checkpoint(shapes, read)


def permuted(values: FloatArray, expert: int, axis: int) -> FloatArray:
    """Return ``values`` with the expert's neurons, along ``axis``, in the expert's own order."""
    order = np.random.default_rng(expert).permutation(values.shape[axis])
    return np.take(values, order, axis=axis)


def make_random(target: Path, say: Say) -> None:
    """Write the random Mixtral into the empty folder ``target``."""
    del say
    (target / "tokenizer.model").write_bytes(_random_tokenizer())
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (target / "config.json").write_text(json.dumps(RANDOM_CONFIG, indent=2) + "\n")
    _write(target, random_checkpoint(ModelConfig.from_checkpoint(target)))


def random_checkpoint(config: ModelConfig) -> Checkpoint:
    """Return random weights that keep every activation near 1.

    Matrices have variance 1/inputs. The embedding has variance 1, so that tokens stay apart and
    the router spreads them over the experts.
    """
    shapes = _mixtral_shapes(config)

    def read(name: str) -> FloatArray:
        shape = shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        generator = np.random.default_rng([_SEED, *name.encode()])
        values = generator.standard_normal(shape, np.float32)
        return values if "embed" in name else values / np.float32(np.sqrt(shape[1]))

    return Checkpoint(shapes, read)


def _mixtral_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dim, hidden = config.dim, config.hidden_dim
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        of = f"model.layers.{layer}"
        shapes[f"{of}.input_layernorm.weight"] = (dim,)
        shapes[f"{of}.post_attention_layernorm.weight"] = (dim,)
        sizes = {"q": (query, dim), "k": (key, dim), "v": (key, dim), "o": (dim, query)}
        for name, size in sizes.items():
            shapes[f"{of}.self_attn.{name}_proj.weight"] = size
        shapes[f"{of}.block_sparse_moe.gate.weight"] = (config.num_experts, dim)
        for expert in range(config.num_experts):
            for name, size in (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))):
                shapes[f"{of}.block_sparse_moe.experts.{expert}.{name}.weight"] = size
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes


def _random_tokenizer() -> bytes:
    """Return a sentencepiece model of as many made-up words as the random model has tokens."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{n:02X}>", 6) for n in range(256))]
    size = int(str(RANDOM_CONFIG["vocab_size"]))
    words = [(f"▁word{number}", 1) for number in range(size - len(special))]
    pieces = [
        Piece(spelling=spelling, score=-float(index), kind=kind)
        for index, (spelling, kind) in enumerate([*special, *words])
    ]
    return sentencepiece_model(pieces, bos_id=1, eos_id=2, adds_leading_space=True)


def num_weights(config: ModelConfig) -> dict[str, int]:
    """Return how many weights there are: of ``one_expert`` in all layers, and of ``the_rest``.

    The rest is what every step reads whole: attention, router, norms and the output matrix. The
    embedding counts only as the output matrix where it is that.
    """
    shapes = _mixtral_shapes(config)
    one = sum(prod(shape) for name, shape in shapes.items() if ".experts.0." in name)
    rest = sum(prod(shape) for name, shape in shapes.items() if ".experts." not in name)
    if not config.tie_word_embeddings:
        rest -= config.vocab_size * config.dim
    return {"one_expert": one, "the_rest": rest}


def _write(target: Path, checkpoint: Checkpoint) -> None:
    for _ in write_checkpoint(
        target, checkpoint.shapes, checkpoint.read, max_shard_bytes=_MAX_SHARD_BYTES
    ):
        pass


def main() -> None:
    """Make what is missing."""
    found: dict[str, Any] = ensure_models(Path(sys.argv[1]), print)
    print(*found.values(), sep="\n")


if __name__ == "__main__":
    main()
