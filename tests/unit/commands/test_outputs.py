"""Output files that exist or are also inputs: every command checks them before its work."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_steer import SteerError, VectorSteer, load_steer, save_steer
from vllm_steer.cli import app
from vllm_steer.cli.output import check_output

PRECIOUS = b"precious"


@pytest.fixture
def steer(tmp_path: Path) -> Path:
    save_steer(VectorSteer(vectors=torch.ones(2, 4), layers=(0, 1)), tmp_path / "steer")
    return tmp_path / "steer"


def call(*line: Any) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in line])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_plot_replaces_a_file_only_when_forced(tmp_path: Path, steer: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "a.png"
    plot.write_bytes(PRECIOUS)
    with pytest.raises(SteerError, match=r"a\.png: exists already; .*--force"):
        call("inspect", steer, "--plot", plot)
    assert plot.read_bytes() == PRECIOUS
    call("inspect", steer, "--plot", plot, "--force")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["itself", "link", "hard-link", "way-around"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "forced"])
def test_a_plot_never_replaces_the_steer(
    tmp_path: Path, steer: Path, kind: str, force: list[str]
) -> None:
    before, plot = steer.read_bytes(), tmp_path / "a.png"
    if kind == "link":
        plot.symlink_to(steer)
    elif kind == "hard-link":
        os.link(steer, plot)
    else:
        plot = steer if kind == "itself" else tmp_path / ".." / tmp_path.name / "steer"
    with pytest.raises(SteerError, match="which is read; choose another name"):
        call("inspect", steer, "--plot", plot, *force)
    with pytest.raises(SteerError, match="which is read; choose another name"):
        call(
            *("sweep", "m", steer, "--prompts", "p.txt", "--judge", "lexicon:w"),
            *("--plot", plot, *force),
        )
    assert steer.read_bytes() == before


@pytest.mark.parametrize("target", ["prompts", "lexicon"])
def test_a_sweeps_plot_never_replaces_what_it_reads(
    tmp_path: Path, steer: Path, target: str
) -> None:
    for name in ("prompts", "lexicon"):
        (tmp_path / name).write_bytes(PRECIOUS)
    line = ["sweep", "m", steer, "--prompts", tmp_path / "prompts", "--judge"]
    line += [f"lexicon:{tmp_path / 'lexicon'}", "--plot", tmp_path / target, "--force"]
    with pytest.raises(SteerError, match="which is read; choose another name"):
        call(*line)
    assert (tmp_path / target).read_bytes() == PRECIOUS


def test_a_sweeps_plot_replaces_a_file_only_when_forced(tmp_path: Path, steer: Path) -> None:
    (tmp_path / "a.png").write_bytes(PRECIOUS)
    line = ["sweep", "m", steer, "--prompts", "p.txt", "--judge", "lexicon:w", "--plot"]
    with pytest.raises(SteerError, match=r"a\.png: exists already"):
        call(*line, tmp_path / "a.png")
    with pytest.raises(SteerError, match=r"p\.txt"):  # the next thing to be wrong
        call(*line, tmp_path / "a.png", "--force")
    assert (tmp_path / "a.png").read_bytes() == PRECIOUS


@pytest.mark.parametrize(
    "line",
    [
        ("lm-steer", "--data"),
        ("concept", "--data"),
        ("vector", "--data"),
        ("vector", "--pairs"),
        ("delta", "--other", "x", "--wanted"),
    ],
    ids=" ".join,
)
def test_a_fit_never_replaces_its_texts(tmp_path: Path, line: tuple[str, ...]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(PRECIOUS)
    with pytest.raises(SteerError, match="which is read; choose another name"):
        call("fit", line[0], "embedded", data, "--force", *line[1:], data)
    assert data.read_bytes() == PRECIOUS


def test_a_transfer_never_replaces_its_texts(tmp_path: Path, steer: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(PRECIOUS)
    with pytest.raises(SteerError, match="which is read; choose another name"):
        call("transfer", steer, "embedded", "embedded", data, "--data", data, "--force")
    assert data.read_bytes() == PRECIOUS


def test_a_loss_curve_is_replaced_only_when_forced(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": -1}\n')
    run.mkdir()
    (run / "loss.png").write_bytes(PRECIOUS)
    line = ["fit", "lm-steer", "embedded", tmp_path / "out", "--data", data, "--run-folder", run]
    with pytest.raises(SteerError, match=r"loss\.png: exists already"):
        call(*line, "--plot")
    assert os.listdir(run) == ["loss.png"] and (run / "loss.png").read_bytes() == PRECIOUS


def test_a_file_is_converted_in_place_when_forced(tmp_path: Path, steer: Path) -> None:
    os.link(steer, tmp_path / "other")
    (tmp_path / "link").symlink_to(steer)
    before = steer.read_bytes()
    call("convert", steer, tmp_path / "link", "--layers", "1", "--force")
    assert steer.read_bytes() == before and not (tmp_path / "link").is_symlink()
    call("convert", steer, steer, "--layers", "0", "--force")
    assert load_steer(steer).layers == (0,) and load_steer(tmp_path / "link").layers == (1,)
    assert (tmp_path / "other").read_bytes() == before


def test_standard_output_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteerError, match=r"^-: standard output cannot be written to"):
        check_output(Path("-"), force=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(SteerError, match="not a regular file and cannot be replaced"):
            check_output(path, force=True)
        with pytest.raises(SteerError, match="exists already"):
            check_output(path, force=False)
    with pytest.raises(SteerError, match="cannot be written"):
        check_output(tmp_path / ("x" * 300), force=False)


@pytest.mark.parametrize("command", ["lm-steer", "concept", "vector", "delta"])
def test_a_name_that_no_steer_file_can_store_is_refused_before_the_fit(
    tmp_path: Path, command: str
) -> None:
    options = ["--wanted", "a", "--other", "b"] if command == "delta" else ["--data", "a"]
    for model, description in (("m\udcff", "d"), ("m", "d\ud800")):
        line = ["fit", command, model, tmp_path / "out", *options, "--description", description]
        with pytest.raises(SteerError, match="has characters that are not valid Unicode"):
            call(*line)
    assert os.listdir(tmp_path) == []
