"""Command-line arguments that several benchmarks take."""

import argparse
import math
from collections.abc import Collection
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the first line of ``doc`` as its description and the required option
    ``--json``.
    """
    result = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    result.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    return result


def numbers(text: str) -> list[int]:
    """Parse positive integers such as ``1,4,32``: sorted, without duplicates."""
    values = sorted({int(part) for part in text.split(",")})
    if values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1, as in 1,4,32")
    return values


def add_names(parser: argparse.ArgumentParser, flag: str, known: Collection[str]) -> None:
    """Add a flag that accepts some of ``known``, in the given order; the default is all."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {list(known)}")
        return names

    help_text = f"some of {', '.join(known)}, in the order to measure them in"
    parser.add_argument(flag, type=parse, default=list(known), metavar="NAME,...", help=help_text)


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """Add ``--seconds``, the time limit of a run."""
    help_text = "begin no case later than this; what is left out stands in the result"
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help=help_text)
