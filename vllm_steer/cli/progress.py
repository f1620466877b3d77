"""Progress bars on standard error, so that standard output has results only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from vllm_steer.cli.terminal import Console, one_line

_BAR: Final = 20
_COUNTS: Final = 30  # done, total, remaining time and spaces
_SHORTEST, _LONGEST = 16, 60


class ProgressBarCallback(Protocol):
    """``advance(done)`` sets the position of the bar; ``description`` and ``total`` replace its
    own.
    """

    def __call__(
        self, done: int, *, total: int | None = None, description: str | None = None
    ) -> None: ...


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[ProgressBarCallback]:
    """Show a progress bar while the block runs, unless standard error is not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        # A long description leaves room for the counts and the remaining time.
        longest = max(_SHORTEST, min(_LONGEST, console.width - _BAR - _COUNTS))
        task = bars.add_task(console.shown(one_line(description, longest)), total=total)

        def advance(done: int, *, total: int | None = None, description: str | None = None) -> None:
            text = None if description is None else console.shown(one_line(description, longest))
            bars.update(task, completed=done, total=total, description=text)

        yield advance
