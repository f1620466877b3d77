"""The tables of ``lm_steer.py``."""

from typing import Final

from benchmarks.real_model.sentiment_table import (
    SHOWN_WORDS,
    Line,
    at,
    cost_table,
    diversity,
    document,
    effect_table,
    lines_of,
    perplexity,
    pnes_table,
    share,
)
from benchmarks.table import grid

PAPER: Final = {"neutral to positive": (5.0, 41.2), "neutral to negative": (-5.0, 57.74)}
"""Strength and perplexity of sentiment control with GPT-2 large (Han et al., 2024)."""


def lm_steer_tables(data: Line) -> str:
    """The tables of a result as Markdown."""
    return document(
        data,
        (
            ("Positive texts in percent, ± standard error:", _effect),
            ("Perplexity by the unsteered model, and distinct n-grams:", _cost),
            ("Effect normalised by perplexity:", _pnes),
            ("Beside the paper (GPT-2 large, judged by GPT-2 XL):", _paper),
            ("Ranks; positive texts in percent:", _ranks),
            ("Tokens of the leading directions (signs are arbitrary):", _words),
            ("Evidence in held-out sentences (label, nats, span):", _evidence),
            ("With a French delta at once, in percent:", _french),
            ("Transferred; positive texts in percent:", _transfer),
            ("Transferred, perplexity by the target itself unsteered:", _transfer_cost),
        ),
    )


def _effect(data: Line) -> list[str]:
    lines = lines_of(data, "strengths")
    return effect_table(lines) if lines else []


def _cost(data: Line) -> list[str]:
    lines = lines_of(data, "strengths")
    return cost_table(lines) if lines else []


def _pnes(data: Line) -> list[str]:
    return pnes_table({f"rank {data['rank']}": data["pnes"]}, "steer") if "pnes" in data else []


def _paper(data: Line) -> list[str]:
    lines = lines_of(data, "strengths")
    if not lines:
        return []
    rows = [
        _beside(name, f"{published:g}", at(lines, "steer", strength))
        for name, (strength, published) in PAPER.items()
    ]
    rows.append(_beside("unsteered", "-", at(lines, "none", 0.0)))
    return grid(["control", "paper, perplexity", "here", "here, dist-1 / 2 / 3"], rows)


def _beside(name: str, published: str, line: Line | None) -> list[str]:
    return [name, published, perplexity(line), "-" if line is None else diversity(line)]


def _ranks(data: Line) -> list[str]:
    ends = [line for line in lines_of(data, "strengths") if abs(line["strength"]) == 5]
    lines = [line for line in [*ends, *lines_of(data, "ranks")] if line["steer"] != "none"]
    lines.sort(key=lambda line: (line["rank"], line["strength"], line["steer"] != "steer"))
    heads = ["rank", "strength", "steer", "VADER", "classifier", "perplexity"]
    return grid(heads, [_rank(line) for line in lines]) if lines else []


def _rank(line: Line) -> list[str]:
    shares = [share(line, judge) for judge in ("vader", "classifier")]
    facts = [str(line["rank"]), f"{line['strength']:g}", line["steer"]]
    return [*facts, *shares, perplexity(line)]


def _words(data: Line) -> list[str]:
    rows = [
        [str(number), _listed(near["highest"]), _listed(near["lowest"])]
        for number, near in enumerate(data.get("words", ()), 1)
    ]
    return grid(["direction", "one end", "other end"], rows) if rows else []


def _listed(words: list[str]) -> str:
    shown = [word.strip().replace("|", "\\|") for word in words[:SHOWN_WORDS]]
    return ", ".join(shown)


def _evidence(data: Line) -> list[str]:
    if "evidence" not in data:
        return []
    rows = [
        [f"{found['label']:g}", f"{found['total']:+.2f}", found["span"].replace("|", "\\|")]
        for found in data["evidence"]
    ]
    effect = data["effect"]
    note = (
        f"Of {effect['texts']:.0f} held-out sentences {100 * effect['accuracy']:.0f} % are on the "
        f"side of their label."
    )
    return [*grid(["label", "evidence", "strongest span"], rows), "", note]


def _french(data: Line) -> list[str]:
    heads = ["steers", "French", "good words", "bad words", "VADER positive", "perplexity"]
    rows = [
        [
            line["steers"],
            share(line, "language"),
            share(line, "french_words"),
            share(line, "french_words", "negative"),
            share(line, "vader"),
            perplexity(line),
        ]
        for line in lines_of(data, "french")
    ]
    return grid(heads, rows) if rows else []


def _transfer(data: Line) -> list[str]:
    lines = lines_of(data, "transfer")
    return effect_table(lines) if lines else []


def _transfer_cost(data: Line) -> list[str]:
    lines = lines_of(data, "transfer")
    return cost_table(lines) if lines else []
