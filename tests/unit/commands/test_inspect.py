"""``vllm-steer inspect``: the description of each kind of steer file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_steer import LMSteer, Steer, SteerError, VectorSteer, save_steer
from vllm_steer.cli import app
from vllm_steer.embedded import STEERS
from vllm_steer.inspection.description import describe
from vllm_steer.inspection.plot import write_plot
from vllm_steer.steers import DeltaSteer

PNG = b"\x89PNG\r\n\x1a\n"
SENTIMENT = STEERS / "sentiment.safetensors"


def inspect(*arguments: Any) -> str:
    """The output of the command; raises its ``SteerError``."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def saved(steer: Steer, folder: Path) -> Path:
    save_steer(steer, folder / "steer.safetensors")
    return folder / "steer.safetensors"


def probed() -> VectorSteer:
    """A concept vector with layers 1 and 3; layers 0 to 3 were probed, 3 without validation."""
    recipe = {
        "method": "concept",
        "figures": {
            "read_layers": [0, 1, 2, 3],
            "train_accuracy": [0.5, 0.9, 0.6, 0.8],
            "validation_accuracy": [0.4, 0.7, 0.5, None],
        },
    }
    return VectorSteer(
        vectors=torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        layers=(1, 3),
        site="attn_in",
        mode="rotate",
        layer_scores=(0.9, 0.8),
        recipe=recipe,
    )


def delta() -> DeltaSteer:
    return DeltaSteer(
        delta=torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 2.0]]]), layers=(0, 5)
    )


def add() -> LMSteer:
    return LMSteer(
        variant="add",
        epsilon=0.1,
        hidden_size=2,
        fixed_columns=(1,),
        add=torch.tensor([[6.0, 8.0], [1.0, 0.0]]),
    )


def test_norms_of_a_vector_are_per_layer_with_every_probes_accuracy() -> None:
    assert describe(probed())["layers"] == [
        {"layer": 0, "train_accuracy": 0.5, "validation_accuracy": 0.4},
        {"layer": 1, "norm": 5, "score": 0.9, "train_accuracy": 0.9, "validation_accuracy": 0.7},
        {"layer": 2, "train_accuracy": 0.6, "validation_accuracy": 0.5},
        {"layer": 3, "norm": 2, "score": 0.8, "train_accuracy": 0.8},
    ]


def test_norms_of_a_delta_are_per_layer_and_step() -> None:
    assert describe(delta())["layers"] == [
        {"layer": 0, "norm": 5, "norm_per_step": [5, 1]},
        {"layer": 5, "norm": 2, "norm_per_step": [1, 2]},
    ]


def test_norms_of_add_are_per_column() -> None:
    assert describe(add())["columns"] == [
        {"column": 0, "fixed": False, "norm": 10},
        {"column": 1, "fixed": True, "norm": 1},
    ]


def test_a_recipe_of_other_figures_gives_no_accuracies() -> None:
    steer = VectorSteer(
        vectors=torch.ones(1, 1),
        layers=(0,),
        recipe={"figures": {"read_layers": [0], "train_accuracy": [1, 2], "losses": [3]}},
    )
    assert describe(steer)["layers"] == [{"layer": 0, "norm": 1}]


def test_json_has_all_figures_of_the_file() -> None:
    data = json.loads(inspect(SENTIMENT, "--json"))
    assert (data["kind"], data["site"], data["rank"]) == ("lm_steer", "head", 32)
    free, fixed = data["columns"]
    assert (free["fixed"], fixed["fixed"]) == (False, True)
    assert len(free["singular_values"]) == len(free["shares"]) == 32
    assert sum(free["shares"]) == pytest.approx(1)
    assert "tokens" not in data


def test_json_with_a_model_has_both_ends_of_the_leading_directions() -> None:
    data = json.loads(inspect(SENTIMENT, "--model", "embedded", "--json", "--top", 3))
    assert [entry["label"] for entry in data["tokens"]] == [
        f"column 0, direction {i}" for i in (0, 1, 2)
    ]
    assert all(len(entry[side]) == 20 for entry in data["tokens"] for side in ("highest", "lowest"))
    assert data["tokens_left_out"] is None


def test_unavailable_tokens_are_left_out_with_the_reason(tmp_path: Path) -> None:
    path = saved(probed(), tmp_path)
    assert "its directions are" in inspect(path, "--model", "no-such-model")
    data = json.loads(inspect(path, "--model", "no-such-model", "--json"))
    assert data["tokens"] == []
    assert data["tokens_left_out"].startswith("a steer at the site attn_in has no nearest tokens")


def test_the_table_shows_layers_and_the_recipe(tmp_path: Path) -> None:
    output = inspect(saved(probed(), tmp_path))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines()]
    assert ["1", "5", "0.9", "0.9", "0.7"] in rows
    assert ["2", "", "", "0.6", "0.5"] in rows
    assert "  method: concept" in output
    assert "    train_accuracy: 0.5, 0.9, 0.6, 0.8" in output


def test_long_lists_of_a_recipe_show_their_ends(tmp_path: Path) -> None:
    losses = {"losses": [float(step) for step in range(50)]}
    steer = VectorSteer(vectors=torch.ones(1, 1), layers=(0,), recipe={"figures": losses})
    output = inspect(saved(steer, tmp_path))
    assert "    losses: 0, 1, 2, ... 44 more ..., 47, 48, 49" in output


def test_text_of_a_file_is_never_markup(tmp_path: Path) -> None:
    steer = LMSteer(
        variant="add", epsilon=0.1, hidden_size=2, add=torch.ones(1, 2), description="[bold]x[/]"
    )
    assert "[bold]x[/]" in inspect(saved(steer, tmp_path))


@pytest.mark.parametrize("steer", [probed(), delta(), add()], ids=["vector", "delta", "add"])
def test_every_kind_is_drawn(steer: Steer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(describe(steer), tmp_path / "steer.png")
    assert (tmp_path / "steer.png").read_bytes().startswith(PNG)
    assert os.listdir(tmp_path) == ["steer.png"]


def test_plot_is_written_beside_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "singular value" in inspect(SENTIMENT, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SteerError, match=r"nowhere/a\.png: there is no folder"):
        inspect(SENTIMENT, "--plot", tmp_path / "nowhere" / "a.png")


def test_a_plot_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SteerError, match=r'the package matplotlib is needed.*"vllm-steer\[eval\]"'):
        write_plot(describe(add()), tmp_path / "a.png")


def test_the_command_returns_1_and_prints_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "from vllm_steer.cli import main; main()", "inspect"]
    completed = subprocess.run(
        [*line, str(tmp_path / "none")], capture_output=True, text=True, timeout=120
    )
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.endswith("none: does not exist; give the path of a steer file\n")
    assert completed.stderr.count("\n") == 1
