"""The ``vllm-steer`` command."""

import os
import sys
from typing import Annotated, Final, NoReturn

import typer

from vllm_steer.cli.commands import LazyGroup
from vllm_steer.cli.libraries import VERBOSE, set_verbosity
from vllm_steer.cli.terminal import one_line, protect_streams
from vllm_steer.errors import SteerError, cause
from vllm_steer.version import __version__

_INTERRUPTED: Final = 130

app = typer.Typer(
    name="vllm-steer",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,  # its boxes cut option names in a terminal of 80 columns
    pretty_exceptions_enable=False,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print("vllm-steer", __version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option(VERBOSE, help="With any command: show messages of the libraries.")
    ] = False,
) -> None:
    """Steer a language model per request while vLLM serves it.

    To serve steers, give vLLM a steer config: vllm serve MODEL --steer-config steers.yaml
    """


def main() -> None:
    """Run the command line; a ``SteerError`` becomes one line and exit code 1.

    So does an output stream that cannot be written to; a closed pipe ends silently. An interrupt
    ends with exit code 130, as in a shell.
    """
    protect_streams()
    # Before libraries are imported, and wherever in the line it stands.
    set_verbosity(VERBOSE in sys.argv)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv[1:end] = [argument for argument in sys.argv[1:end] if argument != VERBOSE]
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is reported here
    except SteerError as error:
        _end(str(error))
    except BrokenPipeError:
        _end("")
    except OSError as error:
        _end(f"{error.filename or 'standard output'}: {error.strerror}")
    except (RecursionError, MemoryError, OverflowError, UnicodeError) as error:
        # Unexpected errors of untrusted files, whose tracebacks can have thousands of lines.
        _end(f"{type(error).__name__}: {cause(error)}")
    except KeyboardInterrupt:
        _end("interrupted", code=_INTERRUPTED)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        _end(cause(error))  # PyTorch raises plain RuntimeErrors for some out-of-memory errors


def _end(message: str, code: int = 1) -> NoReturn:
    if message:
        print("vllm-steer:", one_line(" ".join(message.split())), file=sys.stderr)
    # Python flushes the buffer again at exit, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
