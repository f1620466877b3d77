"""Conditions: read from a prompt's hidden states, they decide which rows of a batch a dose acts on.

A condition's verdict is of one text. It is read in the forward passes of the prompt, which may be
several, and stays as it is for the rest of the text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vllm_steer.doses import Dose, Gate
from vllm_steer.errors import SteerError
from vllm_steer.hf import sites
from vllm_steer.hf.equations import SIMILARITY
from vllm_steer.hf.token_positions import PositionTracker
from vllm_steer.steers import ConditionSteer


def similarity(condition: ConditionSteer, x: torch.Tensor) -> torch.Tensor:
    """The similarity of ``x [..., width]`` to the condition's vector, ``[...]``, in the dtype of
    the sums.
    """
    wide = sites.widened(x)
    return SIMILARITY[condition.similarity](wide, condition.vector[0].to(wide))


def matches(condition: ConditionSteer, x: torch.Tensor) -> torch.Tensor:
    """Whether each token of ``x [..., width]`` is on the condition's side of the threshold."""
    values = similarity(condition, x)
    if condition.side == "above":
        return values > condition.threshold
    return values < condition.threshold


@dataclass
class ConditionReader:
    """Reads one condition, and has the verdict of each row of the batch.

    ``holds`` is ``[rows]`` bool for the text of that number, None as long as the prompt's tokens
    were not read. ``any`` of the prompt's tokens is known only if all of them were read, from the
    first one on: the first ``num_read`` were.
    """

    name: str
    condition: ConditionSteer
    tracker: PositionTracker
    holds: torch.Tensor | None = None
    text: int = 0
    num_read: int = 0

    def read(self, x: torch.Tensor) -> None:
        """Read the prompt's tokens among those of a forward pass, ``x [batch, tokens, width]``."""
        if self.text != self.tracker.text:
            self.text, self.num_read, self.holds = self.tracker.text, 0, None
        span = self.tracker.span
        start, stop = int(span.positions[0]), int(span.positions[-1]) + 1
        end = min(stop, span.prompt)
        if end <= start:
            return
        found = matches(self.condition, x[:, : end - start]).cpu()
        if self.condition.tokens == "any":
            self.holds = self._joined(found.any(1), start)
            self.num_read = end
        elif end == span.prompt:
            self.holds = found[:, -1]

    def _joined(self, found: torch.Tensor, start: int) -> torch.Tensor | None:
        """Whether any token matches, those of the passes before included."""
        if start == 0:
            return found
        if self.holds is None or start != self.num_read or self.holds.shape != found.shape:
            return None
        return self.holds | found


@dataclass(frozen=True)
class Gates:
    """The readers of all conditions that doses name."""

    readers: Mapping[str, ConditionReader]
    tracker: PositionTracker

    @classmethod
    def of(
        cls,
        doses: Iterable[Dose],
        conditions: Mapping[str, ConditionSteer],
        tracker: PositionTracker,
    ) -> "Gates":
        """Readers of the conditions that the doses name."""
        names = {name for dose in doses if dose.gate for name in dose.gate.conditions}
        readers = {name: ConditionReader(name, conditions[name], tracker) for name in sorted(names)}
        return cls(readers, tracker)

    def open_rows(self, gate: Gate, num_rows: int) -> torch.Tensor:
        """On which rows of the batch a gated dose acts, ``[rows]`` bool.

        Raises ``SteerError`` if a verdict is not known yet, or is that of another batch.
        """
        verdicts = torch.stack([self._verdict(name, num_rows) for name in gate.conditions])
        return verdicts.all(0) if gate.needs == "all" else verdicts.any(0)

    def _verdict(self, name: str, num_rows: int) -> torch.Tensor:
        reader = self.readers[name]
        if reader.holds is None or reader.text != self.tracker.text:
            raise SteerError(
                f"condition {name} was not read: run all of the prompt within this block, and "
                "before the tokens of the answer if a steer acts in a layer before the condition's"
            )
        if len(reader.holds) != num_rows:
            raise SteerError(
                f"condition {name} was read for {len(reader.holds)} rows and the batch has "
                f"{num_rows}; keep the prompt's batch"
            )
        return reader.holds
