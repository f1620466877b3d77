"""``vllm-steer evidence``: its inputs and its output."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_steer import SteerError
from vllm_steer.cli import app
from vllm_steer.embedded import STEERS

SENTIMENT = STEERS / "sentiment.safetensors"
PRAISE = "The hotel was wonderful. I warmly recommend it."
BLAME = "The hotel was dreadful. I regret every minute of it."


def evidence(*arguments: Any) -> str:
    """The output of the command; raises its ``SteerError``."""
    line = ["evidence", str(SENTIMENT), "embedded", *map(str, arguments)]
    result = CliRunner().invoke(app, line)
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    pairs = [(PRAISE, "good"), (BLAME, "bad"), (PRAISE, "bad"), (BLAME, "neither")]
    lines = [json.dumps({"text": text, "side": side}) for text, side in pairs]
    path.write_text("\n".join(lines))
    return path


def test_spans_of_a_text_are_given_by_characters() -> None:
    data = json.loads(evidence("--text", BLAME, "--strength", 5, "--spans", 2, "--json"))
    (entry,) = data["texts"]
    assert data["accuracy"] is None
    assert entry["total"] == pytest.approx(sum(entry["tokens"])) != 0
    assert entry["label"] == (1 if entry["total"] > 0 else -1)
    assert 1 <= len(entry["spans_against"]) <= 2
    for span in (*entry["spans_for"], *entry["spans_against"]):
        assert BLAME[span["begin"] : span["end"]] == span["text"] == span["text"].strip()
    assert all(span["evidence"] > 0 for span in entry["spans_for"])
    assert all(span["evidence"] < 0 for span in entry["spans_against"])


def test_the_text_is_printed_with_its_label() -> None:
    (entry,) = json.loads(evidence("--text", PRAISE, "--strength", 5, "--json"))["texts"]
    output = evidence("--text", PRAISE, "--strength", 5)
    assert output.startswith(PRAISE)
    assert f"evidence {entry['total']:+.3f} nats" in output
    assert f"label {entry['label']:+d}" in output


def test_accuracy_is_the_share_of_labels_of_the_evidences_sign(rows: Path) -> None:
    options = ["--label-field", "side", "--labels", "good=1,bad=-1,neither=0", "--strength", 5]
    data = json.loads(evidence("--file", rows, *options, "--json"))
    labels = [entry["label"] for entry in data["texts"]]
    # The third row is labelled wrongly and the fourth is on no side.
    expected = [labels[0] == 1, labels[1] == -1, labels[2] == -1]
    assert data["accuracy"] == pytest.approx(sum(expected) / 3)
    assert labels[0] == labels[2]
    assert "of 3 labels agree with the sign of the evidence" in evidence("--file", rows, *options)


def test_a_file_without_labels_has_no_accuracy(rows: Path) -> None:
    data = json.loads(evidence("--file", rows, "--json"))
    assert (len(data["texts"]), data["accuracy"]) == (4, None)


def test_rows_that_have_a_label_are_read_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": PRAISE, "label": 1}))
    assert json.loads(evidence("--file", path, "--strength", 5, "--json"))["accuracy"] in (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the text to read: either --text or --file"),
        (["--text", "a b", "--file", "x.txt"], "either --text or --file"),
        (["--text", "a b", "--labels", "sst2"], "--label-field and --labels are for the rows of a"),
        (
            ["--text", PRAISE, "--strength", "0"],
            "strength is 0: the two likelihoods would be equal",
        ),
        (["--text", "a \udcff b"], "--text has bytes that are not UTF-8"),
    ],
    ids=["no text", "two sources", "labels of a text", "strength 0", "broken text"],
)
def test_unreadable_input_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        evidence(*options)
