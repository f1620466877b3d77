"""The command line: fast help, the version, and a line for each command."""

import os
import subprocess
import sys

import pytest
import typer
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


FITS = [("fit", method) for method in ("lm-steer", "concept", "condition", "delta", "vector")]


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), *FITS], ids=" ".join)
def test_every_command_shows_its_own_help_at_80_columns(command: tuple[str, ...]) -> None:
    completed = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"})
    lines = completed.stdout.splitlines()
    assert completed.exit_code == 0 and command[-1] in lines[0]
    assert all(len(line) <= 80 for line in lines)
    parameters = typer.main.get_command(app)
    for name in command:
        parameters = parameters.get_command(typer.Context(parameters), name)
    options = [option for parameter in parameters.params for option in parameter.opts]
    assert all(option in completed.stdout for option in options if option.startswith("-"))


def test_no_command_imports_a_large_library_to_show_its_help() -> None:
    commands = [[*command, "--help"] for command in (*((n,) for n in COMMANDS), *FITS)]
    code = (
        "import sys, io, contextlib\nfrom vllm_steer.cli import main\n"
        f"for command in {commands!r}:\n"
        "    sys.argv[1:] = command\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "print('HEAVY', sorted({'numpy', 'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout == "HEAVY []\n"


def test_messages_of_libraries_are_hidden_unless_they_are_requested() -> None:
    code = (
        "import logging, os, sys, warnings\nsys.argv[1:] = ARGUMENTS\nfrom vllm_steer import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "warnings.warn('old', FutureWarning)\nlogging.getLogger('vllm.a').warning('early')\n"
        "print(os.environ.get('VLLM_LOGGING_LEVEL'))"
    )
    outputs = {}
    for arguments in (["--version"], ["--version", "--verbose"]):
        program = code.replace("ARGUMENTS", repr(arguments))
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VLLM_LOGGING_LEVEL", "PYTHONWARNINGS")
        }
        process = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        shown = ["FutureWarning" in process.stderr, "early" in process.stderr]
        outputs[len(arguments)] = (process.stdout.split()[-1], *shown)
    assert outputs == {1: ("ERROR", False, False), 2: ("INFO", True, True)}


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"vllm-steer {__version__}\n"


def test_serve_points_to_vllm() -> None:
    completed = CliRunner().invoke(app, ["serve", "model"])
    assert isinstance(completed.exception, SteerError)
    assert str(completed.exception) == "to serve steers, run: vllm serve MODEL --steer-config FILE"


def test_an_unknown_command_is_an_error() -> None:
    completed = CliRunner().invoke(app, ["steer"])
    assert completed.exit_code == 2 and "No such command 'steer'" in completed.output


def test_a_misspelt_command_suggests_the_right_one() -> None:
    completed = CliRunner().invoke(app, ["convrt"])
    assert completed.exit_code == 2 and "Did you mean 'convert'?" in " ".join(
        completed.output.split()
    )


def test_a_group_of_commands_has_no_completion_of_its_own() -> None:
    assert "completion" not in CliRunner().invoke(app, ["fit", "--help"]).stdout
