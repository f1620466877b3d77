"""``layers: all`` in the steer config: a steer in those of its layers that have its site."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.distributed.parallel_state
from guidance import WIDTH, delta, vector
from torch import nn

from vllm_steer import SteerConfig, SteerError, save_steer
from vllm_steer.errors import SteerRequestError
from vllm_steer.families import Family
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.model_sites import ModelSites

REASON = "the layer has no attention that returns a tensor"


@pytest.fixture(autouse=True)
def _one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = SimpleNamespace(world_size=1)
    monkeypatch.setattr(vllm.distributed.parallel_state, "get_pp_group", lambda: stage)


def sites(*lacking: int) -> ModelSites:
    """Four layers; some lack the site attn_out."""
    reasons = {layer: {"attn_out": REASON} for layer in lacking}
    return ModelSites(nn.ModuleList(), dict.fromkeys(range(4), Family()), reasons)


def plan_of(steer: Any, folder: Path, **entry: Any) -> SteerPlan:
    save_steer(steer, folder / "a.safetensors")
    config = {"steers": {"a": {"path": str(folder / "a.safetensors"), **entry}}}
    return SteerPlan.of(SteerConfig.load(config))


def test_layers_without_the_site_are_left_out() -> None:
    steer = vector((0, 1, 3), site="attn_out")
    kept = sites(1).where_present("a", steer)
    assert kept.layers == (0, 3)
    assert kept.vectors.tolist() == steer.vectors[[0, 2]].tolist()
    sites(1).check({"a": kept})
    with pytest.raises(SteerError, match=r"cannot be steered in layer 1: .*: 0,2-3;"):
        sites(1).check({"a": steer})
    assert sites(2).where_present("a", steer).layers == (0, 1, 3)


def test_a_steer_with_no_layer_left_stops_the_start() -> None:
    steer = vector((0, 1), site="attn_out")
    with pytest.raises(SteerError, match=f"none of its layers 0-1 has the site attn_out: {REASON}"):
        sites(0, 1).where_present("a", steer)


def test_the_plan_carries_it_and_the_steer_keeps_its_layers(tmp_path: Path) -> None:
    plan = plan_of(vector((0, 1, 3)), tmp_path, layers="all")
    restored = SteerPlan.from_json(plan.to_json()).steers["a"]
    assert restored.where_present and restored.layers == (0, 1, 3)
    assert restored.load().layers == (0, 1, 3)
    assert not plan_of(vector((0, 1, 3)), tmp_path).steers["a"].where_present


def test_a_request_cannot_choose_among_layers_that_the_start_has_chosen(tmp_path: Path) -> None:
    plan = plan_of(delta(3, (0, 1)), tmp_path, layers="all")
    assert plan.doses({"a": 2.0})[0].layers is None
    with pytest.raises(SteerRequestError, match="a request cannot choose among them; drop layers"):
        plan.doses({"a": {"strength": 2.0, "layers": "1"}})


def test_steers_at_the_head_have_no_layers(tmp_path: Path, make_steer: Any) -> None:
    steer = make_steer(rank=3, columns=1, hidden_size=WIDTH)
    with pytest.raises(SteerError, match="layers does not apply to a steer of kind lm_steer"):
        plan_of(steer, tmp_path, layers="all")


def test_the_plans_own_word_for_it_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="where_present is no key of a steer; write layers: all"):
        plan_of(vector((0, 1)), tmp_path, where_present=True)
