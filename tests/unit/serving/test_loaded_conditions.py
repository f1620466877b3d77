"""Conditions that are loaded at run time: what a request that names one keeps of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_tools import HIDDEN, engine_config
from loading_tools import loading_plan
from vllm import SamplingParams

from vllm_steer import SteerError
from vllm_steer.config import Limits, SteerEntry
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import PlannedSteer, plan_loaded
from vllm_steer.runtime.registry import Registry
from vllm_steer.serving.admission import admit_and_set_cache_key, reads_whole_prompt
from vllm_steer.serving.cache_key import SteeredSalt
from vllm_steer.serving.gates import GateTable
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import LOADED
from vllm_steer.serving.startup_checks import check_engine
from vllm_steer.steers import ConditionSteer, Steer, VectorSteer

GATED = {"push": {"strength": 2, "when": {"any": ["rude", "long"]}}}


def loaded(steer: Steer) -> PlannedSteer:
    entry = SteerEntry.model_validate({"path": "/x.safetensors"})
    return plan_loaded("x", entry, steer, Limits()).as_loaded


def condition(threshold: float, tokens: Any = "last") -> PlannedSteer:
    vector = torch.ones(1, HIDDEN)
    return loaded(ConditionSteer(vector=vector, layers=(0,), threshold=threshold, tokens=tokens))


def push() -> PlannedSteer:
    return loaded(VectorSteer(vectors=torch.ones(1, HIDDEN), layers=(1,)))


def plan(**room: int) -> SteerPlan:
    return loading_plan(room={"vectors": 2, "conditions": 2, **room})


def keys_of(plan: SteerPlan, folder: Path, steers: dict[str, PlannedSteer]) -> dict[str, str]:
    registry = Registry(folder)
    registry.write(steers)
    return dict(registry.names().loaded_by(GATED, plan))


def test_a_value_has_the_keys_of_the_conditions_that_it_names(tmp_path: Path) -> None:
    steers = {"push": push(), "rude": condition(0.1), "long": condition(0.2), "idle": push()}
    engine = plan()
    keys = keys_of(engine, tmp_path, steers)
    assert keys == {name: steers[name].key for name in ("push", "rude", "long")}
    (dose,) = engine.doses(GATED, keys)
    assert dose.gate is not None
    assert dose.gate.conditions == ("rude", "long")
    assert dose.gate.entries == (steers["rude"].key, steers["long"].key)
    assert engine.conditions_of(dose.gate) == [steers["rude"], steers["long"]]


def test_a_condition_that_is_gone_is_named_among_what_there_is(tmp_path: Path) -> None:
    engine = plan()
    keys = keys_of(engine, tmp_path, {"push": push(), "rude": condition(0.1)})
    with pytest.raises(SteerRequestError, match=r"when 'long', which is no condition.*: rude"):
        engine.doses(GATED, keys)


def test_tests_name_the_entry_of_a_loaded_condition(tmp_path: Path) -> None:
    steers = {"push": push(), "rude": condition(0.1, "any"), "long": condition(0.2)}
    engine = plan()
    doses = engine.doses(GATED, keys_of(engine, tmp_path, steers))
    tests = GateTable(engine, torch.device("cpu"), 2).take("a", doses, prompt_len=5).tests
    assert [(test.condition, test.span) for test in tests] == [
        (steers["rude"].key, (0, 5)),
        (steers["long"].key, (4, 5)),
    ]
    assert reads_whole_prompt(doses, engine)


def test_blocks_are_not_shared_with_a_condition_that_was_replaced(tmp_path: Path) -> None:
    digests = set()
    for threshold in (0.1, 0.2):
        steers = {"push": push(), "rude": condition(threshold), "long": condition(0.3)}
        config = SimpleNamespace(
            additional_config={"steer": plan().to_json()}, speculative_config=None
        )
        engine = plan_of(config)
        assert engine is not None
        keys = keys_of(engine, tmp_path, steers)
        params = SamplingParams(extra_args={"steer": GATED, LOADED: keys})
        request: Any = SimpleNamespace(
            sampling_params=params,
            prompt_token_ids=[1, 2, 3],
            prompt_embeds=None,
            cache_salt=None,
            mm_features=None,
        )
        admit_and_set_cache_key(request, config)
        assert isinstance(request.cache_salt, SteeredSalt)
        digests.update(key.digest for key in request.cache_salt.keys)
    assert len(digests) == 2


def test_room_for_conditions_is_refused_where_conditions_are() -> None:
    changed = {"parallel_config__pipeline_parallel_size": 2}
    with pytest.raises(SteerError, match="conditions do not work with pipeline parallelism"):
        check_engine(engine_config(plan(), **changed))
    check_engine(engine_config(plan(conditions=0), **changed))
