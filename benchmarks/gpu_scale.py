"""How large the GPU benchmark is: Mixtral 8x7B in full, or tiny, to try it anywhere."""

from dataclasses import dataclass, replace
from typing import Final

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.published import PUBLISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests that are all there at once."""

    name: str
    num_requests: int
    prompt_tokens: int
    """Of each, or on average."""
    output_tokens: int
    """Of each, or on average."""
    is_drawn: bool = False
    """Whether lengths are drawn around these, and not all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the model and of everything that is measured."""

    model: ModelConfig
    num_blocks: int | None
    """KV cache; None: all the memory that is left, as by default."""
    max_step_tokens: int
    batches: tuple[int, ...]
    """Of the decode table, ascending."""
    context: int
    """Prompt tokens of each sequence in it."""
    steps: int
    """Decode steps timed per batch."""
    compared_batches: tuple[int, ...]
    """At which the cost of batch invariance is measured."""
    kernel_batches: tuple[int, ...]
    """At which kernels are timed one by one."""
    traffics: tuple[Traffic, ...]
    itl_decoders: int
    long_prompt: int
    """Tokens of the prompt that is prefilled beside them."""
    copy_bytes: int
    matrix_size: int
    """Of the square products that give the matrix rate."""
    few_layers: int
    """Of the bf16 model and of transformers where all layers do not fit."""
    peer_batches: tuple[int, ...]

    @property
    def max_batch_size(self) -> int:
        """Most sequences of a step."""
        return max(*self.batches, self.itl_decoders + 1)

    @property
    def room(self) -> int:
        """Tokens that a sequence of the decode table may add to its prompt."""
        return 2 * self.steps + 64

    def with_layers(self, num_layers: int) -> "Scale":
        """Return the same with another number of layers."""
        return replace(self, model=replace(self.model, n_layers=num_layers))


FULL: Final = Scale(
    # Room for a prompt of 32,768 tokens and an answer.
    model=replace(PUBLISHED["mixtral-8x7b"], context_length=36_864),
    num_blocks=None,
    max_step_tokens=8192,
    batches=(1, 8, 16, 32, 64, 128, 256),
    context=1024,
    steps=64,
    compared_batches=(1, 64),
    kernel_batches=(1, 16, 64, 256),
    traffics=(
        Traffic(name="1000/1000", num_requests=256, prompt_tokens=1000, output_tokens=1000),
        Traffic(name="128/128", num_requests=1024, prompt_tokens=128, output_tokens=128),
        Traffic(name="mix", num_requests=1024, prompt_tokens=400, output_tokens=145, is_drawn=True),
    ),
    itl_decoders=16,
    long_prompt=32_768,
    copy_bytes=4 << 30,
    matrix_size=8192,
    few_layers=4,
    peer_batches=(1, 16),
)
TINY: Final = Scale(
    model=ModelConfig(
        dim=128,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=128,
        hidden_dim=128,
        vocab_size=512,
        num_experts=4,
        experts_per_token=2,
        context_length=512,
    ),
    num_blocks=96,
    max_step_tokens=128,
    batches=(1, 2, 4),
    context=40,
    steps=3,
    compared_batches=(1, 4),
    kernel_batches=(1, 4),
    traffics=(
        Traffic(name="1000/1000", num_requests=4, prompt_tokens=16, output_tokens=16),
        Traffic(name="128/128", num_requests=8, prompt_tokens=4, output_tokens=4),
        Traffic(name="mix", num_requests=8, prompt_tokens=8, output_tokens=6, is_drawn=True),
    ),
    itl_decoders=2,
    long_prompt=256,
    copy_bytes=1 << 20,
    matrix_size=64,
    few_layers=1,
    peer_batches=(1, 2),
)
