"""Evaluation of steers: generate texts with vLLM, score them with judges, report the figures.

``evaluate`` measures one steer at several strengths beside a random control and is behind
``vllm-steer eval``; ``compare`` compares fixed, scheduled and dynamic strengths of several
properties and is behind ``vllm-steer compare``.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

from typing import TYPE_CHECKING, Final

from vllm_steer.errors import JudgeUnavailableError
from vllm_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from vllm_steer.evaluation.answers import Answers, Judge, PropertyJudge, TextJudge
    from vllm_steer.evaluation.composition.comparison_run import compare
    from vllm_steer.evaluation.composition.report import ComparisonReport
    from vllm_steer.evaluation.composition.settings import ComparisonSettings
    from vllm_steer.evaluation.control import random_steer
    from vllm_steer.evaluation.evaluation_run import EvaluationSettings, evaluate
    from vllm_steer.evaluation.generation import EngineOptions
    from vllm_steer.evaluation.judges import make_judge, make_judges
    from vllm_steer.evaluation.pnes import Pnes
    from vllm_steer.evaluation.prompts import Prompts, read_prompts
    from vllm_steer.evaluation.report import EvaluationReport, JudgeEntry
    from vllm_steer.evaluation.run import Condition
    from vllm_steer.evaluation.sampling import Sampling

__all__ = [
    "Answers",
    "ComparisonReport",
    "ComparisonSettings",
    "Condition",
    "EngineOptions",
    "EvaluationReport",
    "EvaluationSettings",
    "Judge",
    "JudgeEntry",
    "JudgeUnavailableError",
    "Pnes",
    "Prompts",
    "PropertyJudge",
    "Sampling",
    "TextJudge",
    "compare",
    "evaluate",
    "make_judge",
    "make_judges",
    "random_steer",
    "read_prompts",
]

_MODULES: Final = {
    "answers": ("Answers", "Judge", "PropertyJudge", "TextJudge"),
    "composition.comparison_run": ("compare",),
    "composition.report": ("ComparisonReport",),
    "composition.settings": ("ComparisonSettings",),
    "control": ("random_steer",),
    "evaluation_run": ("EvaluationSettings", "evaluate"),
    "generation": ("EngineOptions",),
    "judges": ("make_judge", "make_judges"),
    "pnes": ("Pnes",),
    "prompts": ("Prompts", "read_prompts"),
    "report": ("EvaluationReport", "JudgeEntry"),
    "run": ("Condition",),
    "sampling": ("Sampling",),
}

__getattr__ = lazy_exports(
    __name__,
    {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names},
)
