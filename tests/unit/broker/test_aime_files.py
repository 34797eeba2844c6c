"""Endpoint files in AIME's form: what is read, and errors that name file and field."""

from pathlib import Path

import pytest

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.gateway.aime_endpoints import endpoint_of_model
from mixfleet_broker.gateway.aime_files import read_endpoint, read_endpoints
from mixfleet_broker.gateway.app import create_app
from mixfleet_broker.settings import Settings

ROOT = Path(__file__).parents[3]
WHOLE = """
[ENDPOINT]
name = "chat"
title = "Chat"
version = 3
methods = ["POST"]
auth = "passed over"
[WORKER]
job_type = "mixtral"
auth_key = "passed over"
[CLIENTS]
authorization_keys = {"aime" = "passed over"}
[INPUTS]
prompt_input.type = "str"
chat_context = { type = "chat_context", required = true }
top_k = { type = "int", min = 0, max = 50, default = 5 }
key = { type = "string" }
[OUTPUTS]
text.type = "string"
error.type = "string"
[PROGRESS.OUTPUTS]
text.type = "string"
"""


def write(folder: Path, text: str, name: str = "a.cfg") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_file_is_read_with_long_and_short_names_and_foreign_sections(tmp_path: Path) -> None:
    endpoint = read_endpoint(write(tmp_path, WHOLE))
    assert (endpoint.name, endpoint.model, endpoint.version) == ("chat", "mixtral", 3)
    assert endpoint.methods == ("POST",)
    prompt, context, top_k = endpoint.inputs
    assert (prompt.type, prompt.required) == ("string", False)
    assert (context.type, context.required) == ("chat_context", True)
    # A minimum of 0 is one, also by its short name.
    assert (top_k.type, top_k.minimum, top_k.maximum, top_k.default) == ("integer", 0, 50, 5)
    assert list(endpoint.outputs) == ["text"]
    assert list(endpoint.progress_outputs) == ["text"]


def test_the_example_is_what_a_model_without_a_file_has() -> None:
    [example] = read_endpoints(ROOT / "deploy/aime_endpoints")
    default = endpoint_of_model("mixtral")
    assert example.inputs == default.inputs
    assert example.outputs == default.outputs
    assert example.progress_outputs == default.progress_outputs


def test_all_files_below_a_directory_are_read(tmp_path: Path) -> None:
    write(tmp_path, WHOLE, "x/aime_api_endpoint.cfg")
    write(tmp_path, WHOLE.replace('"chat"', '"talk"', 1), "y/z/talk.toml")
    write(tmp_path, "no endpoint", "readme.txt")
    assert [one.name for one in read_endpoints(tmp_path)] == ["chat", "talk"]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('name = "chat"', "", "ENDPOINT.name: is missing"),
        ('name = "chat"', 'name = "a/b"', "ENDPOINT.name='a/b': must match"),
        ("version = 3", 'version = "3"', "ENDPOINT.version='3': must be a whole number"),
        ('["POST"]', '["PUT"]', "ENDPOINT.methods=['PUT']: must be a list of GET and POST"),
        ("[WORKER]", "[WORK]", "WORKER: is missing"),
        ('job_type = "mixtral"', 'job_type = "a b"', "WORKER.job_type: model='a b'"),
        ('"str"', '"image"', "INPUTS.prompt_input.type='image': must be string"),
        ("top_k =", "images =", "INPUTS.images: cannot be served; inputs are prompt_input,"),
        ("min = 0", 'min = "0"', "INPUTS.top_k.min='0': must be a whole number"),
        ("min = 0", "min = 0.5", "INPUTS.top_k.min=0.5: must be a whole number"),
        ("min = 0", "min = 51", "INPUTS.top_k.minimum=51: is above the maximum 50"),
        ("default = 5", "default = 51", "INPUTS.top_k.default=51: must be from 0 to 50"),
        ("default = 5", "default = true", "INPUTS.top_k.default=True: must be a whole number"),
        ("required = true", "required = 1", "INPUTS.chat_context.required=1: must be true or"),
        ('text.type = "string"', 'text = "string"', "OUTPUTS.text: must be a table"),
        ("[ENDPOINT]", "[ENDPOINT", "cannot be read: "),
    ],
)
def test_an_error_names_the_file_and_the_field(
    tmp_path: Path, old: str, new: str, text: str
) -> None:
    assert old in WHOLE
    file = write(tmp_path, WHOLE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_endpoint(file)
    assert str(caught.value).startswith(f"{file}: {text}")


def test_an_endpoint_without_any_question_is_refused(tmp_path: Path) -> None:
    text = WHOLE.replace("prompt_input", "seed").replace('"str"', '"int"')
    text = text.replace("chat_context = { type", "temperature = { type").replace(
        '"chat_context"', '"float"'
    )
    with pytest.raises(ConfigError, match="INPUTS: there must be prompt_input"):
        read_endpoint(write(tmp_path, text))


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path, WHOLE, "a.cfg"), write(tmp_path, WHOLE, "b.cfg")
    with pytest.raises(ConfigError) as caught:
        read_endpoints(tmp_path)
    assert str(caught.value) == f"{second}: ENDPOINT.name='chat': {first} has it too"


def test_a_path_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_endpoints(tmp_path)


@pytest.mark.parametrize("name", ["livez", "docs", "metrics"])
def test_a_gateway_does_not_start_with_an_endpoint_that_cannot_be_reached(
    tmp_path: Path, name: str
) -> None:
    file = write(tmp_path, WHOLE)
    create_app(Settings(aime_endpoints=file))
    file.write_text(WHOLE.replace('"chat"', f'"{name}"', 1))
    with pytest.raises(ConfigError, match=f"/{name} is a path of the gateway's own"):
        create_app(Settings(aime_endpoints=file))


def test_an_output_that_no_model_gives_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_endpoint(write(tmp_path, WHOLE.replace("error.type", "images.type")))
    assert "OUTPUTS.images: is never given" in caplog.text
