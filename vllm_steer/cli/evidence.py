"""``vllm-steer evidence``: the parts of a text that a steer makes likelier or less likely."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.errors import SteerError
from vllm_steer.files import load_steer
from vllm_steer.inspection import Evidence, TextSpan, text_evidence
from vllm_steer.models import load_language_model
from vllm_steer.tables import Column, StyledText, Table
from vllm_steer.texts import LabelledText, read_labelled, read_rows, read_texts

_FOR, _AGAINST = "bold green", "bold red"
_DEFAULT_LABEL = "label"


def evidence(
    steer: Annotated[Path, typer.Argument(metavar="STEER", help="Steer file of any known tool.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or 'embedded'.")],
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Texts to read: .jsonl, .json, .csv, .tsv or .txt.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[
        str | None, typer.Option(help="Name of the label in a row, by itself 'label'.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label map: sst2, sst5, ..., or good=1,bad=-1.")
    ] = None,
    strength: Annotated[float, typer.Option(help="The text is read at + and - this.")] = 1.0,
    spans: Annotated[int, typer.Option(min=1, help="Most spans on either side.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of a span.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say how much likelier a text is at +STRENGTH than at -STRENGTH, and which parts make it so.

    The sign labels the text; where a file has labels, the share of right ones is printed.
    """
    texts, known = _texts(text, file, text_field, label_field, labels)
    loaded, language_model = load_steer(steer), load_language_model(model)
    found = []
    with progress("reading", len(texts)) as advance:
        for given in texts:
            found.append(
                text_evidence(
                    language_model, loaded, given, strength=strength, spans=spans, longest=longest
                )
            )
            advance(len(found))
    accuracy = _accuracy(found, known)
    if as_json:
        said = {"steer": str(steer), "model": model, "strength": strength, "accuracy": accuracy}
        say_json({**said, "texts": [_plain(one) for one in found]})
        return
    console = Console()
    for one in found:
        _show(console, one)
    if accuracy is not None:
        console.print(f"{accuracy:.1%} of {sum(map(bool, known))} labels are the evidence's sign")


def _texts(
    text: str | None,
    file: Path | None,
    text_field: str,
    label_field: str | None,
    labels: str | None,
) -> tuple[Sequence[str], Sequence[float]]:
    """The texts, and their labels where the file has some."""
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


def _accuracy(found: Sequence[Evidence], known: Sequence[float]) -> float | None:
    """The share of labels of the evidence's sign; a label of 0 is on no side."""
    sided = [(one, label) for one, label in zip(found, known, strict=False) if label]
    if not sided:
        return None
    return sum(one.label * label > 0 for one, label in sided) / len(sided)


def _plain(one: Evidence) -> dict[str, Any]:
    return {**asdict(one), "total": one.total, "label": one.label}


def _show(console: Console, one: Evidence) -> None:
    console.print(_marked(console, one))
    per_token = one.total / len(one.tokens)
    console.print(f"evidence {one.total:+.3f} nats, {per_token:+.4f} a token: label {one.label:+d}")
    rows = [
        (span.evidence, f"{span.begin}-{span.end}", StyledText(span.text, style))
        for span, style in _spans(one)
    ]
    columns = (Column("evidence", "+.3f"), Column("characters", ""), Column("span"))
    console.print(Table("", columns, rows))


def _spans(one: Evidence) -> Iterator[tuple[TextSpan, str]]:
    """The spans, each with its style: those for the steer first."""
    for style, spans in ((_FOR, one.spans_for), (_AGAINST, one.spans_against)):
        for span in spans:
            yield span, style


def _marked(console: Console, one: Evidence) -> Text:
    """The whole text with its spans in their styles."""
    marked, done = Text(), 0
    for span, style in sorted(_spans(one), key=lambda pair: pair[0].begin):
        begin = max(done, span.begin)
        marked.append_text(console.text(one.text[done:begin], longest=None))
        marked.append_text(console.text(one.text[begin : span.end], style, longest=None))
        done = max(done, span.end)
    return marked.append_text(console.text(one.text[done:], longest=None))
