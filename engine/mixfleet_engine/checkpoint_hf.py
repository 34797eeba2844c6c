"""The Hugging Face layout: ``config.json`` and one or many ``model*.safetensors``."""

from pathlib import Path

from torch import Tensor

from mixfleet_engine.checkpoint_files import SafetensorFiles, TensorFiles, indexed_files
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.sharding import WHOLE

_WORDS = (
    ("tok_embeddings", "model.embed_tokens"),
    ("layers.", "model.layers."),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward", "block_sparse_moe"),
    ("output.", "lm_head."),
)


def open_hf_files(path: Path) -> TensorFiles:
    """Map the weight files of the folder.

    Raises:
        CheckpointError: There are none, or one cannot be read.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return SafetensorFiles(indexed_files(index))
    single = path / "model.safetensors"
    if single.is_file():
        return SafetensorFiles([single])
    raise CheckpointError(f"{path}: neither model.safetensors nor {index.name}")


class HfCheckpoint:
    """Weights under the engine's names; the rotary order is the engine's own already."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files

    @property
    def names(self) -> frozenset[str]:
        """Every name in the files."""
        return self._files.names

    def stored_name(self, name: str) -> str:
        """Return what the files call the weight ``name``."""
        if name == "norm.weight":
            return "model.norm.weight"
        for ours, theirs in _WORDS:
            name = name.replace(ours, theirs)
        return name

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the stored tensor of a weight of ``shape`` must have."""
        del name  # nothing is stacked here
        return shape

    def found_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored tensor of a weight."""
        return self._files.shape(self.stored_name(name))

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return these rows and columns of one weight, all by default."""
        return self._files.read(self.stored_name(name), rows, columns)
