"""An exact classifier of the corpus, and of text in its vocabulary, by counting indicative words.

A word indicates a label if the grammar uses it with that label and nowhere else: in no table of the
other label, in no neutral table and in no other language. A corpus sample is therefore always
classified by the labels that it was generated with.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

from vllm_steer.embedded.corpus import LANGUAGES, grammar

_WORD: Final = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SLOT: Final = re.compile(r"<\w+>")


def sentiment(text: str) -> float:
    """1.0 if positive words outnumber negative ones, 0.0 if the reverse, 0.5 if equal."""
    return _majority(text, "positive", "negative")


def formality(text: str) -> float:
    """1.0 if formal words outnumber informal ones, 0.0 if the reverse, 0.5 if equal."""
    return _majority(text, "formal", "informal")


def language(text: str) -> str | None:
    """`en`, `fr`, `de` or `es`, by the number of words unique to it; None for a tie or no word."""
    counts = Counter(tongue for word in words(text) if (tongue := _languages().get(word)))
    ranked = counts.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def positive_share(texts: Sequence[str]) -> float:
    """Mean `sentiment` of the texts: a text without indicative words counts as 0.5."""
    return sum(map(sentiment, texts)) / len(texts)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams / all n-grams of lower-case words, over all texts; 0.0 without n-grams.

    N-grams do not cross texts; punctuation is not a word.
    """
    grams = [gram for text in texts for gram in _n_grams(_WORD.findall(text.lower()), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def known_share(texts: Iterable[str]) -> float:
    """Share of the words, without each text's last one, that the grammar has; 1.0 without words.

    A text that is steered too strongly degenerates into words that do not exist.
    """
    all_words = [word for text in texts for word in words(text)[:-1]]
    return sum(word in _known() for word in all_words) / len(all_words) if all_words else 1.0


def words(text: str) -> list[str]:
    """The lower-case words, without a truncated last one (a prefix of a longer word)."""
    matches = [match[0] for match in _WORD.finditer(text.lower())]
    if matches and text.lower().endswith(matches[-1]) and matches[-1] in _beginnings():
        matches.pop()
    return matches


def telling_words(label: str) -> frozenset[str]:
    """The words that indicate `positive`, `negative`, `formal` or `informal`, in all languages."""
    pair = ("positive", "negative") if label in ("positive", "negative") else _REGISTERS
    return frozenset(_vocabulary(label, pair))


_REGISTERS: Final = ("formal", "informal")


def sentiment_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the words in a text that indicate its sentiment."""
    telling = _telling()["positive"] | _telling()["negative"]
    matches = _WORD.finditer(text.lower())
    return [word.span() for word in matches if word.group() in telling]


def _majority(text: str, upper: str, lower: str) -> float:
    counts = Counter(words(text))
    balance = _hits(counts, upper) - _hits(counts, lower)
    return 0.5 if balance == 0 else float(balance > 0)


def _hits(counts: Mapping[str, int], label: str) -> int:
    return sum(count for word, count in counts.items() if word in _telling()[label])


@cache
def _telling() -> Mapping[str, frozenset[str]]:
    return {label: telling_words(label) for label in ("positive", "negative", "formal", "informal")}


def _vocabulary(label: str, pair: tuple[str, str]) -> set[str]:
    """Words in the label's tables, without those in any other table of any language."""
    inside: set[str] = set()
    outside: set[str] = set()
    for path, word in _all_words():
        labels = {part for key in path for part in key.split()} & set(pair)
        (inside if labels == {label} else outside).add(word)
    return inside - outside


@cache
def _languages() -> Mapping[str, str]:
    """The language of each word that only one language has."""
    owners: dict[str, set[str]] = {}
    for path, word in _all_words():
        owners.setdefault(word, set()).add(path[0])
    return {word: min(tongues) for word, tongues in owners.items() if len(tongues) == 1}


@cache
def _known() -> frozenset[str]:
    return frozenset(word for _, word in _all_words())


@cache
def _beginnings() -> frozenset[str]:
    return frozenset(word[:end] for word in _known() for end in range(1, len(word)))


@cache
def _all_words() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Every word of the grammar with its path of keys, the language first."""
    names = (*LANGUAGES, "shared")
    return tuple(
        (path, word)
        for name in names
        for path, phrase in _phrases(grammar(name), (name,))
        for word in _WORD.findall(_SLOT.sub(" ", phrase).lower())
    )


def _phrases(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, str):
        yield path, node
        return
    for key, child in node.items() if isinstance(node, Mapping) else (("", item) for item in node):
        yield from _phrases(child, (*path, key) if key else path)


def _n_grams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)
