"""Commands with untrusted text on a terminal: printed literally, and no partial files."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_tools import MAIN, call, steer_of
from eval_tools import FakeEngine
from hostile_texts import HOSTILE, assert_shown

from vllm_steer import SteerError, VectorSteer, load_steer, save_steer

ALL = "".join(text for text in HOSTILE.values() if len(text) < 1000)


def on_a_terminal(*line: Any, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in a separate process on a pseudo-terminal."""
    controller, terminal = pty.openpty()
    arguments = {**os.environ, "COLUMNS": "100", **environment}
    command = [sys.executable, "-c", MAIN, *(os.fspath(part) for part in line)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=arguments) as process:
        os.close(terminal)
        output, end = b"", time.monotonic() + 120
        while time.monotonic() < end and select.select([controller], [], [], 120)[0]:
            try:
                part = os.read(controller, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            output += part
        os.close(controller)
    return process.returncode, output.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_convert_and_inspect_show_hostile_text_of_a_file_escaped(tmp_path: Path, text: str) -> None:
    steer = steer_of(tmp_path / "in", text)
    completed = call("convert", steer, tmp_path / "out")
    assert (completed.exit_code, completed.exception) == (0, None)
    assert_shown(completed.output)
    assert load_steer(tmp_path / "out").description == text
    completed = call("inspect", tmp_path / "out")
    assert (completed.exit_code, completed.exception) == (0, None)
    assert_shown(completed.output)
    for command in (["convert", steer, tmp_path / "again"], ["inspect", steer]):
        completed = call(*command, "--json")
        assert_shown(completed.stdout)
        assert json.loads(completed.stdout)["description"] == text


def names() -> list[str]:
    return [text.replace("/", "-") for text in HOSTILE.values() if len(text) < 200]


@pytest.mark.parametrize("name", names())
def test_file_names_are_shown_escaped(tmp_path: Path, name: str) -> None:
    steer, out = tmp_path / f"i{name}", tmp_path / f"o{name}"
    steer_of(tmp_path / "plain", "x").rename(steer)
    for line in (["convert", steer, out], ["inspect", out], ["convert", out, out, "--force"]):
        completed = call(*line)
        assert (completed.exit_code, completed.exception) == (0, None)
        assert_shown(completed.output)
    completed = call("convert", steer, out)
    assert isinstance(completed.exception, SteerError)
    assert_shown(str(completed.exception))


def test_a_plot_accepts_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steer = steer_of(tmp_path / "in", ALL)
    for name in names():
        completed = call("inspect", steer, "--plot", tmp_path / f"{name}.png")
        assert (completed.exit_code, completed.exception) == (0, None)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def foreign_names(folder: Path) -> Mapping[str, Any]:
    """The fixture's folder with untrusted text in every name."""
    name = ALL.replace("/", "-")[:120]
    lexicon_path, prompts = folder / f"w{name}.yaml", folder / f"p{name}.txt"
    (folder / "words.yaml").rename(lexicon_path)
    (folder / "prompts.txt").rename(prompts)
    (folder / "v").rename(folder / f"v{name}")
    return {"words": lexicon_path, "prompts": prompts, "steer": folder / f"v{name}", "name": name}


@pytest.mark.parametrize("shown_as", ["tables", "json"])
def test_eval_shows_foreign_names(folder: Path, fake_engine: FakeEngine, shown_as: str) -> None:
    pytest.importorskip("matplotlib")
    foreign, run = foreign_names(folder), folder / "run"
    line = ["eval", f"m{ALL}", foreign["steer"], "--prompts", foreign["prompts"], "--out", run]
    line += ["--strengths", "-2,2", "--judge", f"lexicon:{foreign['words']}"]
    line += ["--judge", "perplexity:m", "--samples", 20]
    completed = call(*line, *(["--json"] if shown_as == "json" else []))
    assert (completed.exit_code, completed.exception) == (0, None)
    assert_shown(completed.output)
    assert_shown((run / "report.md").read_text())
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "report.json").read_text())["model"] == f"m{ALL}"


def test_sweep_shows_foreign_names(folder: Path, fake_engine: FakeEngine) -> None:
    pytest.importorskip("matplotlib")
    foreign = foreign_names(folder)
    line = ["sweep", f"m{ALL}", foreign["steer"], "--prompts", foreign["prompts"]]
    line += ["--judge", f"lexicon:{foreign['words']}", "--strengths", "2", "--budget", 1.35]
    completed = call(*line, "--plot", folder / "a$x$.png", "--write")
    assert (completed.exit_code, completed.exception) == (0, None)
    assert_shown(completed.output)
    assert (folder / "a$x$.png").read_bytes().startswith(b"\x89PNG")
    assert load_steer(foreign["steer"]).default_strength == 2.0


@pytest.mark.parametrize(
    "environment",
    [{}, {"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=["utf-8", "ascii", "C"],
)
def test_a_real_terminal_shows_escaped_text_in_any_encoding(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    name = "o\x1b[38;5;199m\x9b中[red]é".encode() + b"\xff\x9b"
    steer = steer_of(tmp_path / "in", f"{ALL} naïve 中文")
    out = os.fsencode(tmp_path) + b"/" + name
    code, output = on_a_terminal("convert", steer, out, **environment)
    assert code == 0, output
    assert_shown(output)
    assert os.path.isfile(out)
    code, output = on_a_terminal("convert", steer, out, **environment)
    assert code == 1 and "exists already" in output and output.count("\n") == 1
    assert_shown(output)
    bad = os.fsencode(tmp_path) + b"/bad"
    code, output = on_a_terminal("convert", steer, bad, "--description", b"x\xff", **environment)
    assert code == 1 and not os.path.exists(bad)
    assert_shown(output)


def test_a_comparison_shows_foreign_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comparison_tools

    from vllm_steer.evaluation import judges, missing_texts

    pytest.importorskip("matplotlib")
    engine = comparison_tools.FakeEngine()
    monkeypatch.setattr(missing_texts, "engine", engine.engine)
    monkeypatch.setitem(
        judges._BUILDERS, "perplexity", lambda *_: comparison_tools.FakePerplexity()
    )  # type: ignore[index]
    name = ALL.replace("/", "-")[:100]
    (tmp_path / f"w{name}.yaml").write_text("positive: [good]\nnegative: [bad]\n")
    (tmp_path / f"p{name}.txt").write_text("It was\n")
    save_steer(VectorSteer(vectors=torch.ones(1, 3), layers=(0,)), tmp_path / f"v{name}")
    judge = f"lexicon:{tmp_path / f'w{name}.yaml'}"
    spec = {"steer": f"v{name}", "judge": judge, "strengths": [2], "max": [4]}
    content = {"properties": {"b": spec}, "seen": ["b"]}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    line = ["compare", f"m{ALL}", tmp_path / "asked.yaml", "--prompts", tmp_path / f"p{name}.txt"]
    completed = call(*line, "--out", tmp_path / "run", "--samples", comparison_tools.TEXTS)
    assert (completed.exit_code, completed.exception) == (0, None)
    assert_shown(completed.output)
    assert_shown((tmp_path / "run" / "report.md").read_text())
