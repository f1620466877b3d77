"""The streams of a request with dynamic strength.

Dynamic doses inside the layers need a base stream and a probe stream each, see ``request_args``. A
request whose doses all act at the LM head needs no other stream, as its hidden state is unsteered.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_steer.doses import Dose, is_dynamic
from vllm_steer.steers.sites import acts_at_head

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan


def probed_doses(doses: Sequence[Dose], plan: "SteerPlan") -> tuple[int, ...]:
    """Indices of the dynamic doses that need a probe stream: those inside the layers."""
    return tuple(
        index
        for index, dose in enumerate(doses)
        if dose.dynamic and not acts_at_head(plan.steer_of(dose))
    )


def needs_streams(doses: Sequence[Dose], plan: "SteerPlan") -> bool:
    """True if base and probe logits need streams, because the request's hidden state is steered."""
    inside = not all(acts_at_head(plan.steer_of(dose)) for dose in doses)
    return inside and is_dynamic(doses)


def num_streams(doses: Sequence[Dose], plan: "SteerPlan") -> int:
    """How many requests of the engine serve one request with these doses."""
    return 2 + len(probed_doses(doses, plan)) if needs_streams(doses, plan) else 1
