"""Upper limits of numbers on the command line."""

from typing import Final

import typer

MOST: Final = 2**31 - 1
"""Of counts and seeds: what every library underneath can count to."""


def bounded(value: int | None) -> int | None:
    """The value of an option; an error of the command line beyond ``MOST`` either way.

    Typer's own ``max`` would show the number in each line of a help.
    """
    if value is not None and abs(value) > MOST:
        raise typer.BadParameter(f"{value} is not in the range -{MOST} to {MOST}")
    return value
