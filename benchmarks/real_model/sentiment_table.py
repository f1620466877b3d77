"""Cells and tables that both experiments on sentiment share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from benchmarks.table import grid, origin, title

Line = dict[str, Any]
SHOWN_WORDS: Final = 6


def lines_of(data: Line, part: str) -> list[Line]:
    """The rows of a part."""
    return [line for line in data["rows"] if line["part"] == part]


def share(line: Line | None, judge: str, key: str = "positive") -> str:
    """A share and its error in percent, such as ``42 ± 3``; a dash without a line."""
    if line is None:
        return "-"
    figures = line[judge]
    return f"{100 * figures[key]:.0f} ± {100 * figures[f'{key}_error']:.0f}"


def perplexity(line: Line | None) -> str:
    """The authors' mean perplexity and its error."""
    if line is None:
        return "-"
    figures = line["perplexity"]
    return f"{figures['perplexity']:.0f} ± {figures['perplexity_error']:.0f}"


def diversity(line: Line) -> str:
    """dist-1, dist-2 and dist-3."""
    return " / ".join(f"{line['diversity'][f'dist-{n}']:.2f}" for n in (1, 2, 3))


def at(lines: Iterable[Line], steer: str, strength: float) -> Line | None:
    """The line of a condition; that of the unsteered model at strength 0, for any steer."""
    name = "none" if strength == 0 else steer
    found = (line for line in lines if line["steer"] == name and line["strength"] == strength)
    return next(found, None)


def strengths_of(lines: Iterable[Line]) -> list[float]:
    """All strengths, ascending."""
    return sorted({line["strength"] for line in lines})


def effect_table(lines: Sequence[Line], heading: str = "strength") -> list[str]:
    """Positive texts in percent by both judges, of the steer and the random steer."""
    heads = [heading, "VADER", "VADER, random", "classifier", "classifier, random"]
    return grid(heads, [_effect(lines, strength) for strength in strengths_of(lines)])


def _effect(lines: Sequence[Line], strength: float) -> list[str]:
    pairs = [at(lines, steer, strength) for steer in ("steer", "random")]
    judges = ("vader", "classifier")
    return [f"{strength:g}", *(share(line, judge) for judge in judges for line in pairs)]


def cost_table(lines: Sequence[Line], heading: str = "strength") -> list[str]:
    """Perplexity of the steer and the random steer, and the steer's diversity."""
    heads = [heading, "perplexity", "perplexity, random", "dist-1 / 2 / 3"]
    rows = []
    for strength in strengths_of(lines):
        steer, random = at(lines, "steer", strength), at(lines, "random", strength)
        spread = "-" if steer is None else diversity(steer)
        rows.append([f"{strength:g}", perplexity(steer), perplexity(random), spread])
    return grid(heads, rows)


def pnes_table(pnes: Line, heading: str) -> list[str]:
    """PNES (and its r2) of steer and random steer by judge; ``pnes`` maps names to such figures."""
    heads = [heading, "judge", "PNES (r2)", "random"]
    rows = [
        [name, judge, _pnes(steers["steer"]), _pnes(steers["random"])]
        for name, judges in pnes.items()
        for judge, steers in judges.items()
    ]
    return grid(heads, rows)


def _pnes(found: Line | str) -> str:
    return "none" if isinstance(found, str) else f"{found['pnes']:.2f} ({found['r2']:.2f})"


def document(data: Line, sections: Iterable[tuple[str, Callable[[Line], list[str]]]]) -> str:
    """Title, tables under captions, time and command; a section without data is left out."""
    result = [f"**{data['model']}, {title(data)}**"]
    for caption, make in sections:
        table = make(data)
        if table:
            result += ["", caption, "", *table]
    seconds = sum(data.get("seconds", {}).values())
    sampling = data["sampling"]
    texts = f"{sampling['samples']} texts of {sampling['max_tokens']} tokens"
    setting = f"{data['prompts']} prompts, {texts} each; {seconds / 60:.0f} minutes."
    return "\n".join([*result, "", setting, "", origin(data)])
