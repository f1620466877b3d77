"""The share of texts that have each property of a combination, and all of them at once."""

from collections.abc import Mapping, Sequence

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers, Judge, PropertyJudge
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec
from vllm_steer.evaluation.judges import make_judge
from vllm_steer.evaluation.means import mean

Verdicts = Sequence[Sequence[bool]]
"""By prompt and text."""


class PropertyJudges:
    """The judge of each property. Texts that were judged are not judged again."""

    def __init__(self, asked: ComparisonSpec, judges: Mapping[str, PropertyJudge]) -> None:
        self._judges = judges
        self._wanted = {name: 0.0 if p.opposite else 1.0 for name, p in asked.properties.items()}
        self._known: dict[tuple[str, str], Verdicts] = {}

    def has(self, name: str, texts: str, answers: Sequence[Answers]) -> Verdicts:
        """Whether each text has the property; an undecided one has not, nor its opposite."""
        if (name, texts) not in self._known:
            wanted = self._wanted[name]
            found = self._judges[name].verdicts(answers)
            self._known[name, texts] = [[verdict == wanted for verdict in row] for row in found]
        return self._known[name, texts]

    def has_all(self, names: Combination, texts: str, answers: Sequence[Answers]) -> Verdicts:
        """Whether each text has all the properties at once."""
        found = [self.has(name, texts, answers) for name in names]
        by_prompt = zip(*found, strict=True)
        return [[all(each) for each in zip(*rows, strict=True)] for rows in by_prompt]


def share(verdicts: Verdicts) -> float:
    """The mean over prompts of the share of a prompt's texts; NaN where there is no text."""
    return mean(mean(map(float, row)) for row in verdicts)


def property_judges(asked: ComparisonSpec) -> dict[str, PropertyJudge]:
    """A judge for each property.

    Raises ``SteerError`` for one that is misspelt or not available, and one that tells no property.
    """
    judges: dict[str, PropertyJudge] = {}
    for name, wanted in asked.properties.items():
        judge: Judge = make_judge(wanted.judge)
        if not isinstance(judge, PropertyJudge):
            raise SteerError(
                f"property {name}: judge {wanted.judge} does not say of a text whether it has a "
                "property; take classifier:MODEL:LABEL, language:CODE or lexicon:FILE"
            )
        judges[name] = judge
    return judges
