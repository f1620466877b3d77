"""Command-line arguments that several benchmarks take."""

import argparse
import math
from collections.abc import Collection
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of ``doc`` and asks for ``--json``."""
    result = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    result.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    return result


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, in order, each once: ``1,4,32``."""
    values = sorted({int(part) for part in text.split(",")})
    if values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1, as in 1,4,32")
    return values


def add_names(parser: argparse.ArgumentParser, flag: str, known: Collection[str]) -> None:
    """A flag that takes some of ``known``, in the order given; all of them by default."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {list(known)}")
        return names

    help_text = f"some of {', '.join(known)}, in the order to measure them in"
    parser.add_argument(flag, type=parse, default=list(known), metavar="NAME,...", help=help_text)


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """The time of a run."""
    help_text = "begin no case later than this; what is left out stands in the result"
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help=help_text)
