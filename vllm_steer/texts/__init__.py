"""Texts from a user's files: rows of JSONL, JSON, CSV and plain text, and their labels."""

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
