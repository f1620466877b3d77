"""Diversity of texts: distinct n-grams as the LM-Steer authors count them, and repetition.

Sources: dist-n: Li et al., NAACL 2016 (arXiv 1510.03055), counted as in the evaluation of Han et
al., ACL 2024 (arXiv 2305.12798); rep-4: Welleck et al., ICLR 2020 (arXiv 1908.04319), seq-rep-n;
compression: Shaib et al., 2024 (arXiv 2403.00553).
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean

Words = Sequence[str]


@dataclass(frozen=True)
class DiversityJudge:
    """``dist-1``, ``dist-2``, ``dist-3``: means over the prompts of ``distinct``."""

    name: str
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """Each in [0, 1], higher is more varied; NaN where no prompt has a text."""
        return {
            f"dist-{n}": mean(distinct(answer.texts, n) for answer in answers) for n in (1, 2, 3)
        }


@dataclass(frozen=True)
class RepetitionJudge:
    """``rep-4`` within a text and ``compression`` of a prompt's texts, means over the prompts."""

    name: str
    effect: None = None

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """Higher is more repetitive; NaN where no text is long enough."""
        return {
            "rep-4": mean(mean(repeated(t, 4) for t in answer.texts) for answer in answers),
            "compression": mean(compression(answer.texts) for answer in answers),
        }


def distinct(texts: Sequence[str], n: int) -> float:
    """dist-n: distinct n-grams / words, over all texts of a prompt; NaN without texts.

    Words are separated by single spaces, so a leading space yields an empty word. The denominator
    is the number of words for every ``n``, as in the authors' code, so the value is below 1 for ``n
    > 1`` even without repetition. N-grams do not cross texts.
    """
    pool = [text.split(" ") for text in texts]
    total = sum(map(len, pool))
    return len({gram for words in pool for gram in _grams(words, n)}) / total if total else math.nan


def repeated(text: str, n: int) -> float:
    """rep-n: 1 - distinct n-grams / n-grams of a text; NaN for fewer than ``n`` words.

    Words are separated by white space; Welleck et al. count tokens.
    """
    grams = _grams(text.split(), n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def compression(texts: Sequence[str]) -> float:
    """Compression ratio: bytes of the texts, one per line, / bytes after zlib level 9; NaN if
    empty.

    The ratio grows with the number of texts: compare equal numbers of texts only.
    """
    pool = "\n".join(texts).encode()
    return len(pool) / len(zlib.compress(pool, 9)) if pool else math.nan


def _grams(words: Words, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))
