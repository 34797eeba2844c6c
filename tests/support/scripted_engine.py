"""An engine that says what a test tells it to, one token a step."""

from collections import deque
from collections.abc import Sequence

from mixfleet_engine.errors import PromptTooLongError
from mixfleet_engine.request import FinishReason, GenerateRequest, StepOutput


class ScriptedEngine:
    """Implements ``GenerationEngine`` for one request at a time.

    Args:
        answers: Token ids of each answer in turn; its end is the reason of ``reasons``.
        reasons: Why each answer ends.
        context_length: Longest prompt and answer.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        reasons: Sequence[FinishReason] = (),
        context_length: int = 1000,
    ) -> None:
        self.context_length = context_length
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self._answers = deque(answers)
        self._reasons = deque(reasons)
        self._left: deque[int] = deque()
        self._reason: FinishReason = "stop"
        self._request_id = ""

    @property
    def free_slots(self) -> int:
        return 0 if self._request_id else 1

    @property
    def free_tokens(self) -> int:
        return self.context_length

    @property
    def has_work(self) -> bool:
        return bool(self._request_id)

    def submit(self, request: GenerateRequest) -> None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt + request.max_tokens > self.context_length:
            raise PromptTooLongError(
                prompt_tokens=num_prompt,
                max_tokens=request.max_tokens,
                context_length=self.context_length,
            )
        assert not self._request_id, "one at a time"
        self.requests.append(request)
        self._request_id = request.request_id
        self._left = deque(self._answers.popleft())
        self._reason = self._reasons.popleft() if self._reasons else "stop"

    def abort(self, request_id: str) -> bool:
        was_there, self._request_id = self._request_id == request_id, ""
        if was_there:
            self.aborted.append(request_id)
        return was_there

    def step(self) -> list[StepOutput]:
        request_id = self._request_id
        if self._reason in ("error", "deadline") and not self._left:
            self._request_id = ""
            return [StepOutput(request_id=request_id, token_ids=(), finish_reason=self._reason)]
        token_id = self._left.popleft()
        ended = not self._left and self._reason not in ("error", "deadline")
        if ended:
            self._request_id = ""
        return [
            StepOutput(
                request_id=request_id,
                token_ids=(token_id,),
                finish_reason=self._reason if ended else None,
            )
        ]
