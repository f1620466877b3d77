"""Sentiment on a pretrained model: the sentences of SST-5, and judges with standard errors."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from vllm_steer.evaluation import Answers, Judge
from vllm_steer.evaluation.answers import OnText, ignore_count
from vllm_steer.evaluation.diversity import DiversityJudge
from vllm_steer.evaluation.perplexity import Likelihood, likelihoods, summary
from vllm_steer.evaluation.text_means import TextMeanJudge
from vllm_steer.models import LanguageModel
from vllm_steer.texts import LabelledText, read_labelled

Verdict = Callable[[str], float | None]
"""1.0 for a positive text, 0.0 for a negative one, None if undecided."""

VADER_THRESHOLD: Final = 0.05
_CONTRACTIONS: Final = r" (n't|'(?:s|re|ve|ll|d|m)\b)"
_PIECES: Final = (  # of the Penn Treebank's tokens, in the order of their replacement
    (r"``\s*|\s*''", '"'),
    (r"`\s*", "'"),
    (_CONTRACTIONS, r"\1"),
    (r" ([.,;:!?%)]|\.\.\.)", r"\1"),
    (r"([($]) ", r"\1"),
    (r"\s+'(?=[\s.,;:!?)]|$)", "'"),
)


class Sentences(NamedTuple):
    """The parts of SST-5; no sentence is in two of them."""

    steer: list[LabelledText]
    judge: list[LabelledText]
    held_out: list[LabelledText]


def read_sst(path: Path) -> Sentences:
    """The sentences of a fastText file, detokenised, labels 1 to 5 as -1 to 1.

    Sentence ``n``, counted from 0, is for the judge if ``n % 4 == 3``, and of these held out from
    the judge too if ``n % 20 == 19``. A cut at one place would not do: the file's first half has
    the positive reviews.
    """
    parts = Sentences([], [], [])
    for n, (text, label) in enumerate(read_labelled(path, labels="1:5")):
        part = parts.steer if n % 4 != 3 else parts.held_out if n % 20 == 19 else parts.judge
        part.append(LabelledText(detokenise(text), label))
    return parts


def detokenise(text: str) -> str:
    """A sentence of the Penn Treebank's tokens as it is written."""
    for pattern, replacement in _PIECES:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def balanced(sentences: Sequence[LabelledText], count: int) -> list[LabelledText]:
    """``count`` sentences, negative and positive ones by turns, in the order of the file."""
    sides = [[s for s in sentences if s.label * sign > 0] for sign in (-1, 1)]
    pairs = zip(*sides, strict=False)
    return [sentence for pair in pairs for sentence in pair][:count]


def verdict_of(score: float, threshold: float = VADER_THRESHOLD) -> float | None:
    """1.0 above ``threshold``, 0.0 below ``-threshold``, None in between."""
    return None if abs(score) <= threshold else float(score > 0)


@cache
def vader() -> Verdict:
    """VADER's compound score; above 0.05 positive, below -0.05 negative.

    Source: Hutto and Gilbert, ICWSM 2014, and the thresholds that its authors recommend.
    """
    try:
        vader_sentiment = import_module("vaderSentiment.vaderSentiment")
    except ImportError:
        raise SystemExit("the judge VADER is not installed; pip install vaderSentiment") from None
    analyzer = vader_sentiment.SentimentIntensityAnalyzer()
    return lambda text: verdict_of(analyzer.polarity_scores(text)["compound"])


@dataclass(frozen=True)
class SentenceClassifier:
    """Logistic regression on TF-IDF of words and pairs of words, and its held-out accuracy."""

    pipeline: Any
    accuracy: float
    sentences: int

    def verdict(self, text: str) -> float:
        """1.0 if positive is the more probable label, else 0.0."""
        return float(self.pipeline.predict([text])[0])


def fit_classifier(sentences: Sentences) -> SentenceClassifier:
    """Fit to the judge's part, measure on the held-out one; neutral sentences are left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    pipeline = make_pipeline(words, LogisticRegression(C=10.0, class_weight="balanced"))
    texts, sides = _with_side(sentences.judge)
    pipeline.fit(texts, sides)
    accuracy = float(pipeline.score(*_with_side(sentences.held_out)))
    return SentenceClassifier(pipeline, accuracy, len(texts))


def _with_side(sentences: Iterable[LabelledText]) -> tuple[list[str], list[int]]:
    decided = [sentence for sentence in sentences if sentence.label]
    return [s.text for s in decided], [int(s.label > 0) for s in decided]


@dataclass(frozen=True)
class VerdictJudge(TextMeanJudge):
    """Shares of positive, negative and undecided texts, means over prompts."""

    name: str
    verdict: Verdict
    effect: str = "positive"
    names: ClassVar[tuple[str, ...]] = ("positive", "negative", "undecided")

    def of_text(self, text: str) -> dict[str, float]:
        """1.0 for the verdict of a text, 0.0 for the others."""
        verdict = self.verdict(text)
        values = zip(self.names, (1.0, 0.0, None), strict=True)
        return {name: float(verdict == value) for name, value in values}


@dataclass
class StoredPerplexity:
    """Perplexity of the continuations by a model; likelihoods are kept in a file."""

    name: str
    load: Callable[[], LanguageModel]
    file: Path
    effect: None = None
    _known: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            self._known = json.loads(self.file.read_text(encoding="utf-8"))

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """As ``PerplexityJudge``."""
        return self.figures(self.observe(answers))

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> list[list[Likelihood]]:
        """The likelihoods of each prompt's texts."""
        self._add(answers, on_text)
        return [[self._likelihood(answer, text) for text in answer.texts] for answer in answers]

    def figures(self, observations: Sequence[Sequence[Likelihood]]) -> dict[str, float]:
        """As ``PerplexityJudge``."""
        return summary([likelihood for texts in observations for likelihood in texts])

    def _likelihood(self, answer: Answers, text: str) -> Likelihood:
        nll, tokens = self._known[_key(answer, text)]
        return Likelihood(nll, int(tokens))

    def _add(self, answers: Sequence[Answers], on_text: OnText) -> None:
        new = [
            Answers(
                answer.prompt, tuple(t for t in answer.texts if _key(answer, t) not in self._known)
            )
            for answer in answers
        ]
        new = [answer for answer in new if answer.texts]
        if not new:
            return
        keys = [_key(answer, text) for answer in new for text in answer.texts]
        found = likelihoods(self.load(), new, on_text)
        self._known |= {k: [f.nll, f.num_tokens] for k, f in zip(keys, found, strict=True)}
        self.file.write_text(json.dumps(self._known), encoding="utf-8")


def _key(answer: Answers, text: str) -> str:
    return f"{answer.prompt}\x00{text}"


def sentiment_judges(classifier: SentenceClassifier, perplexity: StoredPerplexity) -> list[Judge]:
    """The judges of both experiments."""
    return [
        VerdictJudge("vader", vader()),
        VerdictJudge("classifier", classifier.verdict),
        DiversityJudge("diversity"),
        perplexity,
    ]
