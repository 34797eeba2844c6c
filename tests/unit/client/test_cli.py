import errno
import importlib.metadata
import os
import sys
import types

import click
import pytest
from click.testing import CliRunner, Result

from mixfleet.cli import COMMANDS, ErrorLineGroup, LazyCommand, main
from mixfleet_broker.errors import BrokerUnavailableError, MissingExtraError


def run(*arguments: str, group: click.Group = main) -> Result:
    return CliRunner().invoke(group, list(arguments), prog_name="mixfleet")


def group_with(
    command: click.Command, monkeypatch: pytest.MonkeyPatch, *, extra: str | None = None
) -> click.Group:
    """A group whose only command, ``play``, is found in a module made up for the test."""
    module = types.ModuleType("playground")
    module.play = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "playground", module)
    return ErrorLineGroup(
        "mixfleet", {"play": LazyCommand("play", "playground:play", "Play.", extra)}
    )


def raising(error: BaseException) -> click.Command:
    @click.command()
    def play() -> None:
        raise error

    return play


def test_help_lists_every_command_in_the_order_of_the_table() -> None:
    lines = run("--help").output.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :]]
    assert (
        listed
        == [command.name for command in COMMANDS]
        == [
            "up",
            "chat",
            "worker",
            "gateway",
            "queue",
            "job",
            "key",
            "rq",
            "model",
            "doctor",
        ]
    )


def test_version_is_that_of_the_distribution() -> None:
    assert run("--version").output == f"mixfleet {importlib.metadata.version('mixfleet')}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = run("wroker")
    assert result.exit_code == 2
    assert "No such command 'wroker'" in result.stderr


def test_a_command_is_loaded_when_it_is_called_and_gets_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @click.command()
    @click.argument("what")
    @click.option("--loud", is_flag=True)
    def play(what: str, loud: bool) -> None:
        click.echo(f"{what} {loud}")

    assert run("play", "--loud", "chess", group=group_with(play, monkeypatch)).output == (
        "chess True\n"
    )


def test_the_help_of_a_command_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def play() -> None:
        """A long text about playing."""

    output = run("play", "--help", group=group_with(play, monkeypatch)).output
    assert output.startswith("Usage: mixfleet play ")
    assert "A long text about playing." in output


def test_a_group_behind_a_lazy_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.group()
    def play() -> None: ...

    @play.command()
    def chess() -> None:
        click.echo("e4")

    assert run("play", "chess", group=group_with(play, monkeypatch)).output == "e4\n"


@pytest.mark.parametrize(
    "error",
    [
        BrokerUnavailableError("no Redis answers: start one with `mixfleet up`"),
        MissingExtraError(what="a worker", extra="worker"),
    ],
    ids=["broker", "extra"],
)
def test_an_expected_failure_is_one_line_on_stderr(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("play", group=group_with(raising(error), monkeypatch))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {error}\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()], ids=["ctrl-c", "abort"])
def test_ctrl_c_ends_with_130(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("play", group=group_with(raising(error), monkeypatch))
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_an_unexpected_failure_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("play", group=group_with(raising(ZeroDivisionError()), monkeypatch))
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(("extra", "package"), [("worker", "mixfleet[worker]"), (None, "mixfleet")])
def test_a_module_that_is_not_installed_is_named_with_its_remedy(
    extra: str | None, package: str
) -> None:
    command = LazyCommand("play", "no_such_module:play", "Play.", extra)
    result = run("play", group=ErrorLineGroup("mixfleet", {"play": command}))
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: 'mixfleet play' needs the module 'no_such_module', which is not installed: "
        f"pip install '{package}'\n"
    )


def test_the_help_of_the_group_imports_no_command() -> None:
    command = LazyCommand("play", "no_such_module:play", "Play a game.")
    output = run("--help", group=ErrorLineGroup("mixfleet", {"play": command})).output
    assert "play  Play a game." in output


def test_a_target_that_is_no_command_is_our_bug() -> None:
    with pytest.raises(TypeError, match="json:dumps is not a click command"):
        LazyCommand("play", "json:dumps", "Play.").load()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=[str(command.name) for command in COMMANDS])
def test_every_target_of_the_table_exists(command: LazyCommand) -> None:
    assert command.load().name == command.name


@pytest.mark.parametrize(("number", "is_told"), [(errno.ENOSPC, True), (errno.EPIPE, False)])
def test_a_stream_that_cannot_be_written_is_one_line(number: int, is_told: bool) -> None:
    @click.command()
    def full() -> None:
        raise OSError(number, os.strerror(number))

    result = CliRunner().invoke(ErrorLineGroup("mixfleet", {"full": full}), ["full"])
    assert result.exit_code == 1
    assert ("Error: [Errno 28] No space left on device" in result.output) is is_told
    assert "Traceback" not in result.output
