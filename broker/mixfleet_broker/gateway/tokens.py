"""``/tokenize`` and ``/detokenize`` in vLLM's shape, by whichever worker of the model is free."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import Field

from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.completion_logprobs import token_text
from mixfleet_broker.gateway.openai_schema import Body, MessageBody, ToolBody, unsupported
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.inquiry_codec import Detail, Detokenize, Inquiry, TokenizeChat, TokenizeText
from mixfleet_broker.messages import ChatJob, new_job_id

router = APIRouter(tags=["tokens"])

_NO_MODEL: Final = "needed here, where several models or none are served"


class TokenizeBody(Body):
    """``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1)] | None = None
    tools: list[ToolBody] | None = None
    add_special_tokens: bool | None = None
    """vLLM's defaults: true for a text; false for messages, whose format has its own."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def inquiry(self, model: str) -> Inquiry:
        """Return the question of the wire.

        Raises:
            ApiError: Not exactly one of text and messages is given, or what a chat cannot have.
        """
        detail: Detail = "bytes" if self.return_token_strs else "ids"
        if (self.prompt is None) == (self.messages is None):
            raise unsupported("prompt", "give a prompt or messages, one of the two")
        if self.prompt is not None:
            special = self.add_special_tokens is not False
            return TokenizeText(text=self.prompt, add_special_tokens=special, detail=detail)
        if self.add_special_tokens:
            raise unsupported("add_special_tokens", "the format of messages has its own")
        if not self.add_generation_prompt:
            raise unsupported("add_generation_prompt", "a prompt always asks for an answer")
        if self.continue_final_message:
            raise unsupported("continue_final_message", "an answer is always a message of its own")
        job = ChatJob(
            job_id=new_job_id(),
            model=model,
            messages=tuple(m.message(f"messages.{i}") for i, m in enumerate(self.messages or ())),
            tools=tuple(tool.spec() for tool in self.tools or ()),
        )
        return TokenizeChat(job=job, detail=detail)


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(request: Request, response: Response, body: TokenizeBody) -> dict[str, Any]:
    """Return the tokens of a text, or of the prompt that a conversation becomes."""
    service: Service = request.app.state.service
    model, headers = await _admitted(request, service, body.model)
    response.headers.update(headers)
    answer = await service.ask(model, body.inquiry(model))
    strings = [token_text(token) for token in answer.token_bytes]
    return {
        "count": answer.num_tokens,
        "max_model_len": answer.context_length,
        "tokens": list(answer.token_ids),
        "token_strs": strings if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request, response: Response, body: DetokenizeBody) -> dict[str, Any]:
    """Return the text of tokens."""
    service: Service = request.app.state.service
    model, headers = await _admitted(request, service, body.model)
    response.headers.update(headers)
    answer = await service.ask(model, Detokenize(token_ids=tuple(body.tokens)))
    return {"prompt": answer.text or ""}


async def _admitted(
    request: Request, service: Service, given: str | None
) -> tuple[str, dict[str, str]]:
    """Charge the request; return the model that is asked, and what the answer says of limits."""
    caller = await service.gate.caller(request)
    model = await _model(caller, service, given)
    return model, await service.gate.charge_request(caller)


async def _model(caller: Caller, service: Service, given: str | None) -> str:
    """Return the model named, or the only one there is."""
    if given is None:
        served = {worker.model for worker in await service.fleet.workers()}
        if len(served) != 1:
            raise ApiError(
                400, f"model: {_NO_MODEL}", code="missing_required_parameter", param="model"
            )
        given = served.pop()
    caller.check_model(given)
    return await service.fleet.check_model(given)
