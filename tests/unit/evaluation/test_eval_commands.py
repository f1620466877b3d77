"""``vllm-steer eval`` and ``sweep`` with a fake engine: their requests and their output."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_tools import FakeEngine
from typer.testing import CliRunner

from vllm_steer import DeltaSteer, SteerError, VectorSteer, load_steer, save_steer
from vllm_steer.cli import app
from vllm_steer.sweep import sweep_run


def call(name: str, folder: Path, *options: Any) -> Any:
    line = [name, "m", folder / "v", "--prompts", folder / "prompts.txt", *options]
    result = CliRunner().invoke(app, [str(part) for part in line])
    if isinstance(result.exception, SteerError):
        raise result.exception
    return result


def evaluate(folder: Path, *options: Any, strengths: str = "-2,2") -> Any:
    judge = ("--judge", f"lexicon:{folder / 'words.yaml'}")
    return call(
        *("eval", folder, "--strengths", strengths, "--out", folder / "run", "--no-plot"),
        *(*judge, "--samples", 20, *options),
    )


def sweep(folder: Path, *options: Any) -> Any:
    return call("sweep", folder, "--judge", f"lexicon:{folder / 'words.yaml'}", *options)


def test_every_setting_is_generated_once(folder: Path, fake_engine: FakeEngine) -> None:
    completed = evaluate(folder, "--json", "--layers", "1-2", "--phase", "prompt")
    options = {"layers": "1-2", "phase": "prompt"}
    assert fake_engine.requests == [
        None,
        {"steer": {"strength": -2.0, **options}},
        {"steer": {"strength": 2.0, **options}},
        {"random": {"strength": -2.0, **options}},
        {"random": {"strength": 2.0, **options}},
    ]
    report = json.loads(completed.stdout)
    assert report["steer"]["layers"] == "1-2"
    (judge,) = report["judges"]
    shares = [s["figures"][judge["name"]]["share"] for s in report["settings"]]
    assert shares == [0.5, 0.3, 0.7, 0.5, 0.5]


def test_the_schedule_of_a_delta_is_requested_and_identifies_the_run(
    folder: Path, fake_engine: FakeEngine
) -> None:
    save_steer(DeltaSteer(delta=torch.ones(3, 2, 4), layers=(0, 1)), folder / "v")
    assert json.loads(evaluate(folder, "--json").stdout)["steer"]["schedule"] == "fixed"
    with pytest.raises(SteerError, match=r"steer\.schedule was 'fixed' and is now 'dim'"):
        evaluate(folder, "--schedule", "dim")
    evaluate(folder, "--schedule", "dim", "--restart")
    assert fake_engine.requests[-1] == {"random": {"strength": 2.0, "schedule": "dim"}}


def test_the_saved_control_is_the_one_that_was_run(folder: Path, fake_engine: FakeEngine) -> None:
    evaluate(folder)
    assert fake_engine.files["random"] == folder / "run" / "random.safetensors"
    original, control = load_steer(folder / "v"), load_steer(fake_engine.files["random"])
    torch.testing.assert_close(control.vectors.norm(dim=1), original.vectors.norm(dim=1))


def test_an_interrupted_run_continues_and_accepts_more_strengths(
    folder: Path, fake_engine: FakeEngine
) -> None:
    fake_engine.fails_after = 2
    assert evaluate(folder).exit_code != 0
    assert not (folder / "run" / "report.json").exists()
    fake_engine.fails_after = 1000
    evaluate(folder)
    assert len(fake_engine.requests) == 5
    evaluate(folder, strengths="-2,2,4")
    assert fake_engine.requests[5:] == [{"steer": {"strength": 4.0}}, {"random": {"strength": 4.0}}]
    evaluate(folder)
    assert len(fake_engine.requests) == 7


def test_another_steer_under_the_same_name_is_another_run(
    folder: Path, fake_engine: FakeEngine
) -> None:
    evaluate(folder)
    save_steer(VectorSteer(vectors=torch.ones(4, 3), layers=(0, 1, 2, 3)), folder / "v")
    with pytest.raises(SteerError, match=r"other settings: different steer\.sha256;"):
        evaluate(folder)
    assert evaluate(folder, "--restart").exit_code == 0
    (folder / "prompts.txt").write_text("It is\n")
    with pytest.raises(SteerError, match=r"different prompts\.sha256; prompts\.count was 2"):
        evaluate(folder)


def test_errors_are_reported_before_anything_is_generated(
    folder: Path, fake_engine: FakeEngine
) -> None:
    with pytest.raises(SteerError, match="judge 'taste' is unknown"):
        evaluate(folder, "--judge", "taste")
    with pytest.raises(SteerError, match="layers 9 are not in this steer; it has 0-3"):
        evaluate(folder, "--layers", "9")
    with pytest.raises(SteerError, match="preset is 'best'; allowed: lm-steer"):
        evaluate(folder, "--preset", "best")
    with pytest.raises(SteerError, match=r"no judge is available .perspective: the Perspective"):
        call(
            *("eval", folder, "--strengths", "1", "--out", folder / "run"),
            *("--judge", "perspective", "--no-plot"),
        )
    assert not fake_engine.requests and not (folder / "run").exists()


def test_a_sweep_writes_the_best_within_the_budget(folder: Path, fake_engine: FakeEngine) -> None:
    # Good texts: 10 + 2 v of 20; perplexity ratio 1 + v / 10: within 1.35 lies v <= 3.5.
    completed = sweep(folder, "--strengths", "1:5:1", "--budget", 1.35, "--json", "--write")
    result = json.loads(completed.stdout)
    assert (result["chosen"]["strength"], result["chosen"]["effect"]) == (3.0, 0.8)
    assert [p["within_budget"] for p in result["points"]] == [True, True, True, False, False]
    assert load_steer(folder / "v").default_strength == 3.0
    assert load_steer(folder / "v").layers == (0, 1, 2, 3)


def test_a_sweep_requests_the_layers_of_each_candidate(
    folder: Path, fake_engine: FakeEngine
) -> None:
    sweep(folder, "--strengths", "2", "--budget", 1.35, "--layers", "all;1-2", "--write")
    assert fake_engine.requests == [
        None,
        {"steer": {"strength": 2.0}},
        {"steer": {"strength": 2.0, "layers": "1-2"}},
    ]
    assert load_steer(folder / "v").layers == (0, 1, 2, 3)  # of equal points the first


def test_without_a_choice_the_points_are_shown_and_the_file_stays(
    folder: Path, fake_engine: FakeEngine
) -> None:
    before = (folder / "v").read_bytes()
    line = ["sweep", "m", folder / "v", "--prompts", folder / "prompts.txt", "--strengths", "4,5"]
    line += ["--judge", f"lexicon:{folder / 'words.yaml'}", "--json", "--write"]
    result = CliRunner().invoke(app, [str(part) for part in line])
    assert isinstance(result.exception, SteerError) and result.exit_code == 1
    assert "no strength is within the budget: the lowest perplexity ratio is 1.4 " in str(
        result.exception
    )
    actual = json.loads(result.stdout)
    assert (actual["chosen"], actual["written"], len(actual["points"])) == (None, None, 2)
    assert (folder / "v").read_bytes() == before


@pytest.mark.parametrize("broken", ["plot", "steer"])
def test_a_sweep_shows_its_points_even_if_a_file_cannot_be_written(
    folder: Path, fake_engine: FakeEngine, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SteerError("no space left")

    if broken == "steer":
        monkeypatch.setattr(sweep_run, "save_steer", full)
    else:
        monkeypatch.setattr("vllm_steer.sweep.report.draw", full)
    plot = folder / "sweep.png"
    line = ["sweep", "m", folder / "v", "--prompts", folder / "prompts.txt", "--strengths", "2"]
    line += ["--judge", f"lexicon:{folder / 'words.yaml'}", "--budget", 1.35, "--json", "--write"]
    result = CliRunner().invoke(app, [str(part) for part in [*line, "--plot", plot]])
    assert isinstance(result.exception, SteerError)
    actual = json.loads(result.stdout)
    assert actual["chosen"]["strength"] == 2.0
    assert actual["written"] == (str(folder / "v") if broken == "plot" else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "luck"], "search is 'luck'; allowed: grid, bisection"),
        (["--search", "grid"], "a grid takes strengths such as"),
        (["--strengths", "0,-0.0"], "strengths are '0,-0.0'; a grid needs one other than 0"),
        (["--strengths", "1", "--rounds", "3"], "a grid takes .* no range and no rounds"),
        (["--search", "bisection", "--strengths", "1"], "a bisection takes a range"),
        (["--range", "5:1"], "from a strength near 0 to one further away"),
        (["--direction", "left"], "direction is 'left'; allowed: up, down"),
        (["--judge", "diversity"], "judge diversity measures no effect; a sweep needs one"),
        (["--layers", "top:1"], "top:k needs layer_scores, and the steer has none"),
    ],
)
def test_an_invalid_sweep_is_refused(
    folder: Path, fake_engine: FakeEngine, options: list[str], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        sweep(folder, *options)
    assert not fake_engine.requests


def test_the_end_says_what_was_generated_now(folder: Path, fake_engine: FakeEngine) -> None:
    assert re.search(
        r"^generated 200 texts, 0 tokens in .* texts/s.*; judged in", evaluate(folder).stderr, re.M
    )
    assert "generated no new texts; judged in" in evaluate(folder).stderr
    more = evaluate(folder, "--json", strengths="-2,2,4")
    assert "generated 80 texts" in more.stderr and "generated" not in more.stdout
    completed = sweep(folder, "--strengths", "1,4", "--budget", 2, "--samples", 20)
    assert re.search(r"^generated 120 texts, .*; judged in", completed.stderr, re.M)
