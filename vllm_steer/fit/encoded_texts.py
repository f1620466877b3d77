"""Token ids and targets of texts, in batches for a language model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_steer.errors import SteerError

_ENCODED_AT_ONCE = 1_000


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of each text; ``end`` is what stands behind a text where padding is asked for."""

    rows: Sequence[torch.Tensor]  # of each text [tokens], int32
    end: int

    def inputs(self, row: int, count: int) -> torch.Tensor:
        """The first ``count`` tokens that are read of a text, int64."""
        return self._cut(row, 0, count)

    def targets(self, row: int, count: int) -> torch.Tensor:
        """The token that follows each of the ``inputs``, int64."""
        return self._cut(row, 1, count)

    def _cut(self, row: int, start: int, count: int) -> torch.Tensor:
        tokens = self.rows[row][start : start + count].long()
        return torch.nn.functional.pad(tokens, (0, count - len(tokens)), value=self.end)


@dataclass(frozen=True)
class TextBatch:
    """The texts of one step by their number, and how many positions of each are trained on."""

    rows: tuple[int, ...]
    counts: tuple[int, ...]


def encode_texts(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> EncodedTexts:
    """Each text's tokens with the tokenizer's special ones, at most ``max_length``.

    Raises ``SteerError`` for a tokenizer without an end-of-text and a padding token.
    """
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    end = next((token for token in ends if token is not None), None)
    if end is None:
        raise SteerError("the tokenizer has no end-of-text token; set its eos_token")
    rows = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        part = list(texts[start : start + _ENCODED_AT_ONCE])
        ids = tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        rows += [torch.tensor(row, dtype=torch.int32) for row in ids]
    return EncodedTexts(rows, end)


def draw_batches(
    encoded: EncodedTexts, *, batch_size: int, steps: int, mask_padding: bool, seed: int
) -> list[TextBatch]:
    """The batch of every step: epoch after epoch, each epoch in an order of its own.

    A text of fewer than two tokens has nothing to predict and is left out. With ``mask_padding``
    a text counts with its own tokens; without it, with as many as the longest of its batch.

    Raises ``SteerError`` if no text has two tokens.
    """
    usable = [row for row, ids in enumerate(encoded.rows) if len(ids) > 1]
    if not usable:
        raise SteerError(
            f"none of the {len(encoded.rows)} texts has two tokens, so there is nothing to predict"
        )
    return [
        _batch(encoded, rows, mask_padding)
        for rows in shuffled(usable, min(batch_size, len(usable)), steps, seed)
    ]


def _batch(encoded: EncodedTexts, rows: list[int], mask_padding: bool) -> TextBatch:
    counts = [len(encoded.rows[row]) - 1 for row in rows]
    if not mask_padding:
        counts = [max(counts)] * len(counts)
    return TextBatch(tuple(rows), tuple(counts))


def shuffled(rows: Sequence[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: epoch after epoch, each in an order of its own."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.sample(rows, len(rows))
        yield [order.pop() for _ in range(batch_size)]
