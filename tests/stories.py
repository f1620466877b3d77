"""Children's stories with a happy or a sad end, from templates: `python tests/stories.py FOLDER`.

Writes ``happy.txt`` and ``sad.txt`` (one story per line), ``prompts.txt`` (beginnings that both
share) and ``lexicon.yaml`` (the words that distinguish them, for a lexicon judge).
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

SIDES: Final = ("happy", "sad")
TELLING: Final = {
    "happy": "happy happily smiled smile laughed hugged hug fun love loved glad proud best "
    "wonderful enjoyed nice excited",
    "sad": "sad sadly cried cry tears lost alone hurt broken broke scared afraid angry never "
    "sorry lonely missed",
}
_WHO: Final = (
    ("girl", "Lily", "She"),
    ("boy", "Tim", "He"),
    ("girl", "Mia", "She"),
    ("boy", "Ben", "He"),
    ("girl", "Sue", "She"),
    ("boy", "Tom", "He"),
)
_THINGS: Final = ("ball", "toy car", "doll", "kite", "red hat", "book", "teddy bear", "cake")
_PLACES: Final = ("the park", "the garden", "the beach", "the woods", "the shop", "the farm")
_MIDDLES: Final = {
    "happy": (
        "{she} found a {thing} and smiled.",
        "{she} saw a friend and they had fun with the {thing}.",
        "{her} mom gave {them} a nice {thing} and a hug.",
        "{she} laughed and loved the {thing}.",
    ),
    "sad": (
        "{she} lost the {thing} and was scared.",
        "The {thing} broke and {she} was sad.",
        "A big dog took the {thing} and {she} cried.",
        "{she} fell down and hurt {her} knee.",
    ),
}
_ENDS: Final = {
    "happy": (
        "{name} was very happy and hugged {her} mom.",
        "They laughed and had so much fun all day.",
        "It was the best day and everyone smiled.",
        "{name} was proud and glad, and they all loved it.",
        "{she} smiled and said, I love you.",
    ),
    "sad": (
        "{name} was very sad and cried all day.",
        "{she} never saw the {thing} again and felt alone.",
        "There were tears, and {name} was lonely and sad.",
        "{name} was sorry, but it was broken and {she} cried.",
        "{she} sat alone and was sad and afraid.",
    ),
}
_BEGINNINGS: Final = (
    "Once upon a time, there was a little {child} named {name}.",
    "One day, a {child} named {name} went to {place}.",
)


def stories(side: str, count: int, *, seed: int = 0) -> list[str]:
    """``count`` distinct stories that end ``happy`` or ``sad``, deterministic for equal arguments.

    The two kinds differ only in their middles and ends; there are about ten thousand of each.
    """
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[_story(rng, side)] = None
    return list(texts)


def prompts() -> list[str]:
    """Beginnings that both kinds share."""
    pairs = itertools.product(_WHO[:3], _BEGINNINGS)
    return [
        _filled(beginning, person, _THINGS[0], _PLACES[0]) + f" {person[2]}"
        for person, beginning in pairs
    ]


def write(folder: Path, *, count: int = 300, seed: int = 0) -> None:
    """Write all files into a folder."""
    for side in SIDES:
        (folder / f"{side}.txt").write_text("\n".join(stories(side, count, seed=seed)) + "\n")
    (folder / "prompts.txt").write_text("\n".join(prompts()) + "\n")
    lists = {"positive": TELLING["happy"].split(), "negative": TELLING["sad"].split()}
    (folder / "lexicon.yaml").write_text(json.dumps(lists))  # JSON is YAML


def _story(rng: random.Random, side: str) -> str:
    person, thing, location = rng.choice(_WHO), rng.choice(_THINGS), rng.choice(_PLACES)
    parts: Sequence[str] = (
        rng.choice(_BEGINNINGS),
        rng.choice(("{she} went to {place} with a {thing}.", "{she} wanted a {thing}.")),
        *rng.sample(_MIDDLES[side], 2),
        *rng.sample(_ENDS[side], 2),
    )
    return " ".join(_filled(part, person, thing, location) for part in parts)


def _filled(template: str, person: tuple[str, str, str], thing: str, location: str) -> str:
    child, name, she = person
    her, them = ("her", "her") if she == "She" else ("his", "him")
    fields = {"child": child, "name": name, "her": her, "them": them}
    text = template.format(**fields, she=she.lower(), thing=thing, place=location)
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300, help="stories of each side")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write(arguments.folder, count=arguments.count)
