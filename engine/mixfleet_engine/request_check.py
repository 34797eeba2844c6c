"""Whether a request can run at all: what every engine, real or simulated, checks at its door."""

import math
from collections.abc import Iterable

from mixfleet_engine.errors import InvalidRequestError, PromptTooLongError
from mixfleet_engine.request import GenerateRequest, SamplingParams

MAX_SEED = 2**64 - 1
MAX_PENALTY = 2
"""Of presence and frequency, to either side."""
MAX_LOGPROBS = 20
MAX_BIAS = 100
"""To either side: it bans a token or all others, as far as finite numbers can."""
MAX_BIASES = 1024


def check_request(request: GenerateRequest, *, vocab_size: int, context_length: int) -> None:
    """Return if ``request`` can run in an engine of these sizes.

    Raises:
        InvalidRequestError: A field cannot be used; the text names it and its value.
        PromptTooLongError: Prompt and answer together are longer than ``context_length``.
    """
    _check_token_ids("prompt_token_ids", request.prompt_token_ids, vocab_size)
    _check_token_ids("output_token_ids", request.output_token_ids, vocab_size)
    _check_token_ids("stop_token_ids", request.stop_token_ids, vocab_size)
    _check_sampling(request.sampling, vocab_size)
    _check_deadline(request)
    _check_lengths(request, context_length)
    _check_unfinished(request)


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name} holds {token_id}: token ids go from 0 to {vocab_size - 1}"
            )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0.0 <= sampling.temperature < math.inf:
        raise InvalidRequestError(f"temperature={sampling.temperature}: must be 0 or more, finite")
    if sampling.top_k < 0:
        raise InvalidRequestError(f"top_k={sampling.top_k}: must be 0 (all tokens) or more")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequestError(f"top_p={sampling.top_p}: must be above 0 and at most 1")
    if not 0.0 < sampling.repetition_penalty < math.inf:
        raise InvalidRequestError(
            f"repetition_penalty={sampling.repetition_penalty}: must be above 0, finite"
        )
    _check_range("min_p", sampling.min_p, 0, 1)
    _check_range("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("seed", sampling.seed, 0, MAX_SEED)
    if sampling.logprobs is not None:
        _check_range("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    _check_logit_bias(sampling, vocab_size)


def _check_range(name: str, value: float, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise InvalidRequestError(f"{name}={value}: must be from {lowest} to {highest}")


def _check_logit_bias(sampling: SamplingParams, vocab_size: int) -> None:
    if len(sampling.logit_bias) > MAX_BIASES:
        raise InvalidRequestError(
            f"logit_bias has {len(sampling.logit_bias)} entries: at most {MAX_BIASES}"
        )
    _check_token_ids("logit_bias", (token_id for token_id, _ in sampling.logit_bias), vocab_size)
    seen: set[int] = set()
    for token_id, bias in sampling.logit_bias:
        _check_range(f"logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)
        if token_id in seen:
            raise InvalidRequestError(f"logit_bias holds {token_id} twice")
        seen.add(token_id)


def _check_lengths(request: GenerateRequest, context_length: int) -> None:
    if not request.prompt_token_ids:
        raise InvalidRequestError("prompt_token_ids is empty: at least one token is needed")
    num_output = len(request.output_token_ids)
    if request.max_tokens <= num_output:
        raise InvalidRequestError(
            f"max_tokens={request.max_tokens}: must be more than the {num_output} tokens "
            "of output_token_ids"
        )
    num_prompt = len(request.prompt_token_ids)
    if num_prompt + request.max_tokens > context_length:
        raise PromptTooLongError(
            prompt_tokens=num_prompt, max_tokens=request.max_tokens, context_length=context_length
        )


def _check_deadline(request: GenerateRequest) -> None:
    if request.deadline is not None and math.isnan(request.deadline):
        raise InvalidRequestError(f"deadline={request.deadline}: must be a number of seconds")


def _check_unfinished(request: GenerateRequest) -> None:
    for index, token_id in enumerate(request.output_token_ids):
        if token_id in request.stop_token_ids:
            raise InvalidRequestError(
                f"output_token_ids[{index}]={token_id} is a stop token: the answer has ended"
            )
