"""Whether the outputs of this process's engines may carry strengths."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_steer.plan import SteerPlan


@dataclass
class ReportingState:
    """Until a request needs it, no output is searched for strengths.

    is_enabled  whether any request with dynamic strength, or one that asks, was admitted
    plan        the plan under which the last dynamic one was admitted
    """

    is_enabled: bool = False
    plan: "SteerPlan | None" = None


REPORTING = ReportingState()


def enable_reporting(plan: "SteerPlan | None" = None) -> None:
    """Have outputs searched for strengths in this process, from here on."""
    REPORTING.is_enabled = True
    REPORTING.plan = plan or REPORTING.plan
