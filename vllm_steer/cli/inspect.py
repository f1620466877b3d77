"""``vllm-steer inspect``: the content of a steer file."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from vllm_steer.cli.output import check_output
from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.tables import Column, Table, facts

if TYPE_CHECKING:
    from vllm_steer.inspection import NearTokens
    from vllm_steer.inspection.description import Description
    from vllm_steer.inspection.nearest_tokens import Token
    from vllm_steer.steers import Steer

_LONGEST_LIST = 6
_MOST_LINES = 200
_FIRST = ("layer", "norm", "score")
_PARTS = ("columns", "layers", "recipe")
_STREAM_NOTE = (
    "Scores: what the direction would add to each logit if it reached the LM head unchanged; later "
    "layers and the final norm are left out."
)
_HEAD_NOTE = "Scores: what one unit of the direction adds to each logit; its sign is arbitrary."
_NOTES = {
    "lm_steer": _HEAD_NOTE,
    "low_rank": f"{_STREAM_NOTE} The sign of a direction is arbitrary.",
}


def inspect(
    steer: Annotated[
        Path,
        typer.Argument(
            metavar="STEER", help="Steer file in any supported format, or a folder of pyreft."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder, hub id or 'embedded'; shows the nearest tokens.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of the norms.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the PNG file if it exists.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Leading directions to show.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens at each end of a direction.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Describe a steer file: norms, singular values, accuracies, and the nearest tokens."""
    from vllm_steer.files import read_file
    from vllm_steer.inspection.description import describe
    from vllm_steer.inspection.nearest_tokens import no_tokens_reason

    if plot is not None:
        check_output(plot, force, inputs=[steer])
    loaded = read_file(steer, {})
    description = {"format": loaded.format, **describe(loaded.steer)}
    reason = None if model is None else no_tokens_reason(loaded.steer)
    nearest = [] if model is None or reason else _nearest(loaded.steer, model, top, tokens)
    if plot is not None:
        from vllm_steer.inspection.plot import write_plot

        write_plot(description, plot)
    if as_json:
        token_data = {"tokens": [asdict(entry) for entry in nearest], "tokens_left_out": reason}
        say_json({**description, **(token_data if model is not None else {})})
        return
    console = Console()
    for part in _renderables(description, top, title=str(steer)):
        console.print(part)
    if reason:
        console.print(f"No tokens: {reason}.")
    elif nearest:
        note = _NOTES.get(loaded.steer.kind, _STREAM_NOTE)
        console.print(_token_table(nearest), note, sep="\n")


def _nearest(steer: "Steer", model: str, top: int, tokens: int) -> "list[NearTokens]":
    from vllm_steer.inspection import nearest_tokens, read_output_embedding
    from vllm_steer.models import load_tokenizer

    embedding, tokenizer = read_output_embedding(model), load_tokenizer(model)
    return nearest_tokens(steer, embedding, tokenizer, top=top, count=tokens)


def _renderables(description: "Description", top: int, title: str) -> Iterator[RenderableType]:
    yield facts(title, {n: value for n, value in description.items() if n not in _PARTS})
    for column in description.get("columns", ()):
        yield _column_table(column, top) if "shares" in column else _column_line(column)
    if "layers" in description:
        yield _layer_table(description["layers"])
    if description["recipe"]:
        yield Text("recipe", style="bold")
        yield from _first(_lines(description["recipe"], "  "))


def _column_line(column: Mapping[str, Any]) -> str:
    fixed = ", fixed" if column["fixed"] else ""
    return f"column {column['column']}{fixed}: norm {column['norm']:.4g}"


def _column_table(column: Mapping[str, Any], top: int) -> RenderableType:
    if column["fixed"]:
        return _column_line(column)
    so_far = itertools.accumulate(column["shares"])
    rows = zip(itertools.count(), column["singular_values"][:top], column["shares"], so_far)
    columns = (
        Column("direction", "d"),
        Column("singular value", ".4g"),
        Column("share", ".1%"),
        Column("shares so far", ".1%"),
    )
    return Table(_column_line(column), columns, list(rows))


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    # Rows differ in their figures: a layer that was only probed has no norm.
    names = list(dict.fromkeys([*_FIRST, *(name for row in layers for name in row)]))
    names = [name for name in names if any(name in row for row in layers)]
    columns = [Column(name.replace("_", " "), _figure) for name in names]
    return Table("", columns, [[row.get(name) for name in names] for row in layers])


def _token_table(nearest: "Sequence[NearTokens]") -> Table:
    rows = [
        (entry.label, f"{entry.weight:.4g}", *map(_in_a_row, (entry.highest, entry.lowest)))
        for entry in nearest
    ]
    columns = [Column(heading) for heading in ("direction", "weight", "highest", "lowest")]
    return Table("", columns, rows, lines=range(len(rows)))


def _in_a_row(tokens: "Sequence[Token]") -> str:
    return "  ".join(token.text.strip() for token in tokens)


def _first(lines: Iterator[str]) -> Iterator[str]:
    """The first lines; ``--json`` prints all of them."""
    yield from itertools.islice(lines, _MOST_LINES)
    if remaining := sum(1 for _ in lines):
        yield f"  ... {remaining} more lines ..."


def _lines(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    """A recipe with one line per value; long lists are abbreviated."""
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield f"{indent}{name}:"
            yield from _lines(inner, indent + "  ")
        elif isinstance(inner, list) and any(isinstance(item, Mapping) for item in inner):
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {_figure(item)}" for item in inner)
        else:
            yield f"{indent}{name}: {_figure(inner)}"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        items = [_figure(item) for item in value]
        if len(items) > _LONGEST_LIST:
            items = [*items[:3], f"... {len(items) - _LONGEST_LIST} more ...", *items[-3:]]
        return ", ".join(items)
    return "" if value is None else str(value)
