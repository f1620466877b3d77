"""``vllm-steer compare`` with a fake engine: the run and its report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparison_tools import TEXTS, FakeEngine, FakePerplexity
from matplotlib.axes import Axes
from typer.testing import CliRunner

from vllm_steer import DeltaSteer, SteerError, VectorSteer, save_steer
from vllm_steer.cli import app
from vllm_steer.evaluation import missing_texts


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(missing_texts, "engine", engine.engine)
    from vllm_steer.evaluation import judges

    monkeypatch.setitem(judges._BUILDERS, "perplexity", lambda *_: FakePerplexity())  # type: ignore[index]
    return engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a delta ``a``, a vector ``b``, prompts and lexicons."""
    save_steer(DeltaSteer(delta=torch.ones(4, 1, 3), layers=(0,)), tmp_path / "a")
    save_steer(VectorSteer(vectors=torch.ones(1, 3), layers=(0,)), tmp_path / "b")
    (tmp_path / "prompts.txt").write_text("It was\nShe was\n")
    (tmp_path / "others.txt").write_text("He was\n")
    (tmp_path / "a.yaml").write_text("positive: [oui]\nnegative: ['no']\n")
    (tmp_path / "b.yaml").write_text("positive: [good]\nnegative: [bad]\n")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changed: Any) -> None:
    properties = {
        name: {
            "steer": name,
            "judge": f"lexicon:{folder / f'{name}.yaml'}",
            "strengths": strengths,
            "max": [4, 8],
        }
        for name, strengths in (("a", [2, 4]), ("b", [4]))
    }
    content = {"properties": properties, "seen": ["a", "b"], "unseen": "a+b", **changed}
    (folder / "asked.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def compare(folder: Path, *options: Any, plot: bool = False) -> Any:
    line = ["compare", "m", folder / "asked.yaml", "--prompts", folder / "prompts.txt"]
    line += ["--out", folder / "run", "--samples", TEXTS, *options]
    line += [] if plot else ["--no-plot"]
    result = CliRunner().invoke(app, [str(part) for part in line])
    if isinstance(result.exception, SteerError):
        raise result.exception
    return result


def rows(report: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {(row["combination"], row["method"]): row for row in report["rows"]}


def test_strengths_are_chosen_on_seen_combinations_and_reused_for_unseen_ones(
    folder: Path, fake_engine: FakeEngine
) -> None:
    completed = compare(folder, "--json", "--choose-prompts", folder / "others.txt")
    report = json.loads(completed.stdout)
    fixed = {"a": {"strength": 4.0, "schedule": "fixed"}, "b": {"strength": 4.0}}
    assert report["chosen"]["fixed"] == fixed
    assert {dose["max"] for dose in report["chosen"]["dynamic"].values()} == {8.0}
    result = rows(report)
    assert result["a", "fixed"]["all"] == 1.0 and result["a", "fixed"]["share"] == {"a": 1.0}
    assert result["a+b", "fixed"]["all"] == 0.75 and not result["a+b", "fixed"]["seen"]
    assert result["a+b", "dynamic"]["all"] == 1.0
    assert result["a+b", "none"]["all"] == 0.0
    # SelectedStrengths on the other prompts alone, reported on these alone.
    prompts_by_steers = {steer and tuple(steer): set() for _, steer in fake_engine.requests}
    for prompts, steer in fake_engine.requests:
        prompts_by_steers[steer and tuple(steer)].add(prompts)
    assert prompts_by_steers["a", "b"] == {("It was", "She was")}
    assert prompts_by_steers[None] == {("It was", "She was")}
    assert prompts_by_steers[("a",)] == {("He was",), ("It was", "She was")}


def test_figures_are_computed_from_the_texts(folder: Path, fake_engine: FakeEngine) -> None:
    result = rows(json.loads(compare(folder, "--json").stdout))
    figures = result["a+b", "fixed"]["figures"]
    assert figures["perplexity:m"]["total_perplexity"] == 2 + 3
    # Of the four seeds, the same for both prompts, three have both: 1, 1, 1, 0.
    assert result["a+b", "fixed"]["all_error"] == pytest.approx(0.5 / math.sqrt(4))
    assert result["a+b", "fixed"]["share_error"] == pytest.approx({"a": 0.25, "b": 0.0})
    assert "│ 0.750 ± 0.2 │ 0.750 ± 0.2 │ 1.000 │" in compare(folder).stdout
    # Two words, the first one empty, and two more, in each of four texts: " oui good" three
    # times and " no good": 2-grams are ("", oui), (oui, good), ("", no), (no, good).
    assert figures["diversity"]["dist-2"] == pytest.approx(4 / 12)


def test_a_row_without_results_names_the_reason(folder: Path, fake_engine: FakeEngine) -> None:
    completed = compare(folder, "--json")
    report = json.loads(completed.stdout)
    assert [(a["combination"], a["method"]) for a in report["absent"]] == [
        ("b", "start"),
        ("b", "dim"),
    ]
    assert "missing: start of b: does not apply: start and dim are schedules" in completed.stderr
    assert (
        "missing: dPPL of a, b, a+b: no prompts with demonstrations were given" in completed.stderr
    )
    assert set(rows(report)) == {
        *((c, m) for c in ("a", "b", "a+b") for m in ("none", "fixed", "dynamic")),
        *((c, m) for c in ("a", "a+b") for m in ("start", "dim")),
        *((c, "best fixed") for c in ("a", "b")),
    }


def test_strengths_come_back_with_the_texts_and_as_curves(
    folder: Path, fake_engine: FakeEngine
) -> None:
    compare(folder, plot=True)
    run = folder / "run"
    strengths = json.loads((run / "strengths.json").read_text())
    assert strengths["a+b"]["b"] == [[[2.0, 1.0]] * TEXTS] * 2
    row = rows(json.loads((run / "report.json").read_text()))["a+b", "dynamic"]
    curve = {"mean": [2, 1], "lower": [2, 1], "upper": [2, 1], "texts": [8, 8]}
    assert row["strength_over_tokens"] == {"a": curve, "b": curve}
    (path,) = (run / "generations").glob("test.a+b.dynamic.*.jsonl")
    first_line = json.loads(path.read_text().splitlines()[0])
    assert first_line["generations"][0]["steer_strengths"] == {"a": [2.0, 1.0], "b": [2.0, 1.0]}
    for name in ("report.png", "strengths.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert "## a+b (unseen)" in (run / "report.md").read_text()


def test_an_interrupted_comparison_continues_and_accepts_more_methods(
    folder: Path, fake_engine: FakeEngine
) -> None:
    fake_engine.fails_after = 3
    assert compare(folder).exit_code != 0
    assert not (folder / "run" / "report.json").exists()
    fake_engine.fails_after = 1000
    compare(folder)
    num_requests = len(fake_engine.requests)
    compare(folder)
    assert len(fake_engine.requests) == num_requests
    write(folder, unseen=[], seen=["a", "b", "a+b"])
    compare(folder, "--tolerance", "0.1")
    new = [steer for _, steer in fake_engine.requests[num_requests:]]
    assert new and all(set(steer) == {"a", "b"} for steer in new)


def test_other_prompts_are_another_comparison(folder: Path, fake_engine: FakeEngine) -> None:
    compare(folder)
    with pytest.raises(SteerError, match=r"choosing_prompts was None and is now \{'file'"):
        compare(folder, "--choose-prompts", folder / "others.txt")
    save_steer(VectorSteer(vectors=-torch.ones(1, 3), layers=(0,)), folder / "b")
    with pytest.raises(SteerError, match=r"different steers\.b\.sha256"):
        compare(folder)
    assert compare(folder, "--restart").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "-1"], "tolerance is -1.0; expected a share of the texts"),
        (["--judge", "taste"], "judge 'taste' is unknown"),
    ],
)
def test_errors_are_reported_before_anything_is_written(
    folder: Path, fake_engine: FakeEngine, options: list[str], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        compare(folder, *options)
    assert not fake_engine.requests and not (folder / "run").exists()


def test_an_invalid_dose_is_refused_first(folder: Path, fake_engine: FakeEngine) -> None:
    content = yaml.safe_load((folder / "asked.yaml").read_text())
    content["properties"]["a"]["layers"] = "7"
    (folder / "asked.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SteerError, match="layers 7 are not in this steer"):
        compare(folder)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("more", [[], ["--strengths", "1"]], ids=["none", "strengths"])
def test_eval_of_a_file_of_properties_says_which_command_is_for_it(
    folder: Path, more: list[str]
) -> None:
    line = ["eval", "m", str(folder / "asked.yaml"), "--prompts", "p.txt", "--out", "run", *more]
    result = CliRunner().invoke(app, line)
    assert isinstance(result.exception, SteerError)
    assert "for a file of properties use vllm-steer compare" in str(result.exception)


def test_the_picture_has_one_point_per_method_at_its_share(
    folder: Path, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    plot = Axes.plot

    def noted(axis: Axes, *args: Any, **options: Any) -> Any:
        if len(args) == 3 and len(args[0]) == 1:  # not a line over tokens
            points.setdefault(options["label"], []).extend(zip(args[0], args[1], strict=True))
        return plot(axis, *args, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    compare(folder, plot=True)
    report = json.loads((folder / "run" / "report.json").read_text())
    shares = [row["all"] for row in report["rows"] if row["method"] == "fixed"]
    assert [share for _, share in points["fixed"]] == shares
