"""Which language texts are in, by langdetect.

Source: Scalena et al., BlackboxNLP 2024 (arXiv 2406.17563): the mean of the probability
that langdetect gives the wanted language, 0 where it does not name it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean_over_prompts
from vllm_steer.optional import require_package


@dataclass(frozen=True)
class LanguageJudge:
    """How surely the continuations are in one language; the prompts are not looked at."""

    name: str
    code: str
    effect: str = "probability"

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``probability``, and ``share``: how often the language is the likeliest one."""
        found = {text: detected(text) for answer in answers for text in answer.texts}
        return {
            "probability": mean_over_prompts(answers, lambda text: found[text].get(self.code, 0.0)),
            "share": mean_over_prompts(answers, lambda text: self._likeliest(found[text])),
        }

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """1.0 where the language is the likeliest one; 0.0 else, and for a text without letters."""
        return [[self._likeliest(detected(text)) for text in answer.texts] for answer in answers]

    def _likeliest(self, codes: Mapping[str, float]) -> float:
        return float(bool(codes) and max(codes, key=codes.__getitem__) == self.code)


def detected(text: str) -> dict[str, float]:
    """Languages and their probabilities, likeliest first; none for a text without letters.

    langdetect draws at random: its seed is set to 0, so that a text has one answer.
    """
    langdetect = require_package("langdetect")
    langdetect.DetectorFactory.seed = 0
    try:
        return {each.lang: each.prob for each in langdetect.detect_langs(text)}
    except langdetect.LangDetectException:
        return {}


def check_code(code: str) -> None:
    """Raise ``SteerError`` for a language that langdetect does not know."""
    factory = require_package("langdetect.detector_factory")
    factory.init_factory()
    # The public functions make their own detector from this factory; only it knows the list.
    known = sorted(factory._factory.get_lang_list())
    if code not in known:
        raise SteerError(f"language {code!r} is unknown to langdetect; it knows {', '.join(known)}")
