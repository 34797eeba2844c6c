"""Which tokens may come next in an answer that must follow a grammar.

A grammar is text in llguidance's dialect of Lark. llguidance says of all tokens at once whether
the bytes of each can stand next; this is its only room. It is imported, and its table of the
vocabulary made (0.05 s for 32,768 tokens), when the first grammar comes: an engine that never gets
one pays nothing.

Masks are made on the host, on rank 0, where tokens are chosen. With Mixtral 8x22B's vocabulary a
schema compiles in 1.2 ms, and a token costs 10 µs, 0.35 ms at most, for the mask and 2 µs for the
state (docs/log.md). On a GPU the model still computes meanwhile.

No token is ever forced: where a grammar allows one text only, the model chooses how to cut it into
tokens, as it does everywhere else.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final, cast

from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.request import FinishReason, GenerateRequest
from mixfleet_engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_GRAMMAR: Final = 128 * 1024
"""Characters of one grammar. So much, in an ``enum``, takes 20 ms to compile."""
_MAX_REASON: Final = 300
"""Characters of what llguidance says that an error repeats."""
_MAX_LEXER_FUEL: Final = 200_000
"""Of compiling; llguidance burns about 50,000 in a millisecond. A fifth of its own default."""
_MAX_SYMBOLS: Final = 50_000
"""A tenth of llguidance's own default."""
_MAX_ROW: Final = 4_000
"""Ways to go on from one byte. An object has four for each of its optional properties."""
_MAX_LEXER_STATES: Final = 20_000
"""Of 1 to 2 kB each, for as long as the answer takes."""
_NOTHING_FITS: Final = "NoExtensionBias"
"""llguidance's word for a place where no byte can follow."""
_HEAD: Final = '%llguidance {"no_forcing": true}\n'


class GrammarState:
    """Where one answer stands in its grammar. Its sequence alone moves it.

    Args:
        matcher: At the beginning of the answer.
        stop_token_ids: Tokens that are allowed exactly where the answer may end.
        eos_id: What llguidance takes for such a token, whoever asks.
    """

    def __init__(
        self, matcher: "llguidance.LLMatcher", stop_token_ids: frozenset[int], eos_id: int
    ) -> None:
        self._matcher = matcher
        self._stops = _bits(stop_token_ids)
        self._ends = _bits({eos_id, *stop_token_ids})
        self.num_tokens = 0
        """Tokens of the answer that it has seen."""
        self.dead_end: FinishReason | None = None
        """How the answer ends since no token may follow, if the last mask was empty: ``stop``,
        or ``grammar`` where it is incomplete."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._matcher.is_stopped() and self.may_end

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole, whatever may follow."""
        return self._matcher.is_accepting()

    @property
    def problem(self) -> str:
        """What llguidance could not do any more; "" if nothing."""
        # Without an error this may be why nothing can follow.
        return self._matcher.get_error() if self._matcher.is_error() else ""

    def advance(self, token_id: int) -> None:
        """Take the answer's next token. One that was not allowed ends in ``problem``."""
        self._matcher.consume_token(token_id)
        self.num_tokens += 1

    def allowed(self, position: int) -> bytearray:
        """Return which tokens may be the answer's number ``position``, a bit each.

        Token 0 is the lowest bit of the first byte, token 9 the second of the second; the last
        bytes may be of no token. A mask without any token sets ``dead_end``.
        """
        # A token of which the grammar has not heard would make this the mask of another place.
        assert position == self.num_tokens, (position, self.num_tokens)
        mask = bytearray(self._matcher.compute_bitmask())
        for byte, bit in self._ends:
            mask[byte] &= ~bit
        for byte, bit in self._stops if self.may_end else ():
            mask[byte] |= bit
        if mask.count(0) == len(mask):
            self.dead_end = "stop" if self.may_end else "grammar"
        return mask


