"""A file that was told apart: what it is, and which facts its reader has a use for."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import FORMAT_FACTS, Facts
from vllm_steer.foreign import printable
from vllm_steer.steers import Steer

_LONGEST_CAUSE = 200


@dataclass(frozen=True)
class Source:
    """``format`` in words; ``kind`` of the steer in it, None where the facts decide it."""

    format: str
    kind: str | None
    read: Callable[[Facts], Steer]
    uses: tuple[str, ...] = ()

    def steer(self, facts: Facts) -> Steer:
        """Read the steer. Raises ``SteerError`` for a fact that the format has no use for."""
        if self.kind is not None and facts.kind not in (None, self.kind):
            raise SteerError(
                f"{self.format} holds a steer of kind {self.kind}; it was given as {facts.kind}; "
                "drop the key"
            )
        unused = [
            name
            for name in FORMAT_FACTS
            if name not in self.uses and getattr(facts, name) is not None
        ]
        if unused:
            raise SteerError(f"{', '.join(unused)} means nothing for {self.format}; drop it")
        return self.read(facts)


def cause(error: BaseException) -> str:
    """Why a reader failed, in one line: some libraries answer with advice of a page."""
    said = error.strerror if isinstance(error, OSError) else None
    text = (said or str(error)).strip() or type(error).__name__
    return printable(text.splitlines()[0], _LONGEST_CAUSE)
