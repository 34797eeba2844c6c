"""Rebuilds a model's tokenizer files from the metadata of its GGUF file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.gguf_file import GgufFile
from mixfleet_engine.sentencepiece_writer import Piece, sentencepiece_model

# Types of a token; sentencepiece uses the same numbers.
_NORMAL, _CONTROL = 1, 3
_SPECIAL_KEYS = ("bos", "eos")
_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What to write for a tokenizer."""

    files: Mapping[str, bytes]
    """``tokenizer.json`` or ``tokenizer.model``, by name."""
    config: Mapping[str, Any]
    """``tokenizer_config.json``, with the chat template if the file has one."""
    special_ids: Mapping[str, int]
    """``bos_token_id`` and ``eos_token_id``, as in ``config.json``."""


def read_tokenizer(file: GgufFile, *, context_length: int, vocab_size: int) -> TokenizerFiles:
    """Return the tokenizer that ``file`` describes.

    Args:
        file: The model.
        context_length: What the tokenizer's config is to say.
        vocab_size: Rows of the embedding; there may be fewer tokens, never more.

    Raises:
        CheckpointError: It is of a kind that cannot be rebuilt exactly, or metadata is missing.
    """
    kind = file.required("tokenizer.ggml.model", str)
    if kind == "gpt2":
        files = {"tokenizer.json": _bpe_json(file)}
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(file)}
    else:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model={kind!r} is not supported")
    special_ids = _special_ids(file)
    tokens = file.array("tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens, but the embedding has {vocab_size} rows"
        )
    config = _config(file, kind, tokens, special_ids)
    return TokenizerFiles(
        files=files,
        config={**config, "model_max_length": context_length},
        special_ids=special_ids,
    )


def _config(
    file: GgufFile, kind: str, tokens: Sequence[str], special_ids: Mapping[str, int]
) -> Mapping[str, Any]:
    adds_bos = file.optional("tokenizer.ggml.add_bos_token", bool)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        # llama.cpp's own defaults where the key is absent.
        "add_bos_token": kind == "llama" if adds_bos is None else adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    for key, token_id in special_ids.items():
        config[key.removesuffix("_id")] = tokens[token_id]
    template = file.optional("tokenizer.chat_template", str)
    return config if template is None else {**config, "chat_template": template}


def _special_ids(file: GgufFile) -> Mapping[str, int]:
    found: dict[str, int] = {}
    num_tokens = len(file.array("tokenizer.ggml.tokens"))
    for name in _SPECIAL_KEYS:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = file.optional(key, int)
        if token_id is None:
            continue
        if not 0 <= token_id < num_tokens:
            raise CheckpointError(f"{file.path}: {key}={token_id}: there are {num_tokens} tokens")
        found[f"{name}_token_id"] = token_id
    return found


def _pieces(file: GgufFile) -> tuple[Sequence[str], Sequence[int]]:
    """Return every token's spelling and type."""
    tokens = file.array("tokenizer.ggml.tokens")
    types = file.array("tokenizer.ggml.token_type")
    if len(tokens) != len(types):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types")
    return tokens, types


def _bpe_json(file: GgufFile) -> bytes:
    """Return ``tokenizer.json`` of a byte-level BPE tokenizer."""
    tokens, types = _pieces(file)
    rule = file.required("tokenizer.ggml.pre", str)
    pre_tokenizer = _pre_tokenizers().get(rule)
    if pre_tokenizer is None:
        known = ", ".join(_pre_tokenizers())
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre={rule!r} is not supported, only {known}"
        )
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token_id, tokens[token_id], kind == _CONTROL)
            for token_id, kind in enumerate(types)
            if kind != _NORMAL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer},
        "post_processor": None,
        "decoder": _byte_level(add_prefix_space=True),
        "model": _bpe_model(tokens, file.array("tokenizer.ggml.merges")),
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _bpe_model(tokens: Sequence[str], merges: Sequence[str]) -> Mapping[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: token_id for token_id, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }


def _byte_level(*, add_prefix_space: bool) -> Mapping[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def _pre_tokenizers() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Return how each known ``tokenizer.ggml.pre`` cuts text into words, before any merge."""
    byte_level = _byte_level(add_prefix_space=False)
    return {
        "gpt-2": [byte_level],
        "smollm": [{"type": "Digits", "individual_digits": True}, byte_level],
    }


def _added_token(token_id: int, content: str, special: bool) -> Mapping[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _sentencepiece(file: GgufFile) -> bytes:
    """Return ``tokenizer.model``: the metadata is a sentencepiece model's, so it becomes one."""
    if file.optional("tokenizer.ggml.remove_extra_whitespaces", bool) or file.has(_CHARSMAP):
        raise CheckpointError(f"{file.path}: a tokenizer that changes its text is not supported")
    tokens, types = _pieces(file)
    scores = file.array("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(scores)} scores")
    adds_space = file.optional("tokenizer.ggml.add_space_prefix", bool)
    special = _special_ids(file)
    return sentencepiece_model(
        [
            Piece(spelling=token, score=score, kind=kind)
            for token, score, kind in zip(tokens, scores, types, strict=True)
        ],
        bos_id=special.get("bos_token_id"),
        eos_id=special.get("eos_token_id"),
        adds_leading_space=True if adds_space is None else adds_space,
    )
