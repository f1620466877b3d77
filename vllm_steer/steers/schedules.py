"""The schedules of step deltas: the strength at each generation step.

Step 0 is the last prompt token. At strength ``v`` and with ``n`` steps of the delta

    a_i = v * (1 - slope * i)  for  0 <= i < last,  else 0

    fixed: last = n, slope = 0     start: last = 1, slope = 0     dim: last = n, slope = 1 / n

Source: Scalena et al., BlackboxNLP 2024 (arXiv 2406.17563), section 3.3.
"""

from typing import Final, Literal, NamedTuple, get_args

Schedule = Literal["fixed", "start", "dim"]
SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)


class ScheduleCurve(NamedTuple):
    """A schedule of a delta: it acts for ``last`` steps and decays by ``slope`` per step."""

    last: int
    slope: float

    def strength(self, strength: float, step: int) -> float:
        """``a_i`` at generation step ``step``."""
        return strength * (1 - self.slope * step) if 0 <= step < self.last else 0.0


def schedule_curve(schedule: Schedule | None, steps: int) -> ScheduleCurve:
    """The curve of a schedule for a delta of ``steps`` steps; None means ``fixed``."""
    return ScheduleCurve(
        last=1 if schedule == "start" else steps, slope=1 / steps if schedule == "dim" else 0.0
    )
