"""An exact classifier of the corpus and of text in its vocabulary: it counts telling words.

A word tells a label when the grammar uses it under that label and nowhere else: in no table of
the other label, in no neutral table, in no other language's. Nothing is learned and nothing is
guessed, so a corpus sample is always classified as it was generated.
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
    """1.0 where positive words outnumber negative ones, 0.0 the reverse, 0.5 for a tie or none."""
    return _majority(text, "positive", "negative")


def formality(text: str) -> float:
    """1.0 where formal words outnumber informal ones, 0.0 the reverse, 0.5 for a tie or none."""
    return _majority(text, "formal", "informal")


def language(text: str) -> str | None:
    """`en`, `fr`, `de` or `es` by the most words of that language alone; None for a tie or none."""
    counts = Counter(tongue for word in words(text) if (tongue := _languages().get(word)))
    ranked = counts.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def positive_share(texts: Sequence[str]) -> float:
    """The mean of `sentiment` over the texts: a text without evidence counts one half."""
    return sum(map(sentiment, texts)) / len(texts)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Unique n-grams / all n-grams of lower-case words, pooled over the texts; 0.0 for no n-gram.

    No n-gram crosses from one text into the next; punctuation is not a word.
    """
    grams = [gram for text in texts for gram in _n_grams(_WORD.findall(text.lower()), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def known_share(texts: Iterable[str]) -> float:
    """Words that the grammar has / all words but each text's last, pooled; 1.0 for no word.

    Text that a steer has pushed too hard falls apart into words that are none.
    """
    all_words = [word for text in texts for word in words(text)[:-1]]
    return sum(word in _known() for word in all_words) / len(all_words) if all_words else 1.0


def words(text: str) -> list[str]:
    """The lower-case words, less a last one cut short: the beginning of some longer word."""
    matches = [match[0] for match in _WORD.finditer(text.lower())]
    if matches and text.lower().endswith(matches[-1]) and matches[-1] in _beginnings():
        matches.pop()
    return matches


def telling_words(label: str) -> frozenset[str]:
    """The words that tell `positive`, `negative`, `formal` or `informal`, in all languages."""
    pair = ("positive", "negative") if label in ("positive", "negative") else _REGISTERS
    return frozenset(_vocabulary(label, pair))


_REGISTERS: Final = ("formal", "informal")


def sentiment_spans(text: str) -> list[tuple[int, int]]:
    """Where in a text, by characters, the words stand that tell its sentiment."""
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
    """Words under the label's tables, less those under any other table of any language."""
    inside: set[str] = set()
    outside: set[str] = set()
    for path, word in _all_words():
        labels = {part for key in path for part in key.split()} & set(pair)
        (inside if labels == {label} else outside).add(word)
    return inside - outside


@cache
def _languages() -> Mapping[str, str]:
    """Each word that only one language has, with that language."""
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
    """Every word of the grammar after the keys it stands under, the language first."""
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
