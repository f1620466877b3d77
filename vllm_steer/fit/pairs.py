"""Two sides of texts for a steering vector: contrastive pairs, or labelled texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_steer.errors import SteerError
from vllm_steer.fit.vector import Text
from vllm_steer.texts import LabelledText, Row, read_rows, take, text_of


class ContrastiveTexts(NamedTuple):
    """Positive and negative texts, or prompts with their answers."""

    positive: list[Text]
    negative: list[Text]


def read_pairs(path: str | Path) -> ContrastiveTexts:
    """The pairs of a file: rows of ``positive`` and ``negative``, perhaps after a ``prompt``.

    A prompt and what follows it are joined as they stand. Raises ``SteerError`` naming each bad
    row, and for a file without rows.
    """
    pairs = list(take(read_rows(path), _pair))
    if not pairs:
        raise SteerError(f"{path}: there are no rows")
    return ContrastiveTexts(
        [positive for positive, _ in pairs], [negative for _, negative in pairs]
    )


def sides_of(texts: Sequence[LabelledText]) -> ContrastiveTexts:
    """Labelled texts by the sign of their label; a label of 0 is on neither side."""
    return ContrastiveTexts(
        [text for text, label in texts if label > 0], [text for text, label in texts if label < 0]
    )


def _pair(row: Row) -> tuple[Text, Text]:
    positive, negative = text_of(row, "positive"), text_of(row, "negative")
    if row.values.get("prompt") in (None, ""):
        return positive, negative
    prompt = text_of(row, "prompt")
    return (prompt, positive), (prompt, negative)
