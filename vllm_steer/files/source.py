"""An identified file: its format, and the metadata keys that apply to it."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import FORMAT_FACTS, Facts
from vllm_steer.steers import Steer


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
