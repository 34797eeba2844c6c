"""Whether a request can run at all: what every engine, real or simulated, checks at its door."""

import math
from collections.abc import Iterable

from mixfleet_engine.errors import InvalidRequestError, PromptTooLongError
from mixfleet_engine.request import GenerateRequest, SamplingParams

MAX_SEED = 2**64 - 1


def check_request(request: GenerateRequest, *, vocab_size: int, context_length: int) -> None:
    """Return if ``request`` can run in an engine of these sizes.

    Raises:
        InvalidRequestError: A field cannot be used; the text names it and its value.
        PromptTooLongError: Prompt and answer together are longer than ``context_length``.
    """
    _check_token_ids("prompt_token_ids", request.prompt_token_ids, vocab_size)
    _check_token_ids("output_token_ids", request.output_token_ids, vocab_size)
    _check_token_ids("stop_token_ids", request.stop_token_ids, vocab_size)
    _check_sampling(request.sampling)
    _check_lengths(request, context_length)
    _check_unfinished(request)


def _check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name} holds {token_id}: token ids go from 0 to {vocab_size - 1}"
            )


def _check_sampling(sampling: SamplingParams) -> None:
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0.0 <= sampling.temperature < math.inf:
        raise InvalidRequestError(f"temperature={sampling.temperature}: must be 0 or more, finite")
    if sampling.top_k < 0:
        raise InvalidRequestError(f"top_k={sampling.top_k}: must be 0 (all tokens) or more")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequestError(f"top_p={sampling.top_p}: must be above 0 and at most 1")
    if not 0 <= sampling.seed <= MAX_SEED:
        raise InvalidRequestError(f"seed={sampling.seed}: must be from 0 to {MAX_SEED}")


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


def _check_unfinished(request: GenerateRequest) -> None:
    for index, token_id in enumerate(request.output_token_ids):
        if token_id in request.stop_token_ids:
            raise InvalidRequestError(
                f"output_token_ids[{index}]={token_id} is a stop token: the answer has ended"
            )
