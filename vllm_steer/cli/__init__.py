"""The ``vllm-steer`` command."""

import sys

import typer

from vllm_steer.cli.convert import convert
from vllm_steer.cli.demo import demo
from vllm_steer.cli.doctor import doctor
from vllm_steer.cli.evaluate import evaluate
from vllm_steer.cli.evidence import evidence
from vllm_steer.cli.fit import fit
from vllm_steer.cli.inspect import inspect
from vllm_steer.cli.sweep import sweep
from vllm_steer.cli.transfer import transfer
from vllm_steer.errors import SteerError

app = typer.Typer(
    name="vllm-steer",
    help="Steer a language model per request while vLLM serves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.add_typer(fit)
app.command()(convert)
app.command()(inspect)
app.command()(evidence)
app.command()(transfer)
app.command("eval")(evaluate)
app.command()(sweep)
app.command()(doctor)


def main() -> None:
    """Run the command line; a ``SteerError`` becomes one line and exit code 1."""
    try:
        app()
    except SteerError as error:
        print("vllm-steer:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
