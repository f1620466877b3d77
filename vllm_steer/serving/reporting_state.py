"""Whether the outputs of this process's engines may carry strengths."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan


@dataclass
class ReportingState:
    """State of strength reporting; outputs are not searched for strengths until a request needs it.

    is_enabled  whether any request with dynamic strength, or one that asks, was admitted
    plan        the plan under which the last dynamic one was admitted
    """

    is_enabled: bool = False
    plan: "SteerPlan | None" = None


REPORTING = ReportingState()


def enable_reporting(plan: "SteerPlan | None" = None) -> None:
    """Enable the search for strengths in outputs in this process. Cannot be disabled again."""
    REPORTING.is_enabled = True
    REPORTING.plan = plan or REPORTING.plan
