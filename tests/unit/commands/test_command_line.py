"""The command line: fast help, the version, and a line for each command."""

import subprocess
import sys
from importlib import import_module

import pytest
from command_tools import MAIN
from typer.testing import CliRunner

from vllm_steer.cli import app
from vllm_steer.cli.commands import COMMANDS
from vllm_steer.errors import SteerError
from vllm_steer.version import __version__


def test_the_commands_are_those_of_the_interface() -> None:
    assert set(COMMANDS) == {
        *("demo", "fit", "convert", "inspect", "evidence", "transfer", "eval", "compare"),
        *("sweep", "doctor"),
    }


def test_help_lists_every_command_and_imports_none() -> None:
    code = f"import sys; sys.argv[1:] = ['--help']\ntry:\n    {MAIN}\nfinally:\n    "
    code += "print('HEAVY', sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in completed.stdout
    for name, entry in COMMANDS.items():
        assert name in completed.stdout and entry.help.split()[0] in completed.stdout
    assert "vllm serve MODEL --steer-config" in completed.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_own_help(name: str) -> None:
    completed = CliRunner().invoke(app, [name, "--help"])
    assert completed.exit_code == 0
    assert f"{name} " in completed.stdout.splitlines()[1]
    entry = COMMANDS[name]
    assert hasattr(import_module(f"vllm_steer.cli.{entry.module}"), entry.function)


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"vllm-steer {__version__}\n"


def test_serve_points_to_vllm() -> None:
    completed = CliRunner().invoke(app, ["serve", "model"])
    assert isinstance(completed.exception, SteerError)
    assert str(completed.exception) == "to serve steers, run: vllm serve MODEL --steer-config FILE"


def test_an_unknown_command_is_an_error() -> None:
    completed = CliRunner().invoke(app, ["steer"])
    assert completed.exit_code == 2 and "No such command 'steer'" in completed.output


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    completed = CliRunner().invoke(app, ["convrt"])
    assert completed.exit_code == 2 and "Did you mean 'convert'?" in " ".join(
        completed.output.split()
    )


def test_a_group_of_commands_has_no_completion_of_its_own() -> None:
    assert "completion" not in CliRunner().invoke(app, ["fit", "--help"]).stdout
