"""Activation guidance as two operations of one step: map the tokens, then steer them per layer.

``reference`` spells the equations out, ``gather`` is plain torch and runs on every device.
"""

from types import ModuleType

from vllm_steer.kernels.guidance import gather, reference
from vllm_steer.kernels.guidance.operands import Directions, Rules, TokenMap

__all__ = ["FORMS", "Directions", "Rules", "TokenMap", "choose"]

FORMS: dict[str, ModuleType] = {"reference": reference, "torch": gather}


def choose(form: str | None = None) -> ModuleType:
    """The form to run; None chooses. Raises ``ValueError`` for a form that does not exist."""
    if form is None:
        return FORMS["torch"]
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    return FORMS[form]
