"""Hostile files by kind: every kind is a function that makes a new file for each random generator.

``CANARY`` in a text is the name of a file that must never be created.
"""

import random
from collections.abc import Callable, Iterator

Maker = Callable[[random.Random], str | bytes]

CANARY = "CANARY"
TERMINAL = (
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "\x1b[2J\x1b[31m",
    "\x07\x08\r",
    "\x9b31m",
    "\u202egnp.exe",
    "[bold red]x[/] [/bold] [link=file:///etc/passwd]y[/link]",
    "a\nb\n\tc",
    "\u200b\u2028\ufeff",
    "\ud800",
)
FEW = 3


class Kinds:
    """Kinds by the names of their functions."""

    def __init__(self, *parts: "Kinds") -> None:
        self.makers: dict[str, Maker] = {}
        self._few: set[str] = set()
        for part in parts:
            self.makers |= part.makers
            self._few |= part._few

    def add(self, make: Maker) -> Maker:
        self.makers[make.__name__] = make
        return make

    def slow(self, make: Maker) -> Maker:
        """A kind whose files are slow to make, so there are few of them."""
        self._few.add(make.__name__)
        return self.add(make)

    def files(self, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
        """``count`` files of every kind, named by kind and number."""
        for kind, make in self.makers.items():
            for number in range(min(FEW, count) if kind in self._few else count):
                content = make(random.Random(f"{seed} {kind} {number}"))
                data = (
                    content.encode("utf-8", "surrogatepass")
                    if isinstance(content, str)
                    else content
                )
                yield f"{kind}-{number}", data
