"""Untrusted text on a terminal is printed literally and truncated: tables, titles, bars, lines."""

import io
import json
from typing import Any

import pytest
from hostile_texts import HOSTILE, SURROGATE, assert_shown
from rich.table import Table

from vllm_steer.cli import evidence, inspect, transfer
from vllm_steer.cli import progress as progress_module
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import LONGEST, Console, say, say_json
from vllm_steer.doctor.finding import Finding
from vllm_steer.doctor.report import table as doctor_table
from vllm_steer.evaluation.report import JudgeEntry, make_report, markdown, tables
from vllm_steer.evaluation.run import condition_grid
from vllm_steer.inspection import Evidence, NearTokens, TextSpan

TEXTS = [*HOSTILE.values(), SURROGATE]
IDS = [*HOSTILE, "surrogate"]
hostile = pytest.mark.parametrize("text", TEXTS, ids=IDS)


class Stream(io.TextIOWrapper):
    """A terminal with an encoding that raises errors for characters it lacks."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def terminal(stream: Stream, width: int = 80) -> Console:
    return Console(file=stream, force_terminal=True, width=width)


@hostile
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_text_is_shown_wherever_rich_accepts_one(text: str, encoding: str) -> None:
    stream = Stream(encoding)
    console = terminal(stream)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_column(text, style="bold", overflow="fold")
    table.add_row(text, console.text(text, "green"))
    console.print(table)
    console.print(text)
    console.print(text, text, sep="\n")
    with console.status(console.text(text)) as status:
        status.update(console.text(text))
    assert_shown(stream.written)


@hostile
def test_shown_text_equals_the_original(text: str) -> None:
    stream = Stream()
    terminal(stream, width=2000).print(text)
    expected = text.encode("unicode_escape").decode()
    if text.isascii() and text.isprintable():
        expected = text
    if text.isprintable():
        assert stream.written.startswith(text[:900])
    else:
        assert expected[:10].replace("\\\\", "\\")[:2] in stream.written


def test_a_text_is_bounded() -> None:
    stream = Stream()
    terminal(stream, width=5000).print("x" * 1_000_000)
    assert len(stream.written) == LONGEST + 1 and stream.written.endswith("...\n")


@hostile
def test_a_line_is_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii"):
        out, err = Stream(encoding), Stream(encoding)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        say(text)
        say(text, stderr=True)
        assert_shown(out.written)
        assert out.written == err.written


@hostile
def test_json_is_read_back_and_shows_nothing_else(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Stream("ascii")
    monkeypatch.setattr("sys.stdout", out)
    say_json({text: [text]})
    assert_shown(out.written)
    assert json.loads(out.written) == {text: [text]}


@hostile
def test_a_bar_shows_its_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    make_console = lambda **_: terminal(stream)  # noqa: E731
    monkeypatch.setattr(progress_module, "Console", make_console)
    with progress(text, 3) as advance:
        advance(1, description=text)
        advance(2)
    assert stream.written
    assert_shown(stream.written)


@hostile
def test_evidence_shows_text_and_spans(text: str) -> None:
    stream = Stream()
    whole = f"before {text[:5000]} after"
    spans = [
        TextSpan(begin, end, whole[begin:end], 0, 1, value)
        for begin, end, value in ((0, 9, 1.0), (len(whole) - 9, len(whole), -2.0), (4, 8, -1.0))
    ]
    entry = Evidence(whole, 1.0, (1.0, 2.0), tuple(spans[:1]), tuple(spans[1:]))
    evidence._show(terminal(stream), entry)
    assert_shown(stream.written)
    assert stream.written.count("before") >= 1 and "+3.000 nats" in stream.written


@hostile
def test_transfer_shows_the_outputs_name(text: str) -> None:
    stream = Stream()
    figures = {"shared_tokens": 3, "fit": None, "effect": None}
    terminal(stream).print(transfer._table(figures, title=text))
    assert_shown(stream.written)


@hostile
def test_doctor_shows_its_findings(text: str) -> None:
    stream = Stream()
    findings: list[Any] = [Finding(text, text, "FAILED", text), Finding("memory", text, "ok", text)]
    terminal(stream).print(doctor_table(text, findings))
    assert_shown(stream.written)


@hostile
def test_nearest_tokens_are_shown(text: str) -> None:
    stream = Stream()
    token = type("Token", (), {"text": text})()
    near = NearTokens.__new__(NearTokens)
    for name, value in {"label": text, "weight": 1.0, "highest": [token], "lowest": []}.items():
        object.__setattr__(near, name, value)
    terminal(stream).print(inspect._token_table([near]))
    assert_shown(stream.written)


def eval_report(text: str) -> Any:
    metadata = {
        "model": text,
        "steer": {"file": text},
        "prompts": {"file": text, "count": 1},
        "sampling": {"samples": 2},
    }
    settings = condition_grid((1.0,))
    figures = {s.name: {text: 0.5, "share": 0.5, "total_perplexity": 4.0} for s in settings}
    return make_report(
        metadata, settings, [JudgeEntry(text, "share")], {text: figures}, {text: text}
    )


@hostile
def test_the_tables_of_a_report_are_shown(text: str) -> None:
    stream = Stream()
    for table in tables(eval_report(text)):
        terminal(stream).print(table)
    assert_shown(stream.written)


@hostile
def test_a_report_in_markdown_is_printable(text: str) -> None:
    text_written = markdown(eval_report(text))
    assert_shown(text_written)
    assert len(text_written) < 20_000
    text_written.encode()