class Grammars:
    """All that follow a grammar in one engine.

    Args:
        tokenizer: The model's.
        vocab_size: V, of the model; it may have padding rows above the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def start(self, request: GenerateRequest) -> GrammarState:
        """Return the state of the answer to ``request`` after its ``output_token_ids``.

        Raises:
            InvalidRequestError: llguidance cannot follow the grammar or not within its limits,
                no text fits it, the tokens so far do not fit it, or a stop token is text. The
                error repeats the first line of llguidance's own, cut to a few hundred characters.
        """
        assert request.grammar is not None
        self._check(request.grammar, request.stop_token_ids)
        state = self._state(_HEAD + request.grammar, request.stop_token_ids)
        for number, token_id in enumerate(request.output_token_ids):
            state.advance(token_id)
            if state.problem:
                raise InvalidRequestError(
                    f"output_token_ids[{number}]={token_id} does not fit the grammar: "
                    f"{_first_line(state.problem)}"
                )
        if not state.is_complete:
            state.allowed(state.num_tokens)
            if state.dead_end == "grammar":
                why = _first_line(state.problem)
                if why in ("", _NOTHING_FITS):
                    why = "there is no text that fits it"
                raise InvalidRequestError(f"grammar: {why}")
        return state

    def _check(self, grammar: str, stop_token_ids: frozenset[int]) -> None:
        if len(grammar) > MAX_GRAMMAR:
            raise InvalidRequestError(
                f"grammar: {len(grammar)} characters, the limit is {MAX_GRAMMAR}"
            )
        for token_id in sorted(stop_token_ids):
            if self._tokenizer.token_bytes(token_id):
                raise InvalidRequestError(
                    f"stop_token_ids holds {token_id}, which is text: "
                    "with a grammar only control tokens can end an answer"
                )

    def _state(self, grammar: str, stop_token_ids: frozenset[int]) -> GrammarState:
        table = self._table
        import llguidance

        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_MAX_LEXER_FUEL,
            max_grammar_size=_MAX_SYMBOLS,
            max_items_in_row=_MAX_ROW,
            max_lexer_states=_MAX_LEXER_STATES,
            precompute_large_lexemes=False,  # 0.2 s at once for some numbers, else a bit a token
            verbose_errors=False,  # they would hold the answer
        )
        matcher = llguidance.LLMatcher(table, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequestError(f"grammar: {_first_line(matcher.get_error())}")
        return GrammarState(matcher, stop_token_ids, table.eos_token)

    @cached_property
    def _table(self) -> "llguidance.LLTokenizer":
        """The vocabulary as llguidance wants it."""
        try:
            import llguidance
        except ImportError as error:
            raise InvalidRequestError(
                "grammar: llguidance is not installed where this engine runs; "
                "pip install 'mixfleet[worker]'"
            ) from error
        words = _Words(self._tokenizer, self._vocab_size)
        return llguidance.LLTokenizer(cast("llguidance.TokenizerWrapper", words))


def grammar_of(request: GenerateRequest, grammars: Grammars | None) -> GrammarState | None:
    """Return where the answer to ``request`` stands in its grammar; None if it has none.

    Raises:
        InvalidRequestError: It has one, but there are no ``grammars``; or as `Grammars.start`.
    """
    if request.grammar is None:
        return None
    if grammars is None:
        raise InvalidRequestError(
            "grammar: this engine was loaded without a tokenizer, so it can follow none"
        )
    return grammars.start(request)


class _Words:
    """The attributes that llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens: Sequence[bytes] = [_bytes_of(tokenizer, i) for i in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.control_ids if i < vocab_size)
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_id
        """Without any it adds a token behind the last."""

    def __call__(self, text: str) -> list[int]:
        raise AssertionError(f"a token was to be forced for {len(text)} characters")


def _bits(token_ids: Iterable[int]) -> list[tuple[int, int]]:
    """Return where a mask has these tokens: number of the byte, and its bit."""
    return [(token_id // 8, 1 << token_id % 8) for token_id in token_ids]


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    if token_id in tokenizer.control_ids:
        return tokenizer.id_to_piece(token_id).encode()
    return tokenizer.token_bytes(token_id)


def _first_line(message: str) -> str:
    """Return what went wrong without the lines of the grammar that follow."""
    line = message.strip().partition("\n")[0]
    # Grammars have a line in front that nobody wrote, so places in them would mislead.
    line = line.partition(": ")[2] if line[:1].isdigit() or line.startswith("at ") else line
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."
