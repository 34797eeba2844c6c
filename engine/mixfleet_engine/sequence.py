"""A request inside the engine: its tokens so far and what of them the KV cache holds."""

from mixfleet_engine.request import FinishReason, GenerateRequest
from mixfleet_engine.step import PlannedChunk


class Sequence:
    """One answer on its way. Only the scheduler changes it.

    Example, a prompt of 3 tokens after two sampled ones::

        token_ids      p0 p1 p2 a0 a1
        in the cache   ^^^^^^^^^^^        num_cached = 4
        pending                    ^^     num_pending = 1: the next step decodes
    """

    __slots__ = ("block_table", "num_cached", "request", "token_ids")

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        """Prompt and answer so far."""
        self.num_cached = 0
        """Tokens whose keys and values are in the KV cache."""
        self.block_table: list[int] = []
        """Blocks owned by this sequence, in the order of their positions."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far, those of earlier runs included."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_cached

    def chunk(self, num_tokens: int, num_blocks: int) -> PlannedChunk:
        """The next ``num_tokens`` pending tokens; the first ``num_blocks`` blocks cover them."""
        stop = self.num_cached + num_tokens
        return PlannedChunk(
            request_id=self.request.request_id,
            token_ids=tuple(self.token_ids[self.num_cached : stop]),
            start=self.num_cached,
            block_table=tuple(self.block_table[:num_blocks]),
            samples=stop == len(self.token_ids),
            sampling=self.request.sampling,
            position=self.num_output,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; why the answer is complete with it, or None when it goes on."""
        self.token_ids.append(token_id)
        # A stop token on the last allowed place is a full answer, not one that was cut.
        if token_id in self.request.stop_token_ids:
            return "stop"
        return "length" if self.num_output == self.request.max_tokens else None

    def drop_cache(self) -> list[int]:
        """Forget what the KV cache holds; the blocks that the caller must release."""
        blocks, self.block_table, self.num_cached = self.block_table, [], 0
        return blocks
