"""Files of labelled conversations, and the errors of invalid rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import SteerError
from vllm_steer.texts.conversations import read_conversations

HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = {"prompt": "Why?", "completion": "Because.", "label": 1}
BAD = {"prompt": "Why?", "completion": "No.", "label": 0}


def write(folder: Path, *rows: Any, name: str = "talks.jsonl") -> Path:
    path = folder / name
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.json"])
def test_prompt_history_and_completion_become_messages(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {**GOOD, "conversation_history": HISTORY}, BAD, name=name)
    first, second = read_conversations(path)
    assert first.messages == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    )
    assert (first.label, second.label, first.prompt) == (1, 0, "Why?")
    assert len(second.messages) == 2


def test_messages_are_used_unchanged(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *HISTORY]
    path = write(tmp_path, {"messages": messages, "label": True}, BAD)
    first = read_conversations(path)[0]
    assert (list(first.messages), first.label, first.prompt) == (messages, 1, "Hi")


def test_a_csv_cell_holds_a_list_as_json(tmp_path: Path) -> None:
    path = tmp_path / "talks.csv"
    quoted = json.dumps(HISTORY).replace('"', '""')
    path.write_text(
        f'prompt,completion,label,conversation_history\nWhy?,Because.,1,"{quoted}"\nWhy?,No.,0,\n'
    )
    first, second = read_conversations(path)
    assert (len(first.messages), len(second.messages)) == (4, 2)
    assert (first.label, second.label) == (1, 0)


def test_a_label_map_makes_names_zero_and_one(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "label": "witty"}, {**BAD, "label": "dull"})
    assert [entry.label for entry in read_conversations(path, labels="witty=1,dull=0")] == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "x", "label": 1}, "the field 'prompt' is missing; the row has"),
        ({"prompt": "x", "completion": " ", "label": 1}, "completion is ' '; expected a text"),
        ({"prompt": "x", "completion": "y"}, "the field 'label' is missing"),
        ({**GOOD, "label": -1}, r"label -1 is -1; expected 0 or 1, .* good=1,bad=0"),
        ({**GOOD, "label": "yes"}, "label 'yes' is neither 0 nor 1; give a label map"),
        (
            {**GOOD, "conversation_history": [1]},
            r"conversation_history is \[1\]; expected a list of",
        ),
        ({**GOOD, "conversation_history": "{"}, r"conversation_history is '{'; expected a list of"),
        ({**GOOD, "messages": HISTORY}, "messages and completion, prompt; give one of them"),
        ({"messages": HISTORY[:1], "label": 1}, r"roles are \['user'\]; expected two or more"),
        ({"messages": HISTORY[1:], "label": 1}, r"roles are \['assistant'\]; expected two"),
        (
            {"messages": [HISTORY[0], {"role": "assistant", "content": ""}], "label": 1},
            "the last message is empty",
        ),
        (
            {"messages": [HISTORY[0], {"role": "assistant", "content": "\ud800"}], "label": 1},
            "messages has characters that are not valid Unicode",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, GOOD, row, BAD)
    with pytest.raises(SteerError, match=r"talks\.jsonl:2: .*" + message):
        read_conversations(path)


def test_both_labels_are_needed(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="1 rows and none with the label 0"):
        read_conversations(write(tmp_path, GOOD))
    with pytest.raises(SteerError, match="0 rows and none with the label 0 or 1"):
        read_conversations(write(tmp_path))
