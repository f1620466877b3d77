"""``vllm-steer evidence``: the spans of a text that a steer makes more or less likely."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.errors import SteerError
from vllm_steer.tables import Column, StyledText, Table

if TYPE_CHECKING:
    from vllm_steer.inspection import Evidence, TextSpan
    from vllm_steer.texts import LabelledText

_FOR, _AGAINST = "bold green", "bold red"
_DEFAULT_LABEL = "label"


def evidence(
    steer: Annotated[
        Path, typer.Argument(metavar="STEER", help="Steer file in any supported format.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or 'embedded'.")],
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Texts to read: .jsonl, .json, .csv, .tsv or .txt.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[
        str | None, typer.Option(help="Name of the label in a row (default: label).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label map: sst2, sst5, ..., or good=1,bad=-1.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="The text is scored at plus and minus this strength.")
    ] = 1.0,
    spans: Annotated[int, typer.Option(min=1, help="Maximum number of spans per sign.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Maximum tokens of a span.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show how much likelier a text is at +STRENGTH than at -STRENGTH, and by which spans.

    The sign classifies the text; if the file has labels, the accuracy is printed.
    """
    from vllm_steer.files import load_steer
    from vllm_steer.inspection import text_evidence
    from vllm_steer.models import load_language_model

    texts, text_labels = _texts(text, file, text_field, label_field, labels)
    loaded, language_model = load_steer(steer), load_language_model(model)
    results = []
    with progress("reading", len(texts)) as advance:
        for passage in texts:
            results.append(
                text_evidence(
                    language_model, loaded, passage, strength=strength, spans=spans, longest=longest
                )
            )
            advance(len(results))
    accuracy = _accuracy(results, text_labels)
    if as_json:
        summary = {"steer": str(steer), "model": model, "strength": strength, "accuracy": accuracy}
        say_json({**summary, "texts": [_plain(result) for result in results]})
        return
    console = Console()
    for result in results:
        _show(console, result)
    if accuracy is not None:
        console.print(
            f"{accuracy:.1%} of {sum(map(bool, text_labels))} labels agree with the sign of the "
            "evidence"
        )


def _texts(
    text: str | None,
    file: Path | None,
    text_field: str,
    label_field: str | None,
    labels: str | None,
) -> tuple[Sequence[str], Sequence[float]]:
    """The texts, and their labels if the file has any."""
    from vllm_steer.texts import read_labelled, read_rows, read_texts

    if (text is None) == (file is None):
        raise SteerError("give the text to read: either --text or --file")
    if file is None:
        if label_field or labels:
            raise SteerError("--label-field and --labels are for the rows of a --file")
        if any("\ud800" <= letter <= "\udfff" for letter in str(text)):
            raise SteerError("--text has bytes that are not UTF-8")
        return [str(text)], []
    first = next(iter(read_rows(file)), None)
    has_labels = first is not None and _DEFAULT_LABEL in first.values
    if not (label_field or labels or has_labels):
        return read_texts(file, text_field=text_field), []
    rows: list[LabelledText] = read_labelled(
        file, text_field=text_field, label_field=label_field or _DEFAULT_LABEL, labels=labels
    )
    return [row.text for row in rows], [row.label for row in rows]


def _accuracy(results: "Sequence[Evidence]", text_labels: Sequence[float]) -> float | None:
    """The share of nonzero labels whose sign is that of the evidence; None without such labels."""
    labelled = [
        (result, label) for result, label in zip(results, text_labels, strict=False) if label
    ]
    if not labelled:
        return None
    return sum(result.label * label > 0 for result, label in labelled) / len(labelled)


def _plain(result: "Evidence") -> dict[str, Any]:
    return {**asdict(result), "total": result.total, "label": result.label}


def _show(console: Console, result: "Evidence") -> None:
    console.print(_marked(console, result))
    per_token = result.total / len(result.tokens)
    console.print(
        f"evidence {result.total:+.3f} nats, {per_token:+.4f} a token: label {result.label:+d}"
    )
    rows = [
        (span.evidence, f"{span.begin}-{span.end}", StyledText(span.text, style))
        for span, style in _spans(result)
    ]
    columns = (Column("evidence", "+.3f"), Column("characters", ""), Column("span"))
    console.print(Table("", columns, rows))


def _spans(result: "Evidence") -> "Iterator[tuple[TextSpan, str]]":
    """The spans with their styles, those for the steer first."""
    for style, spans in ((_FOR, result.spans_for), (_AGAINST, result.spans_against)):
        for span in spans:
            yield span, style


def _marked(console: Console, result: "Evidence") -> Text:
    """The whole text with its spans highlighted."""
    marked, position = Text(), 0
    for span, style in sorted(_spans(result), key=lambda pair: pair[0].begin):
        begin = max(position, span.begin)
        marked.append_text(console.text(result.text[position:begin], longest=None))
        marked.append_text(console.text(result.text[begin : span.end], style, longest=None))
        position = max(position, span.end)
    return marked.append_text(console.text(result.text[position:], longest=None))
