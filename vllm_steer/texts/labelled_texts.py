"""Labelled texts from files: one file with labels, or one file per label."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_steer.errors import SteerError
from vllm_steer.texts.labels import label_map
from vllm_steer.texts.rows import Row, read_rows, take, text_of


class LabelledText(NamedTuple):
    """A text and its label in [-1, 1]."""

    text: str
    label: float


def read_labelled(
    path: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "label",
    labels: str | None = None,
) -> list[LabelledText]:
    """Read the labelled texts of one file; ``labels`` is a label map, see ``label_map``.

    Raises ``SteerError`` with each invalid row, for a file without rows, and for labels that are
    all 0 or 1 without a label map: 0 is neutral, and whether it means the opposite of 1 is unknown.
    """
    number = label_map(labels)

    def read(row: Row) -> LabelledText:
        text = text_of(row, text_field)
        if label_field not in row.values:
            raise SteerError(
                f"{row.location}: the field {label_field!r} is missing; every row needs a label"
            )
        try:
            return LabelledText(text, number(row.values[label_field]))
        except SteerError as error:
            raise SteerError(f"{row.location}: {error}") from None

    texts = list(take(read_rows(path), read))
    if not texts:
        raise SteerError(f"{path}: the file has no rows")
    if labels is None and {label for _, label in texts} == {0.0, 1.0}:
        raise SteerError(
            f"{path}: the labels are 0 and 1, and the label 0 means neutral; give the label map "
            "0=-1,1=1 if 0 is the opposite of 1"
        )
    return texts


def read_two_sides(
    positive: str | Path, negative: str | Path, *, text_field: str = "text"
) -> list[LabelledText]:
    """Read the texts of two files: those of the first get label 1, those of the second -1."""
    return [
        LabelledText(text, label)
        for path, label in ((positive, 1.0), (negative, -1.0))
        for text in read_texts(path, text_field=text_field)
    ]


def read_texts(path: str | Path, *, text_field: str = "text") -> Sequence[str]:
    """Read the texts of one file. Raises ``SteerError`` for invalid rows and for a file without
    rows.
    """
    texts = list(take(read_rows(path), lambda row: text_of(row, text_field)))
    if not texts:
        raise SteerError(f"{path}: the file has no rows")
    return texts
