"""LM-Steer as an operation over the rows of one batch: its operands, its forms, their choice.

``reference`` spells the equation out, ``grouped`` is plain torch and runs on every device. A form
with the same signature is added to ``FORMS`` and chosen in ``choose``.
"""

from collections.abc import Callable

import torch

from vllm_steer.kernels.lm_steer import grouped, reference
from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerTables,
)

__all__ = [
    "FORMS",
    "Constant",
    "Dense",
    "LowRank",
    "Slot",
    "SteerTables",
    "SteeredRows",
    "choose",
    "steer_rows",
]

SteerRows = Callable[[torch.Tensor, SteerTables, SteeredRows], torch.Tensor]

FORMS: dict[str, SteerRows] = {
    "reference": reference.steer_rows,
    "torch": grouped.steer_rows,
}


def choose(form: str | None = None) -> SteerRows:
    """The form to run; None chooses. Raises ``ValueError`` for a form that does not exist."""
    if form is None:
        return FORMS["torch"]
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    return FORMS[form]


def steer_rows(x: torch.Tensor, tables: SteerTables, steered: SteeredRows) -> torch.Tensor:
    """``x[b]`` plus the change of every pair ``(b, slot)``, by the form that fits."""
    return choose()(x, tables, steered)
