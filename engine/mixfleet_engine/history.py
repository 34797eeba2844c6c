"""The tokens of one request so far, as one growing object.

It is handed around by reference: what a step needs of it never costs a copy of the whole, however
long the context is.
"""


class TokenHistory:
    """Prompt and answer of one request. Only its sequence appends to it.

    Others may remember, per object, what they have derived from it (the sampler counts tokens), in
    a weak dictionary: it ends with the request.

    Args:
        prompt_token_ids: The prompt.
        output_token_ids: What an earlier run has delivered of the answer.
    """

    __slots__ = ("__weakref__", "num_prompt", "token_ids")

    def __init__(
        self, prompt_token_ids: tuple[int, ...], output_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        """Prompt and answer, in order; it only ever grows."""
        self.num_prompt = len(prompt_token_ids)
        """How many of them are the prompt's."""

    @property
    def num_output(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.num_prompt
