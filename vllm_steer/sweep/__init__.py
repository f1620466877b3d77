"""Search for a steer's layers and strength: the strongest effect within a perplexity budget.

``sweep`` measures a grid or a bisection of strengths in one vLLM engine and is behind
``vllm-steer sweep``; ``SweepResult.choose`` selects the point.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

from typing import TYPE_CHECKING

from vllm_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from vllm_steer.sweep.candidates import CandidateLayers
    from vllm_steer.sweep.search import Point
    from vllm_steer.sweep.sweep_run import Search, SweepResult, SweepSettings, sweep

__all__ = ["CandidateLayers", "Point", "Search", "SweepResult", "SweepSettings", "sweep"]

__getattr__ = lazy_exports(
    __name__,
    {
        "CandidateLayers": f"{__name__}.candidates",
        "Point": f"{__name__}.search",
        **dict.fromkeys(
            ("Search", "SweepResult", "SweepSettings", "sweep"), f"{__name__}.sweep_run"
        ),
    },
)
