"""Labelled conversations from files: an answer in its context, and whether it shows a concept."""

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
    """Two or more messages ``{"role", "content"}``, the last one the assistant's.

    ``label`` is 1 if that answer has the concept, else 0; ``place`` is for messages to the user.
    """

    messages: Messages
    label: int
    place: str = ""

    @property
    def prompt(self) -> str:
        """What the answer answers: the message before it."""
        return self.messages[-2]["content"]


def read_conversations(path: str | Path, *, labels: str | None = None) -> list[Conversation]:
    """The conversations of a file, one a row, in their order.

    A row has ``prompt``, ``completion`` and perhaps ``conversation_history``, a list of messages
    before them; or ``messages`` in all. In CSV a list is JSON in its cell. ``label`` is 0 or 1, or
    what the label map ``labels`` makes 0 or 1.

    Raises ``SteerError`` naming each bad row, and for a file without rows of both labels.
    """
    number = _zero_or_one if labels is None else label_map(labels)
    found = list(take(read_rows(path), lambda row: _conversation(row, number)))
    missing = sorted({0, 1} - {conversation.label for conversation in found})
    if missing:
        raise SteerError(
            f"{path}: {len(found)} rows and none with the label {' or '.join(map(str, missing))}; "
            "a concept is fitted to answers with it (1) and without it (0)"
        )
    return found


def _conversation(row: Row, number: LabelMap) -> Conversation:
    if "messages" in row.values:
        if both := {"prompt", "completion", "conversation_history"} & set(row.values):
            raise SteerError(
                f"{row.place}: messages and {', '.join(sorted(both))}; give one of them"
            )
        messages = _messages(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise SteerError(
                f"{row.place}: the messages are {[m['role'] for m in messages]}; expected two or "
                "more, the last one the assistant's"
            )
    else:
        messages = (
            *_messages(row, "conversation_history"),
            {"role": "user", "content": text_of(row, "prompt")},
            {"role": "assistant", "content": text_of(row, "completion")},
        )
    if not messages[-1]["content"].strip():
        raise SteerError(f"{row.place}: the last message is empty; there is no answer to read")
    return Conversation(messages, _label(row, number), row.place)


def _messages(row: Row, name: str) -> Messages:
    given = row.values.get(name)
    if given is None or given == "":
        given = []
    if isinstance(given, str):
        try:
            given = json.loads(given, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, list) or not all(map(_is_message, given)):
        raise SteerError(
            f"{row.place}: {name} is {shown(row.values[name])}; expected a list of "
            '{"role": ..., "content": ...}'
        )
    texts = (message[part] for message in given for part in ("role", "content"))
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise SteerError(f"{row.place}: {name} has letters that are not Unicode")
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(given.get(name), str) for name in ("role", "content")
    )


def _label(row: Row, number: LabelMap) -> int:
    if "label" not in row.values:
        raise SteerError(f"{row.place}: there is no 'label'; every row needs one")
    try:
        label = number(row.values["label"])
    except SteerError as error:
        raise SteerError(f"{row.place}: {error}") from None
    if label not in (0.0, 1.0):
        raise SteerError(
            f"{row.place}: label {shown(row.values['label'])} is {label:g}; expected 0 and 1, or "
            "a label map such as good=1,bad=0"
        )
    return int(label)


def _zero_or_one(value: Any) -> float:
    """A label without a map: JSON's true and false count as 1 and 0."""
    try:
        if isinstance(value, str) and not is_number(value):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise SteerError(
            f"label {shown(value)} is neither 0 nor 1; give a label map such as good=1,bad=0"
        ) from None
