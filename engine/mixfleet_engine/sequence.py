"""A request inside the engine: its tokens so far and what of them the KV cache holds."""

from mixfleet_engine.grammar import GrammarState
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import FinishReason, GenerateRequest
from mixfleet_engine.step import PlannedChunk


class Sequence:
    """One answer on its way. Only the scheduler and its books change it.

    Example, a prompt of 3 tokens after two sampled ones::

        token_ids      p0 p1 p2 a0 a1
        in the cache   ^^^^^^^^^^^        num_cached = 4
        pending                    ^^     num_pending = 1: the next step decodes

    Args:
        request: What it answers.
        arrival: Number of the request in order of arrival.
        grammar: What its answer must follow, after the tokens so far; None: nothing.
    """

    __slots__ = (
        "block_table",
        "grammar",
        "history",
        "num_cached",
        "num_known",
        "num_trusted",
        "order",
        "refused_at",
        "request",
        "token_ids",
    )

    def __init__(
        self, request: GenerateRequest, arrival: int = 0, grammar: GrammarState | None = None
    ) -> None:
        self.request = request
        self.grammar = grammar
        self.order = request.priority, arrival
        """The least goes first."""
        self.history = TokenHistory(request.prompt_token_ids, request.output_token_ids)
        self.token_ids = self.history.token_ids
        """Prompt and answer so far."""
        self.num_cached = 0
        """Tokens whose keys and values are in the KV cache."""
        self.block_table: list[int] = []
        """Blocks held by this sequence, in the order of their positions."""
        self.num_known = 0
        """Blocks at the head of the table that were offered to the prefix cache."""
        self.num_trusted = 0
        """Blocks at the head of the table that a finite sample has looked at."""
        self.refused_at: int | None = None
        """How many blocks were to be had when it was last refused to run; None: it never was."""

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

    def is_overdue(self, now: float) -> bool:
        """Whether the request's deadline has come."""
        return self.request.deadline is not None and now >= self.request.deadline

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
            history=self.history,
            position=self.num_output,
            grammar=self.grammar,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; why the answer is complete with it, or None when it goes on."""
        self.token_ids.append(token_id)
        # A stop token on the last allowed place is a full answer, not one that was cut.
        if token_id in self.request.stop_token_ids:
            return "stop"
        if self.grammar is not None:
            self.grammar.advance(token_id)
            if self.grammar.is_complete:
                return "stop"
        return "length" if self.num_output == self.request.max_tokens else None

    def drop_cache(self) -> list[int]:
        """Forget what the KV cache holds; the blocks that the caller must release."""
        blocks, self.block_table = self.block_table, []
        self.num_cached = self.num_known = self.num_trusted = 0
        self.refused_at = None
        return blocks
