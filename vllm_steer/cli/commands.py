"""The commands by name. A command's module is imported when it runs: PyTorch takes two seconds."""

from importlib import import_module
from typing import Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vllm_steer.errors import SteerError


class CommandEntry(NamedTuple):
    """The module and function of a command, and its line in the list of commands."""

    module: str
    function: str
    help: str


COMMANDS: Final = {
    "demo": CommandEntry(
        "demo", "demo", "Serve the embedded model on loopback and answer one prompt under steers."
    ),
    "fit": CommandEntry("fit", "fit", "Fit a steer to texts."),
    "convert": CommandEntry(
        "convert", "convert", "Write any supported steer file as a vllm-steer file."
    ),
    "inspect": CommandEntry(
        "inspect", "inspect", "Show what a steer file holds: norms, spectrum, nearest tokens."
    ),
    "evidence": CommandEntry(
        "evidence", "evidence", "Show which parts of a text a steer makes likelier."
    ),
    "transfer": CommandEntry("transfer", "transfer", "Make an LM-Steer for another model."),
    "eval": CommandEntry(
        "evaluate", "evaluate", "Generate texts at each strength in vLLM, and judge them."
    ),
    "compare": CommandEntry(
        "compare",
        "compare",
        "Compare fixed, scheduled and dynamic strengths of properties.",
    ),
    "sweep": CommandEntry(
        "sweep", "sweep", "Find the strongest effect within a budget of perplexity."
    ),
    "doctor": CommandEntry("doctor", "doctor", "Check what works with a model on this machine."),
}


class LazyGroup(TyperGroup):
    """The commands of ``COMMANDS``; a module is imported to run a command or show its help."""

    _is_listing = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Typer suggests these names for a misspelt one.
        self.commands.update({n: TyperCommand(n, help=e.help) for n, e in COMMANDS.items()})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "serve" and not ctx.resilient_parsing:
            raise SteerError("to serve steers, run: vllm serve MODEL --steer-config FILE")
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        if self._is_listing:
            return self.commands[cmd_name]
        target = getattr(import_module(f"vllm_steer.cli.{entry.module}"), entry.function)
        if not isinstance(target, typer.Typer):
            app = typer.Typer(
                pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False
            )
            app.command(cmd_name)(target)
            target = app
        command = get_command(target)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False
