"""Language identification as a judge, with langdetect.

Source: Scalena et al., BlackboxNLP 2024 (arXiv 2406.17563): the mean probability that langdetect
gives the target language, 0 if langdetect does not list it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.text_means import TextMeanJudge
from vllm_steer.optional import require_package


@dataclass(frozen=True)
class LanguageJudge(TextMeanJudge):
    """Probability and share of one language in the continuations; prompts are not read.

    ``share`` is the share of texts whose most probable language is the target.
    """

    names: ClassVar = ("probability", "share")
    name: str
    code: str
    effect: str = "probability"

    def of_text(self, text: str) -> dict[str, float]:
        """``probability``, and ``share`` as 1 or 0."""
        codes = detect_languages(text)
        return {"probability": codes.get(self.code, 0.0), "share": self._likeliest(codes)}

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """1.0 if the target is the most probable language, else 0.0, also for a text without
        letters.
        """
        return [
            [self._likeliest(detect_languages(text)) for text in answer.texts] for answer in answers
        ]

    def _likeliest(self, codes: Mapping[str, float]) -> float:
        return float(bool(codes) and max(codes, key=codes.__getitem__) == self.code)


def detect_languages(text: str) -> dict[str, float]:
    """Probabilities by language, the most probable first; empty for a text without letters.

    langdetect samples at random; a fixed seed of 0 makes the result deterministic.
    """
    langdetect = require_package("langdetect")
    langdetect.DetectorFactory.seed = 0
    try:
        return {detection.lang: detection.prob for detection in langdetect.detect_langs(text)}
    except langdetect.LangDetectException:
        return {}


def check_code(code: str) -> None:
    """Raise ``SteerError`` for a language that langdetect does not support."""
    factory = require_package("langdetect.detector_factory")
    factory.init_factory()
    # langdetect has no public function for its list of languages.
    codes = sorted(factory._factory.get_lang_list())
    if code not in codes:
        raise SteerError(
            f"language {code!r} is not supported by langdetect; supported: {', '.join(codes)}"
        )
