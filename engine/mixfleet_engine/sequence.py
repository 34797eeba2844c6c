"""A request inside the engine: its tokens so far and what of them the KV cache holds.

What steps do that are planned and not booked yet counts as if it were done: tokens that they write
are not pending any more, and the one that each of them samples is there, but *unread*.
"""

from mixfleet_engine.grammar import GrammarState
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import FinishReason, GenerateRequest
from mixfleet_engine.step import UNREAD, PlannedChunk


class Sequence:
    """One answer on its way. Only the scheduler and its books change it.

    Example, a prompt of 3 tokens after two sampled ones::

        token_ids      p0 p1 p2 a0 a1
        in the cache   ^^^^^^^^^^^        num_cached = 4
        pending                    ^^     num_pending = 1: the next step decodes

    While that step runs::

        token_ids      p0 p1 p2 a0 a1
        in the cache   ^^^^^^^^^^^        num_cached = 4
        planned                    ^^     num_planned = 1, num_unread = 1
        pending                       ^^  num_pending = 1: a2, unread, which the next step decodes

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
        "num_planned",
        "num_trusted",
        "num_unread",
        "order",
        "refused_at",
        "request",
        "token_ids",
        "unread_row",
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
        """Prompt and answer so far, without what is unread."""
        self.num_cached = 0
        """Tokens whose keys and values are in the KV cache."""
        self.num_planned = 0
        """Tokens behind them that planned steps write there."""
        self.num_unread = 0
        """Tokens that planned steps sample."""
        self.unread_row: int | None = None
        """Which sample of its plan the last of these is."""
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
        """Tokens of prompt and answer so far, unread ones included."""
        return len(self.token_ids) + self.num_unread

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far, those of earlier runs and unread ones included."""
        return self.history.num_output + self.num_unread

    @property
    def start(self) -> int:
        """Position of the first token that no step has written or is planned to write."""
        return self.num_cached + self.num_planned

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be sampled."""
        return self.num_tokens - self.start

    @property
    def is_full(self) -> bool:
        """Whether it ends with its unread token at the latest, so that nothing more is planned."""
        return self.num_output == self.request.max_tokens

    @property
    def awaits_token(self) -> bool:
        """Whether nothing can be planned before its unread token is there."""
        needs_it = self.grammar is not None or self.request.sampling.counts_tokens
        return needs_it and self.num_unread > 0 and not self.is_full

    def is_overdue(self, now: float) -> bool:
        """Whether the request's deadline has come."""
        return self.request.deadline is not None and now >= self.request.deadline

    def chunk(self, num_tokens: int, num_blocks: int, row: int = 0) -> PlannedChunk:
        """Plan the next ``num_tokens`` pending tokens.

        Args:
            num_tokens: How many; only what is pending.
            num_blocks: The first so many blocks cover them.
            row: Samples of the plan that come before this chunk.
        """
        start, stop = self.start, self.start + num_tokens
        # While a token is unread, it alone is pending.
        is_unread = stop > len(self.token_ids)
        chunk = PlannedChunk(
            request_id=self.request.request_id,
            token_ids=(UNREAD,) if is_unread else tuple(self.token_ids[start:stop]),
            start=start,
            block_table=tuple(self.block_table[:num_blocks]),
            samples=stop == self.num_tokens,
            sampling=self.request.sampling,
            history=self.history,
            position=self.num_output,
            grammar=self.grammar,
            unread_row=self.unread_row if is_unread else None,
        )
        self.num_planned += num_tokens
        if chunk.samples:
            self.num_unread += 1
            self.unread_row = row
        return chunk

    def book(self, num_tokens: int, *, sampled: bool) -> None:
        """Count the ``num_tokens`` tokens of its oldest planned chunk as cached.

        Args:
            num_tokens: How many these are.
            sampled: Whether it gave a token; the caller appends it.
        """
        self.num_cached += num_tokens
        self.num_planned -= num_tokens
        self.num_unread -= sampled

    def unplan(self) -> None:
        """Forget what was planned."""
        self.num_planned = self.num_unread = 0

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
        return "length" if self.history.num_output == self.request.max_tokens else None

    def drop_cache(self) -> list[int]:
        """Forget what the KV cache holds; the blocks that the caller must release."""
        blocks, self.block_table = self.block_table, []
        self.num_cached = self.num_known = self.num_trusted = 0
        self.refused_at = None
        return blocks
