"""The ``vllm-steer`` command."""

import os
import sys
from typing import Final, NoReturn

import typer

from vllm_steer.cli.compare import compare
from vllm_steer.cli.convert import convert
from vllm_steer.cli.demo import demo
from vllm_steer.cli.doctor import doctor
from vllm_steer.cli.evaluate import evaluate
from vllm_steer.cli.evidence import evidence
from vllm_steer.cli.fit import fit
from vllm_steer.cli.inspect import inspect
from vllm_steer.cli.sweep import sweep
from vllm_steer.cli.terminal import one_line, protect_streams
from vllm_steer.cli.transfer import transfer
from vllm_steer.errors import SteerError
from vllm_steer.files.source import cause

_INTERRUPTED: Final = 130

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
app.command()(compare)
app.command()(sweep)
app.command()(doctor)


def main() -> None:
    """Run the command line; a ``SteerError`` becomes one line and exit code 1.

    So does an output stream that cannot be written to; one that nobody reads any more says nothing.
    An interruption ends with 130, as a shell's.
    """
    protect_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # where a full disk is found out
    except SteerError as error:
        _end(str(error))
    except BrokenPipeError:
        _end("")
    except OSError as error:
        _end(f"{error.filename or 'standard output'}: {error.strerror}")
    except (RecursionError, MemoryError, OverflowError, UnicodeError) as error:
        # What no reader has foreseen of a foreign file: its traceback can have thousands of lines.
        _end(f"{type(error).__name__}: {cause(error)}")
    except KeyboardInterrupt:
        _end("interrupted", code=_INTERRUPTED)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        _end(cause(error))  # PyTorch's, of which only some have a class of their own


def _end(said: str, code: int = 1) -> NoReturn:
    if said:
        print("vllm-steer:", one_line(" ".join(said.split())), file=sys.stderr)
    # What is still in the buffer would fail again as Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
