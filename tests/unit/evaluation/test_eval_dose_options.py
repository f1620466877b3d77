"""Windows, bounds and conditions in ``vllm-steer eval``, ``sweep`` and ``compare``."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from eval_tools import FakeEngine
from typer.testing import CliRunner

from vllm_steer import SteerError, VectorSteer, load_steer, save_steer
from vllm_steer.cli import app
from vllm_steer.evaluation.composition.candidates import choices
from vllm_steer.evaluation.composition.settings import check_doses
from vllm_steer.evaluation.composition.spec import ComparisonSpec
from vllm_steer.evaluation.dose_options import load_conditions
from vllm_steer.steers import ConditionSteer
from vllm_steer.steers.content import content_digest


@pytest.fixture
def harmful(folder: Path) -> Path:
    """A condition on layer 1, beside a vector of layers 0 to 3 that is ``v``."""
    path = folder / "harmful.safetensors"
    save_steer(ConditionSteer(vector=torch.ones(1, 3), layers=(1,), threshold=0.25), path)
    return path


def call(name: str, folder: Path, *options: Any) -> Any:
    line = [name, "m", folder / "v", "--prompts", folder / "prompts.txt", *options]
    result = CliRunner().invoke(app, [str(part) for part in line])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def evaluate(folder: Path, *options: Any) -> Any:
    judge = ("--judge", f"lexicon:{folder / 'words.yaml'}", "--samples", 20, "--no-plot")
    line = ("--strengths", "2", "--out", folder / "run", "--json")
    return json.loads(call("eval", folder, *line, *judge, *options).stdout)


def test_windows_are_given_as_json(folder: Path, fake_engine: FakeEngine) -> None:
    windows = {"prompt": ["-4:", ":1"], "answer": "0:8"}
    report = evaluate(folder, "--phase", json.dumps(windows))
    assert fake_engine.requests[1] == {"steer": {"strength": 2.0, "phase": windows}}
    assert report["steer"]["phase"] == windows
    with pytest.raises(SteerError, match=r"--phase is not JSON"):
        evaluate(folder, "--phase", "{answer: 0:8}")
    with pytest.raises(SteerError, match="has the answer window '-1:'"):
        evaluate(folder, "--phase", '{"answer": "-1:"}')


def test_bounds_are_passed_on(folder: Path, fake_engine: FakeEngine) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 3), layers=(2,), mode="project")
    save_steer(steer, folder / "v")
    evaluate(folder, "--low", "-inf", "--high", "0.5")
    assert fake_engine.requests[-1] == {"random": {"strength": 2.0, "low": "-inf", "high": "0.5"}}
    assert load_steer(fake_engine.files["random"]).mode == "project"


def test_a_steer_and_its_control_are_gated_by_conditions(
    folder: Path, fake_engine: FakeEngine, harmful: Path
) -> None:
    when = ("--condition", f"harmful={harmful}", "--when", "harmful", "--layers", "2-3")
    report = evaluate(folder, *when)
    dose = {"strength": 2.0, "layers": "2-3", "when": "harmful"}
    assert fake_engine.requests == [None, {"steer": dose}, {"random": dose}]
    assert fake_engine.files["harmful"] == harmful
    assert report["conditions"] == {
        "harmful": {"file": harmful.name, "sha256": content_digest(load_steer(harmful))}
    }
    save_steer(ConditionSteer(vector=torch.ones(1, 3), layers=(1,), threshold=0.5), harmful)
    with pytest.raises(SteerError, match="other settings: different conditions"):
        evaluate(folder, *when)


def test_any_of_several_conditions_is_given_as_json(
    folder: Path, fake_engine: FakeEngine, harmful: Path
) -> None:
    gate = {"any": ["a", "b"]}
    conditions = ("--condition", f"a={harmful}", "--condition", f"b={harmful}")
    evaluate(folder, *conditions, "--when", json.dumps(gate), "--phase", "generation")
    dose = {"strength": 2.0, "phase": "generation", "when": gate}
    assert fake_engine.requests[1] == {"steer": dose}


def test_conditions_that_cannot_work_are_refused_before_anything_is_generated(
    folder: Path, fake_engine: FakeEngine, harmful: Path
) -> None:
    given = ("--condition", f"h={harmful}")
    with pytest.raises(SteerError, match="has when 'x', which is no condition; conditions: h"):
        evaluate(folder, *given, "--when", "x")
    with pytest.raises(SteerError, match="too late for the first token of the answer"):
        evaluate(folder, *given, "--when", "h")
    with pytest.raises(SteerError, match="condition steer has the name of a steer"):
        evaluate(folder, "--condition", f"steer={harmful}")
    with pytest.raises(SteerError, match=r"condition v: .* is of kind vector; expected"):
        evaluate(folder, "--condition", f"v={folder / 'v'}")
    for wrong in ("harmful", "=file", "name="):
        with pytest.raises(SteerError, match=f"condition is '{wrong}'; expected NAME=FILE"):
            evaluate(folder, "--condition", wrong)
    with pytest.raises(SteerError, match="condition h is given twice"):
        evaluate(folder, *given, *given)
    with pytest.raises(SteerError, match="'a b' is not a valid name"):
        load_conditions({"a b": harmful})
    save_steer(load_steer(harmful), folder / "v")
    with pytest.raises(SteerError, match="steer steer is a condition, which changes nothing"):
        evaluate(folder)
    assert not fake_engine.requests


def test_a_sweep_takes_windows_and_conditions(
    folder: Path, fake_engine: FakeEngine, harmful: Path
) -> None:
    options = ("--condition", f"harmful={harmful}", "--when", "harmful", "--layers", "2-3;3")
    line = ("--judge", f"lexicon:{folder / 'words.yaml'}", "--strengths", "1,2", "--json")
    phase = ("--phase", '{"answer": "0:4"}')
    call("sweep", folder, *line, *options, *phase, "--write", "--budget", 1.35)
    common = {"phase": {"answer": "0:4"}, "when": "harmful"}
    assert fake_engine.requests[1:3] == [
        {"steer": {"strength": 1.0, **common, "layers": "2-3"}},
        {"steer": {"strength": 2.0, **common, "layers": "2-3"}},
    ]
    assert fake_engine.files["harmful"] == harmful
    settings = load_steer(folder / "v").recipe["sweep"]["settings"]
    assert settings["options"] == common and set(settings["conditions"]) == {"harmful"}


FR = {"steer": "fr.st", "judge": "lexicon:embedded:language=fr", "strengths": [1]}
VECTOR = VectorSteer(vectors=torch.ones(1, 3), layers=(2,), mode="project")


def spec_of(folder: Path, changed: dict[str, Any], **others: Any) -> ComparisonSpec:
    path = folder / "asked.yaml"
    content = {"properties": {"fr": {**FR, **changed}}, "seen": ["fr"], **others}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return ComparisonSpec.load(path)


def test_a_property_of_a_comparison_has_the_options_of_a_request(tmp_path: Path) -> None:
    options = {"phase": {"answer": "0:8"}, "high": 0.5, "when": {"all": ["a", "b"]}}
    spec = spec_of(
        tmp_path,
        {**options, "low": -math.inf, "dynamic": False},
        conditions={"a": "a.st", "b": "b.st"},
    )
    assert spec.conditions == {"a": tmp_path / "a.st", "b": tmp_path / "b.st"}
    (choice,) = choices("fixed", spec, {"fr": VECTOR})
    assert dict(choice.doses) == {"fr": {"strength": 1, **options, "low": "-inf"}}
    condition = ConditionSteer(vector=torch.ones(1, 3), layers=(1,), threshold=0.0)
    check_doses(spec, {"fr": VECTOR}, {"a": condition, "b": condition})
    with pytest.raises(SteerError, match="has when 'b', which is no condition"):
        check_doses(spec, {"fr": VECTOR}, {"a": condition})


@pytest.mark.parametrize("option", [{"when": "a"}, {"low": 0}, {"high": math.inf}], ids=str)
def test_a_property_with_a_condition_or_bounds_has_no_dynamic_strength(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    with pytest.raises(SteerError, match="which a dynamic strength does not have; give it dynamic"):
        spec_of(tmp_path, option)
    assert spec_of(tmp_path, option, methods=["fixed"]).properties["fr"].options
    assert spec_of(tmp_path, {**option, "dynamic": False}).properties["fr"].options
