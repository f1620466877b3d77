"""Whether this process has strengths to look for in the outputs of its engines."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan


@dataclass
class Expectation:
    """What the outputs of a process may carry. Until something does, none is looked at.

    strengths  whether any request with dynamic strength, or one that asks, was admitted
    plan       the plan that admitted the last dynamic one
    """

    strengths: bool = False
    plan: "SteerPlan | None" = None


EXPECTATION = Expectation()


def expect_strengths(plan: "SteerPlan | None" = None) -> None:
    """Admission's word that outputs may carry strengths from here on, for good."""
    EXPECTATION.strengths = True
    EXPECTATION.plan = plan or EXPECTATION.plan
