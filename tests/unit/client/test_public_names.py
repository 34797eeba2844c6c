import inspect

import pytest

import mixfleet
import mixfleet.errors
import mixfleet_broker.errors


def test_the_public_names_are_these() -> None:
    assert mixfleet.__all__ == [
        "ChatMessage",
        "ChatResult",
        "ChatStream",
        "Client",
        "JobEnd",
        "JobEvent",
        "JobInfo",
        "MixfleetError",
        "Requeued",
        "RunStarted",
        "TokenChunk",
        "TokenLogprob",
        "ToolCall",
        "Usage",
        "new_job_id",
    ]


@pytest.mark.parametrize("name", mixfleet.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(mixfleet, name) is not None


def test_the_names_are_listed_for_tab_completion() -> None:
    assert set(mixfleet.__all__) <= set(dir(mixfleet))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        mixfleet.Cleint  # noqa: B018


def test_all_errors_of_the_broker_are_exported() -> None:
    errors = {
        name
        for name, value in vars(mixfleet_broker.errors).items()
        if inspect.isclass(value) and issubclass(value, mixfleet_broker.errors.MixfleetError)
    }
    assert errors == set(mixfleet.errors.__all__)
