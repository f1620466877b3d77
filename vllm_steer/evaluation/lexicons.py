"""Word lists as judges: a text gets the label with the most listed words."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from vllm_steer.config_text import read_config_file
from vllm_steer.embedded import lexicon as embedded
from vllm_steer.embedded.corpus import LANGUAGES
from vllm_steer.errors import SteerError, cause
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.text_means import TextMeanJudge
from vllm_steer.untrusted_text import listed, shown

Verdict = Callable[[str], float | None]
"""1.0 or 0.0 for a text; None if undecided."""

_WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SIDES: Final = ("positive", "negative")
EMBEDDED_NAMES: Final = ("sentiment", "formality", "language=en|fr|de|es")


@dataclass(frozen=True)
class LexiconJudge(TextMeanJudge):
    """``share``: mean over prompts of the verdicts; an undecided text counts as ``tie``.

    ``undecided`` is the share of texts without a listed word or with equally many on both sides.
    Continuations are judged; prompts are not read.
    """

    names: ClassVar = ("share", "undecided")
    name: str
    verdict: Verdict
    tie: float = 0.5
    effect: str = "share"

    def of_text(self, text: str) -> dict[str, float]:
        """The verdict, and ``undecided`` as 1 or 0."""
        verdict = self.verdict(text)
        return {
            "share": self.tie if verdict is None else verdict,
            "undecided": float(verdict is None),
        }

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """The verdict of each text; None if undecided."""
        return [[self.verdict(text) for text in answer.texts] for answer in answers]


def by_words(positive: frozenset[str], negative: frozenset[str]) -> Verdict:
    """A verdict by counts: 1.0 for more positive words, 0.0 for more negative words, None for a
    tie.
    """

    def verdict(text: str) -> float | None:
        counts = Counter(_WORD.findall(text.lower()))
        balance = sum(n * ((word in positive) - (word in negative)) for word, n in counts.items())
        return None if balance == 0 else float(balance > 0)

    return verdict


def embedded_judge(name: str, lexicon: str) -> LexiconJudge:
    """A judge with the embedded corpus's word lists: ``sentiment``, ``formality`` or
    ``language=fr``.

    For ``language``, a text without a single majority language counts as 0. Raises ``SteerError``
    for an unknown list.
    """
    kind, _, code = lexicon.partition("=")
    if lexicon in ("sentiment", "formality"):
        measure: Callable[[str], float] = getattr(embedded, lexicon)
        return LexiconJudge(name, lambda text: None if measure(text) == 0.5 else measure(text))
    if kind == "language" and code in LANGUAGES:
        return LexiconJudge(name, lambda text: _in_language(text, code), tie=0.0)
    names = ", ".join(EMBEDDED_NAMES)
    raise SteerError(f"embedded lexicon {lexicon!r} is unknown; available: {names}")


def read_lexicon(path: str | Path) -> Verdict:
    """Read a YAML or JSON file ``{positive: [words], negative: [words]}``.

    Whole words are compared in lower case. Raises ``SteerError`` for a file that cannot be read or
    has another structure, for an entry that is not a single word, and for a word in both lists.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise SteerError(f"lexicon {path}: expected a .yaml, .yml or .json file")
    if not os.path.isfile(path):
        problem = "is not a regular file" if os.path.lexists(path) else "no such file"
        raise SteerError(f"lexicon {path}: {problem}; give a .yaml, .yml or .json file")
    try:
        content = read_config_file(path, f"lexicon {path}")
    except OSError as error:
        raise SteerError(f"lexicon {path}: cannot be read ({cause(error)})") from error
    if not isinstance(content, Mapping) or set(content) != set(_SIDES):
        raise SteerError(f"lexicon {path}: expected two lists, named positive and negative")
    positive, negative = (_words(path, side, content[side]) for side in _SIDES)
    if overlap := sorted(positive & negative):
        raise SteerError(f"lexicon {path}: {listed(overlap)} in both lists; give each word once")
    return by_words(positive, negative)


def _words(path: Path, side: str, entries: Any) -> frozenset[str]:
    if not isinstance(entries, list) or not entries:
        raise SteerError(f"lexicon {path}: {side} is {shown(entries)}; expected a list of words")
    for word in entries:
        if not isinstance(word, str) or not _WORD.fullmatch(word):
            # YAML reads an unquoted no or yes as a boolean.
            raise SteerError(
                f"lexicon {path}: {side} has {shown(word)}; expected a single word, in quotes "
                "where YAML reads it as something else"
            )
    return frozenset(word.lower() for word in entries)


def _in_language(text: str, code: str) -> float | None:
    language = embedded.language(text)
    return None if language is None else float(language == code)
