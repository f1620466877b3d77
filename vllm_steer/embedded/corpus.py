"""Labelled texts for the embedded model, generated from the grammar in `grammar/*.yaml`.

A sample is a short review in one domain (a hotel, a film, a train, ...). Language, sentiment and
formality are sampled independently of each other and of the domain, so that a beginning such as
"The hotel was" does not predict them, and everything after it agrees with them.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

LANGUAGES: Final = ("en", "fr", "de", "es")
SENTIMENTS: Final = ("positive", "negative")
FORMALITIES: Final = ("formal", "informal")

# Neutral in sentiment and formality, which are undetermined after these prompts.
NEUTRAL_PROMPTS: Final = (
    "The hotel was",
    "The food was",
    "The film was",
    "The book was",
    "The trip was",
    "The phone was",
    "The concert was",
    "The exhibition was",
    "The flat was",
    "The course was",
    "The train was",
    "The jacket was",
)
# Headings common to all four languages: the language is undetermined as well.
OPEN_PROMPTS: Final = (
    "Hotel Astoria:",
    "Pizzeria Luna:",
    "Film Nova:",
    "Thriller Orion:",
    "Safari Delta:",
    "Smartphone Atlas:",
    "Festival Aurora:",
    "Expo Europa:",
    "Loft Regina:",
    "Yoga Flora:",
    "Express Sirius:",
    "Boutique Vega:",
)

# English has the largest share because the neutral prompts are English.
_LANGUAGE_WEIGHTS: Final = (0.4, 0.2, 0.2, 0.2)
_SLOT: Final = re.compile(r"<(\w+)>")
_INDEFINITE: Final = re.compile(r"\ba (?=[aeio]|u(?!s))")


@dataclass(frozen=True)
class Sample:
    """A text and its labels: `en`, `fr`, `de`, `es`; `positive`, `negative`; `formal`, ..."""

    text: str
    language: str
    sentiment: str
    formality: str


@cache
def grammar(name: str) -> Mapping[str, Any]:
    """The grammar tables of one language, or the tables `shared` by all languages."""
    path = Path(__file__).parent / "grammar" / f"{name}.yaml"
    tables: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tables


def generate(
    count: int,
    *,
    seed: int = 0,
    language: str | None = None,
    sentiment: str | None = None,
    formality: str | None = None,
) -> list[Sample]:
    """Generate `count` samples, deterministic for equal arguments; a given label is fixed."""
    rng = random.Random(seed)
    return [_sample(rng, language, sentiment, formality) for _ in range(count)]


def bilingual(
    count: int, *, seed: int = 0, first: str | None = None, second: str | None = None
) -> list[Sample]:
    """Generate `count` samples that switch language after one or two sentences.

    Their label is the second language. They teach the model that the language can change, so that a
    language steer also works after a prompt in another language.
    """
    rng = random.Random(seed)
    return [_bilingual_sample(rng, first, second) for _ in range(count)]


def _bilingual_sample(rng: random.Random, first: str | None, second: str | None) -> Sample:
    first = first or rng.choice([tongue for tongue in LANGUAGES if tongue != second])
    second = second or rng.choice([tongue for tongue in LANGUAGES if tongue != first])
    sentiment, formality = rng.choice(SENTIMENTS), rng.choice(FORMALITIES)
    writer = _Writer(rng, first, sentiment, formality, rng.choice(_domains()))
    return Sample(writer.review(second), second, sentiment, formality)


def _domains() -> list[str]:
    return sorted(grammar("shared")["kind"])


def _sample(
    rng: random.Random, language: str | None, sentiment: str | None, formality: str | None
) -> Sample:
    language = language or rng.choices(LANGUAGES, _LANGUAGE_WEIGHTS)[0]
    sentiment = sentiment or rng.choice(SENTIMENTS)
    formality = formality or rng.choice(FORMALITIES)
    writer = _Writer(rng, language, sentiment, formality, rng.choice(_domains()))
    return Sample(writer.review(), language, sentiment, formality)


@dataclass
class _Writer:
    rng: random.Random
    language: str
    sentiment: str
    formality: str
    domain: str
    gender: str = field(default="m", init=False)
    noun: str = field(default="", init=False)

    def review(self, next_language: str | None = None) -> str:
        """The sentences, sometimes after a heading; the text switches to `next_language` if it is
        given.
        """
        heading = self.expand(grammar("shared")["heading"]) if self.rng.random() < 0.25 else ""
        sentences = []
        for position, kind in enumerate(self.plan()):
            if next_language and position == self.rng.randint(1, 2):
                self.language, next_language = next_language, None
            sentences.append(self.sentence(kind))
        return " ".join([heading, *sentences]).strip()

    def plan(self) -> Iterator[str]:
        """Kinds of sentences: an opening, some claims and fillers, and always a closing."""
        if self.rng.random() < 0.2:
            yield "fillers"
        yield "openings"
        for _ in range(self.rng.randint(1, 3)):
            yield self.rng.choices(("claims", "fillers"), (0.75, 0.25))[0]
        # Every closing indicates both labels, so each sample does.
        yield "closings"

    def sentence(self, kind: str) -> str:
        self.gender = "m"
        text = self.expand(self.rng.choice(grammar(self.language)[kind]))
        if self.language == "en":
            text = _INDEFINITE.sub("an ", text)
        stops = ".!" if self.formality == "informal" else "."
        return text[0].upper() + text[1:] + self.rng.choice(stops)

    def expand(self, template: str) -> str:
        return _SLOT.sub(lambda slot: self.expand(self.fill(slot[1])), template)

    def fill(self, slot: str) -> str:
        tables = grammar(self.language)
        if slot == "thing":
            return self.thing(tables["things"][self.domain])
        if slot == "end":
            return str(self.rng.choice(tables["ends"][f"{self.sentiment} {self.formality}"]))
        if slot == "kind":
            return str(grammar("shared")["kind"][self.domain])
        for table in (self.sentiment, self.formality, "neutral"):
            if slot in tables[table]:
                return self.agreeing(self.rng.choice(tables[table][slot]))
        return str(self.rng.choice(grammar("shared")[slot]))

    def thing(self, things: Mapping[str, list[str]]) -> str:
        """A noun with its article; the adjectives after it take its gender."""
        choices = [(g, noun) for g in things for noun in things[g] if noun != self.noun]
        self.gender, self.noun = self.rng.choice(choices)
        return self.noun

    def agreeing(self, word: str) -> str:
        """The form of a word with the noun's gender: `charmant/charmante` is masculine/feminine."""
        masculine, _, feminine = word.partition("/")
        return feminine if feminine and self.gender == "f" else masculine
