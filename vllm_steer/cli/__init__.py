"""The ``vllm-steer`` command."""

import sys

import typer

from vllm_steer.cli.demo import demo
from vllm_steer.errors import SteerError

app = typer.Typer(
    name="vllm-steer",
    help="Steer a language model per request while vLLM serves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)


@app.callback()
def _commands() -> None:
    """Makes every command a subcommand, also while there is only one."""


def main() -> None:
    """Run the command line; a ``SteerError`` becomes one line and exit code 1."""
    try:
        app()
    except SteerError as error:
        print(f"vllm-steer: {error}", file=sys.stderr)
        sys.exit(1)
