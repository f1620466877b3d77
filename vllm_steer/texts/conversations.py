"""Labelled conversations from files: an answer with its context, and whether it shows a concept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.files.json_text import unique_keys
from vllm_steer.texts.labels import LabelMap, label_map
from vllm_steer.texts.rows import Row, read_rows, take, text_of
from vllm_steer.untrusted_text import is_number, shown

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """Two or more messages ``{"role", "content"}``, the last one the assistant's answer.

    ``label`` is 1 if the answer has the concept, else 0; ``location`` is the row, for error
    messages.
    """

    messages: Messages
    label: int
    location: str = ""

    @property
    def prompt(self) -> str:
        """The message before the answer."""
        return self.messages[-2]["content"]


def read_conversations(path: str | Path, *, labels: str | None = None) -> list[Conversation]:
    """Read the conversations of a file, one per row.

    A row has ``prompt``, ``completion`` and optionally ``conversation_history``, a list of earlier
    messages; or ``messages``, the whole list. In CSV a list is JSON in its cell. ``label`` is 0 or
    1, or mapped to 0 or 1 by the label map ``labels``.

    Raises ``SteerError`` with each invalid row, and for a file without rows of both labels.
    """
    number = _zero_or_one if labels is None else label_map(labels)
    conversations = list(take(read_rows(path), lambda row: _conversation(row, number)))
    missing = sorted({0, 1} - {conversation.label for conversation in conversations})
    if missing:
        raise SteerError(
            f"{path}: {len(conversations)} rows and none with the label "
            f"{' or '.join(map(str, missing))}; expected answers with the concept (1) and without "
            "it (0)"
        )
    return conversations


def _conversation(row: Row, number: LabelMap) -> Conversation:
    if "messages" in row.values:
        if conflicts := {"prompt", "completion", "conversation_history"} & set(row.values):
            raise SteerError(
                f"{row.location}: messages and {', '.join(sorted(conflicts))}; give one of them"
            )
        messages = _messages(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise SteerError(
                f"{row.location}: the roles are {[m['role'] for m in messages]}; expected two or "
                "more messages, the last one the assistant's"
            )
    else:
        messages = (
            *_messages(row, "conversation_history"),
            {"role": "user", "content": text_of(row, "prompt")},
            {"role": "assistant", "content": text_of(row, "completion")},
        )
    if not messages[-1]["content"].strip():
        raise SteerError(
            f"{row.location}: the last message is empty; expected the assistant's answer"
        )
    return Conversation(messages, _label(row, number), row.location)


def _messages(row: Row, name: str) -> Messages:
    value = row.values.get(name)
    if value is None or value == "":
        value = []
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(map(_is_message, value)):
        raise SteerError(
            f"{row.location}: {name} is {shown(row.values[name])}; expected a list of "
            '{"role": ..., "content": ...}'
        )
    texts = (message[part] for message in value for part in ("role", "content"))
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise SteerError(f"{row.location}: {name} has characters that are not valid Unicode")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def _label(row: Row, number: LabelMap) -> int:
    if "label" not in row.values:
        raise SteerError(f"{row.location}: the field 'label' is missing; every row needs one")
    try:
        label = number(row.values["label"])
    except SteerError as error:
        raise SteerError(f"{row.location}: {error}") from None
    if label not in (0.0, 1.0):
        raise SteerError(
            f"{row.location}: label {shown(row.values['label'])} is {label:g}; expected 0 or 1, "
            "or a label map such as good=1,bad=0"
        )
    return int(label)


def _zero_or_one(value: Any) -> float:
    """The value of a label without a label map; JSON's true and false are 1 and 0."""
    try:
        if isinstance(value, str) and not is_number(value):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise SteerError(
            f"label {shown(value)} is neither 0 nor 1; give a label map such as good=1,bad=0"
        ) from None
