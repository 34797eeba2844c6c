import pytest

from mixfleet_broker.errors import MessageError
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.openai_chat import chat_jobs
from mixfleet_broker.gateway.openai_schema import ChatBody
from mixfleet_broker.job_codec import validate
from mixfleet_broker.messages import ChatJob, new_job_id


def job_of(**fields: object) -> ChatJob:
    body = ChatBody.model_validate(
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    )
    (job,) = chat_jobs(body, [new_job_id()])
    return job


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_that_must_be_called_and_is_not_there_is_refused(choice: object) -> None:
    with pytest.raises(MessageError, match="there are no tools"):
        validate(job_of(tool_choice=choice))


@pytest.mark.parametrize("token", ["x", "-1", "1.5", "", "¹", "9" * 11, "9" * 5000])
def test_a_bias_is_for_a_token_or_refused(token: str) -> None:
    with pytest.raises(ApiError, match="must be a token's id"):
        job_of(logit_bias={token: 1})


def test_biases_reach_the_job_as_they_are() -> None:
    job = job_of(logit_bias={"70": 100, "7": -0.5})
    assert job.sampling.logit_bias == ((7, -0.5), (70, 100.0))
