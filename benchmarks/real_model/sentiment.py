"""Sentiment on a pretrained model: the sentences of SST-5, and judges with standard errors."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.real_model.experiment import jackknife
from vllm_steer.evaluation import Answers, Judge
from vllm_steer.evaluation.diversity import distinct
from vllm_steer.evaluation.means import mean, mean_over_prompts
from vllm_steer.evaluation.perplexity import Likelihood, likelihoods, summary
from vllm_steer.models import LanguageModel
from vllm_steer.texts import LabelledText

Verdict = Callable[[str], float | None]
"""1.0 for a positive text, 0.0 for a negative one, None if undecided."""

VADER_THRESHOLD: Final = 0.05
_LINE: Final = re.compile(r"__label__([1-5])\t(.+)")
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

    Line ``n``, counted from 0, is for the judge if ``n % 4 == 3``, and of these held out from the
    judge too if ``n % 20 == 19``. A cut at one line would not do: the file's first half has the
    positive reviews. Exits with the line that has another form.
    """
    parts = Sentences([], [], [])
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        found = _LINE.fullmatch(line)
        if found is None:
            raise SystemExit(f"{path}, line {n + 1}: expected __label__1 to 5, a tab and a text")
        text = LabelledText(detokenise(found[2]), (int(found[1]) - 3) / 2)
        part = parts.steer if n % 4 != 3 else parts.held_out if n % 20 == 19 else parts.judge
        part.append(text)
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
class VerdictJudge:
    """Shares of positive, negative and undecided texts, means over prompts, with errors."""

    name: str
    verdict: Verdict
    effect: str = "positive"

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``positive``, ``negative``, ``undecided`` and the standard errors of the first two."""
        verdicts = {text: self.verdict(text) for answer in answers for text in answer.texts}

        def share(of: float | None, some: Sequence[Answers]) -> float:
            return mean_over_prompts(some, lambda text: float(verdicts[text] == of))

        return {
            **_with_error("positive", answers, partial(share, 1.0)),
            **_with_error("negative", answers, partial(share, 0.0)),
            "undecided": share(None, answers),
        }


@dataclass(frozen=True)
class DistinctJudge:
    """dist-1, dist-2 and dist-3 as ``vllm_steer.evaluation.diversity``, with errors."""

    name: str = "diversity"
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """Means over the prompts and their standard errors."""
        scores: dict[str, float] = {}
        for n in (1, 2, 3):
            scores |= _with_error(f"dist-{n}", answers, partial(_distinct, n))
        return scores


def _distinct(n: int, answers: Sequence[Answers]) -> float:
    return mean(distinct(answer.texts, n) for answer in answers)


@dataclass
class PerplexityWithErrors:
    """Perplexity of the continuations by a model, with errors; likelihoods are kept in a file."""

    name: str
    load: Callable[[], LanguageModel]
    file: Path
    effect: None = None
    _known: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            self._known = json.loads(self.file.read_text(encoding="utf-8"))

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``perplexity`` (the authors' mean) and ``total_perplexity`` with errors, ``median``."""
        self._add(answers)
        by_prompt = [
            [self._likelihood(answer, text) for text in answer.texts] for answer in answers
        ]

        def figure(name: str, prompts: Sequence[Sequence[Likelihood]]) -> float:
            return summary([likelihood for prompt in prompts for likelihood in prompt])[name]

        return {
            **_with_error("perplexity", by_prompt, partial(figure, "perplexity")),
            **_with_error("total_perplexity", by_prompt, partial(figure, "total_perplexity")),
            "median": figure("median", by_prompt),
        }

    def _likelihood(self, answer: Answers, text: str) -> Likelihood:
        nll, tokens = self._known[_key(answer, text)]
        return Likelihood(nll, int(tokens))

    def _add(self, answers: Sequence[Answers]) -> None:
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
        found = likelihoods(self.load(), new)
        self._known |= {k: [f.nll, f.num_tokens] for k, f in zip(keys, found, strict=True)}
        self.file.write_text(json.dumps(self._known), encoding="utf-8")


def _key(answer: Answers, text: str) -> str:
    return f"{answer.prompt}\x00{text}"


def _with_error(
    name: str, observations: Sequence[Any], statistic: Callable[[Sequence[Any]], float]
) -> dict[str, float]:
    value, error = jackknife(observations, statistic)
    return {name: value, f"{name}_error": error}


def sentiment_judges(
    classifier: SentenceClassifier, perplexity: PerplexityWithErrors
) -> list[Judge]:
    """The judges of both experiments."""
    return [
        VerdictJudge("vader", vader()),
        VerdictJudge("classifier", classifier.verdict),
        DistinctJudge(),
        perplexity,
    ]
