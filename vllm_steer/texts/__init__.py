"""Texts, labels and conversations from a user's files in JSONL, JSON, CSV, TSV or plain text.

All commands that read texts use this package: ``vllm-steer fit``, ``evidence``, ``transfer``,
``eval``, ``compare`` and ``sweep``.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

from vllm_steer.texts.conversations import Conversation, read_conversations
from vllm_steer.texts.labelled_texts import LabelledText, read_labelled, read_texts, read_two_sides
from vllm_steer.texts.labels import LABEL_MAPS, label_map
from vllm_steer.texts.rows import SUFFIXES, Row, read_rows, take, text_of

__all__ = [
    "LABEL_MAPS",
    "SUFFIXES",
    "Conversation",
    "LabelledText",
    "Row",
    "label_map",
    "read_conversations",
    "read_labelled",
    "read_rows",
    "read_texts",
    "read_two_sides",
    "take",
    "text_of",
]
