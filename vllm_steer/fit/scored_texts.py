"""Texts to train on, with the tokens that the loss counts: all of a text, or those of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.answer_tokens import answer_start, ids_of, render
from vllm_steer.fit.vector import Text
from vllm_steer.texts import Row, label_map, read_rows, take, text_of
from vllm_steer.texts.conversations import Conversation
from vllm_steer.untrusted_text import shown


class StrengthText(NamedTuple):
    """A text, or a prompt and its answer, and the strength that makes it likely."""

    text: Text
    strength: float = 1.0


@dataclass(frozen=True)
class ScoredText:
    """Token ids ``[tokens]``, of which those from ``start`` on are counted in the loss.

    ``start`` is at least 1, and the length of the prompt if there is one.
    """

    ids: torch.Tensor  # int32
    start: int

    @property
    def num_scored(self) -> int:
        """Tokens that are counted."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class TextEncoding:
    """How texts become tokens.

    max_length     the most tokens of a text; the rest is cut off at the end
    chat_template  a prompt is a user's message in the tokenizer's template, the answer its reply
    end_of_text    the tokenizer's end-of-text token follows each answer and is counted; in a chat
                   template, which ends its messages itself, none is added
    """

    max_length: int = 256
    chat_template: bool = False
    end_of_text: bool = True


def read_answers(
    path: str | Path,
    *,
    prompt_field: str = "prompt",
    answer_field: str = "completion",
    label_field: str | None = None,
    labels: str | None = None,
) -> list[StrengthText]:
    """The prompts of a file with their answers; ``label_field`` names the strength, else it is 1.

    ``labels`` is a label map. Rows of label 0 are left out. Raises ``SteerError`` naming each bad
    row, and for a file without other rows.
    """

    def text(row: Row) -> Text:
        return text_of(row, prompt_field), text_of(row, answer_field)

    return _read(path, text, label_field, labels)


def read_plain(
    path: str | Path,
    *,
    text_field: str = "text",
    label_field: str | None = None,
    labels: str | None = None,
) -> list[StrengthText]:
    """The texts of a file, as ``read_answers`` reads prompts with their answers."""
    return _read(path, lambda row: text_of(row, text_field), label_field, labels)


def encode_scored(tokenizer: Any, text: Text, encoding: TextEncoding) -> ScoredText | None:
    """The tokens of a text; None for a text of one token, which has nothing to predict.

    A prompt and its answer are joined as they stand, or by the chat template. Raises ``SteerError``
    for a prompt without tokens or without room for its answer, and for a tokenizer that lacks what
    the encoding needs.
    """
    if isinstance(text, str):
        if encoding.chat_template:
            raise SteerError(
                f"text {shown(text)} has no prompt; the chat template needs prompts with answers"
            )
        ids = tokenizer(text, truncation=True, max_length=encoding.max_length)["input_ids"]
        return ScoredText(_tensor(ids), 1) if len(ids) > 1 else None
    before, ids = _chat_ids(tokenizer, *text) if encoding.chat_template else _ids(tokenizer, *text)
    if encoding.end_of_text and not encoding.chat_template:
        ids = _ended(tokenizer, ids)
    start = answer_start(before, ids)
    if start == 0:
        raise SteerError(f"prompt {shown(text[0])} has no token before its answer")
    if start >= min(len(ids), encoding.max_length):
        raise SteerError(
            f"prompt {shown(text[0])} has {start} tokens and its answer {len(ids) - start}; of "
            f"the first {encoding.max_length} tokens (max_length) none is the answer's: give a "
            "shorter prompt, or a larger max_length"
        )
    return ScoredText(_tensor(ids[: encoding.max_length]), start)


def _read(
    path: str | Path, text: Any, label_field: str | None, labels: str | None
) -> list[StrengthText]:
    if labels is not None and label_field is None:
        raise SteerError("labels maps the values of a label field; name the field too")
    number = label_map(labels)

    def read(row: Row) -> StrengthText:
        if label_field is None:
            return StrengthText(text(row))
        if label_field not in row.values:
            raise SteerError(
                f"{row.location}: the field {label_field!r} is missing; every row needs a label"
            )
        try:
            return StrengthText(text(row), number(row.values[label_field]))
        except SteerError as error:
            raise SteerError(f"{row.location}: {error}") from None

    rows = [row for row in take(read_rows(path), read) if row.strength != 0]
    if not rows:
        raise SteerError(f"{path}: there are no rows to train on")
    return rows


def _ids(tokenizer: Any, prompt: str, answer: str) -> tuple[Sequence[int], list[int]]:
    """The tokens of a prompt, and those of it and its answer."""
    return tokenizer(prompt)["input_ids"], list(tokenizer(prompt + answer)["input_ids"])


def _chat_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[Sequence[int], list[int]]:
    if not tokenizer.chat_template:
        raise SteerError("the tokenizer has no chat template; do without it")
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    rendered = render(tokenizer, Conversation(messages, label=1, location=shown(prompt)))
    return ids_of(tokenizer, rendered.before), ids_of(tokenizer, rendered.text)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise SteerError(
            "the tokenizer has no end-of-text token; set its eos_token, or train without one"
        )
    return ids if ids and ids[-1] == end else [*ids, end]


def _tensor(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)
