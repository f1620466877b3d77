"""Word lists as judges: a text has the label of most of its listed words."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_steer.config_text import read_config_file
from vllm_steer.embedded import lexicon as embedded
from vllm_steer.embedded.corpus import LANGUAGES
from vllm_steer.errors import SteerError, cause
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean_over_prompts
from vllm_steer.untrusted_text import listed, shown

Verdict = Callable[[str], float | None]
"""1.0 or 0.0 for a text; None where nothing tells."""

_WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SIDES: Final = ("positive", "negative")
EMBEDDED_NAMES: Final = ("sentiment", "formality", "language=en|fr|de|es")


@dataclass(frozen=True)
class LexiconJudge:
    """``share``: mean over the prompts of the continuations' verdicts, ``tie`` for those of none.

    ``undecided`` is the share of the texts that no word tells, or as many words on either side.
    """

    name: str
    verdict: Verdict
    tie: float = 0.5
    effect: str = "share"

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``share`` and ``undecided``; the prompts are not looked at."""
        found = {text: self.verdict(text) for answer in answers for text in answer.texts}

        def value(text: str) -> float:
            verdict = found[text]
            return self.tie if verdict is None else verdict

        return {
            "share": mean_over_prompts(answers, value),
            "undecided": mean_over_prompts(answers, lambda text: float(found[text] is None)),
        }

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """Each text's verdict; None where nothing tells, or as much on either side."""
        return [[self.verdict(text) for text in answer.texts] for answer in answers]


def by_words(positive: frozenset[str], negative: frozenset[str]) -> Verdict:
    """1.0 where positive words outnumber negative ones, 0.0 the reverse, None for a tie or none."""

    def verdict(text: str) -> float | None:
        found = Counter(_WORD.findall(text.lower()))
        balance = sum(n * ((word in positive) - (word in negative)) for word, n in found.items())
        return None if balance == 0 else float(balance > 0)

    return verdict


def embedded_judge(name: str, about: str) -> LexiconJudge:
    """A judge by the embedded corpus's own words: ``sentiment``, ``formality``, ``language=fr``.

    A text of no one language counts 0 for ``language``. Raises ``SteerError`` for another name.
    """
    kind, _, code = about.partition("=")
    if about in ("sentiment", "formality"):
        of: Callable[[str], float] = getattr(embedded, about)
        return LexiconJudge(name, lambda text: None if of(text) == 0.5 else of(text))
    if kind == "language" and code in LANGUAGES:
        return LexiconJudge(name, lambda text: _in_language(text, code), tie=0.0)
    known = ", ".join(EMBEDDED_NAMES)
    raise SteerError(f"embedded lexicon {about!r} is unknown; there are {known}")


def read_lexicon(path: str | Path) -> Verdict:
    """The verdict of a YAML or JSON file ``{positive: [words], negative: [words]}``.

    Words are compared in lower case and whole. Raises ``SteerError`` for a file that cannot be
    read or is another shape, a word that is no single word, and a word on both sides.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise SteerError(f"lexicon {path}: expected a .yaml, .yml or .json file")
    if not os.path.isfile(path):
        found = "is no file" if os.path.lexists(path) else "no such file"
        raise SteerError(f"lexicon {path}: {found}")
    try:
        content = read_config_file(path, f"lexicon {path}")
    except OSError as error:
        raise SteerError(f"lexicon {path}: cannot be read ({cause(error)})") from error
    if not isinstance(content, Mapping) or set(content) != set(_SIDES):
        raise SteerError(f"lexicon {path}: expected two lists, named positive and negative")
    positive, negative = (_words(path, side, content[side]) for side in _SIDES)
    if both := sorted(positive & negative):
        raise SteerError(f"lexicon {path}: {listed(both)} on both sides; a word tells one")
    return by_words(positive, negative)


def _words(path: Path, side: str, found: Any) -> frozenset[str]:
    if not isinstance(found, list) or not found:
        raise SteerError(f"lexicon {path}: {side} is {shown(found)}; expected a list of words")
    for word in found:
        if not isinstance(word, str) or not _WORD.fullmatch(word):
            # YAML reads an unquoted no or yes as a truth value.
            raise SteerError(
                f"lexicon {path}: {side} has {shown(word)}; expected a single word, in quotes "
                "where YAML reads it as something else"
            )
    return frozenset(word.lower() for word in found)


def _in_language(text: str, code: str) -> float | None:
    found = embedded.language(text)
    return None if found is None else float(found == code)
