"""What a comparison is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from vllm_steer.evaluation.generating import EngineOptions
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.sampling import Sampling


@dataclass(frozen=True)
class Comparison:
    """What is asked: a model, the file of properties, prompts, and how to sample.

    Strengths and options are chosen on the ``choosing`` prompts, without them on the same prompts
    that are reported. ``tolerance`` is that of ``choose``. ``judges`` are judges of the texts as a
    whole; perplexity by the model itself and diversity stand for those kinds where none is given.
    """

    model: str
    file: Path
    prompts: Prompts
    folder: Path
    choosing: Prompts | None = None
    judges: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: float = 0.02
    engine: EngineOptions = field(default_factory=EngineOptions)
    restart: bool = False

    @property
    def specs(self) -> tuple[str, ...]:
        """Perplexity and diversity first, then the judges given beside them."""
        kinds = {spec.partition(":")[0] for spec in self.judges}
        usual = {"perplexity": f"perplexity:{self.model}", "diversity": "diversity"}
        return (*(spec for kind, spec in usual.items() if kind not in kinds), *self.judges)
