"""Command-line arguments that several benchmarks take."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of ``doc`` and asks for ``--json``."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    return made


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, in order, each once: ``1,4,32``."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 are wanted, as in 1,4,32")
    return found


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Names among ``known``, in the order given: ``one,other``."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {known}")
        return names

    return parse
