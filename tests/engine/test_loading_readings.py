"""Steers that read the token, and conditions, loaded at run time, compared with float64."""

from pathlib import Path
from typing import Any

import pytest
from engines import (
    READING,
    RUNNER,
    conditions,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    load_into,
    prompts,
    random_steers,
    reading_steers,
    steer_config,
)
from reference import assert_guided, load_reference
from scenarios import run_scenario
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

from vllm_steer import Steer, SteerError, steers_of, unload_steer_from

pytestmark = pytest.mark.engine

ROOM = {
    "lm_steers": 4,
    "max_rank": 48,
    "offsets": 1,
    "vectors": 8,
    "delta_steps": 9,
    "low_rank_maps": 2,
    "max_map_rank": 6,
    "conditions": 4,
    "sites": ["attn_in", "attn_out", "heads", "resid"],
    "modes": ["add", "rotate", "project", "relative", "clamp", "scale"],
}
CONFIG = {"runtime": {"enabled": True, "room": ROOM}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=GUIDED_LAYERS)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return load_reference(model)


def every_steer(seed: int = 8) -> dict[str, Steer]:
    return {
        **random_steers(HIDDEN, VOCAB),
        **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN),
        **reading_steers(HIDDEN, GUIDED_LAYERS, seed),
        **conditions(HIDDEN, GUIDED_LAYERS, seed + 1),
    }


def assert_served(llm: Any, reference: Any, steers: dict[str, Steer], **options: Any) -> None:
    outputs = llm.generate(
        prompts(len(READING)), greedy(READING, max_tokens=10, **options), use_tqdm=False
    )
    for output, setting in zip(outputs, READING, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


def test_every_way_that_is_loaded_steers_as_its_formula_says(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    """The second time other steers, in places that the first ones have left in another order."""
    with engine(model, CONFIG) as llm:
        for round_ in range(2):
            steers = every_steer(seed=8 + 100 * round_)
            if round_:
                steers = dict(reversed(steers.items()))
            load_into(llm, tmp_path / str(round_), steers)
            listed = {entry["id"]: entry["source"] for entry in steers_of(llm)}
            assert listed == dict.fromkeys(steers, "runtime")
            assert_served(llm, reference, steers)
            for name in steers:
                unload_steer_from(llm, name)
        assert steers_of(llm) == []


def test_a_request_keeps_the_condition_that_it_was_admitted_with(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    """Through a replacement by the opposite condition, while the prompt is computed in chunks."""
    pushes = {name: every_steer()[name] for name in ("push", "plain")}
    found = conditions(HIDDEN, GUIDED_LAYERS)["early"]
    opposite = type(found)(**{**vars(found), "side": "below"})
    setting = {name: {"strength": 2.0, "when": "early"} for name in pushes}
    prompt = prompts(1, length=90)[0]
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "block_size": 32}
    with engine(
        model, {"runtime": {"enabled": True, "room": {**ROOM, "conditions": 2}}}, **options
    ) as llm:
        llm_engine, outputs = llm.llm_engine, {}
        load_into(llm, tmp_path, {**pushes, "early": found})
        for name, condition in {"first": opposite, "second": found}.items():
            llm_engine.add_request(name, prompt, greedy((setting,), max_tokens=12)[0])
            llm_engine.step()
            in_use = {entry["id"]: entry["in_use"] for entry in steers_of(llm)}
            assert in_use["early"] == 1
            load_into(llm, tmp_path, {"early": condition}, load_inplace=True)
        other = conditions(HIDDEN, GUIDED_LAYERS, seed=50)["late"]
        with pytest.raises(SteerError, match="no one of the 2 conditions at resid is free"):
            load_into(llm, tmp_path, {"late": other})
        while llm_engine.has_unfinished_requests():
            outputs |= {o.request_id: o for o in llm_engine.step() if o.finished}
        load_into(llm, tmp_path, {"late": other})
    for name, condition in {"first": found, "second": opposite}.items():
        steers = {**pushes, "early": condition}
        assert_guided(outputs[name], reference, doses_of(setting, steers), steers)
    assert outputs["first"].outputs[0].token_ids != outputs["second"].outputs[0].token_ids


@pytest.mark.matrix
def test_loaded_beside_those_of_a_config(model: Path, reference: Any, tmp_path: Path) -> None:
    """Steers of the config under loaded conditions, and the other way round."""
    steers = every_steer()
    of_config = {name: steer for i, (name, steer) in enumerate(steers.items()) if i % 2}
    config = steer_config(of_config, tmp_path / "config")
    with engine(model, {**config, **CONFIG}) as llm:
        load_into(llm, tmp_path / "loaded", {n: s for n, s in steers.items() if n not in of_config})
        assert_served(llm, reference, steers)


@pytest.mark.matrix
def test_what_has_no_room_changes_nothing(model: Path, tmp_path: Path) -> None:
    steers = every_steer()
    room = {"vectors": 2, "modes": ["add"], "low_rank_maps": 1, "max_map_rank": 3, "lm_steers": 0}
    unfit = {
        "ablate": "its mode is project; runtime.room.modes has add",
        "pin": "its mode is clamp; runtime.room.modes has add",
        "loreft": "its rank is 4; runtime.room.max_map_rank is 3",
        "linear": "there is no room for low_rank_maps at attn_out",
        "early": "there is no room for conditions at resid",
    }
    with engine(model, {"runtime": {"enabled": True, "room": room}}) as llm:
        for name, message in unfit.items():
            with pytest.raises(SteerError, match=message):
                load_into(llm, tmp_path, {name: steers[name]})
        assert steers_of(llm) == []
        load_into(llm, tmp_path, {"feature": steers["feature"]})  # one that only adds reads nothing


@pytest.mark.matrix
def test_layers_all_takes_none_that_has_no_room(model: Path, tmp_path: Path) -> None:
    room = {**ROOM, "layers": "1", "sites": ["resid"]}
    steers = {name: every_steer()[name] for name in ("push", "pin", "loreft", "early")}
    with engine(model, {"runtime": {"enabled": True, "room": room}}) as llm:
        for name, steer in steers.items():
            options = {"layers": "all"} if name != "early" else {}
            with pytest.raises(SteerError, match=r"runtime.room has no room in layers \[0"):
                load_into(llm, tmp_path, {name: steer}, **options)
        assert steers_of(llm) == []


@pytest.mark.matrix
@pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")
def test_two_tensor_parallel_ranks() -> None:
    report = run_scenario("loaded-readings-on-tensor-ranks", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert f"{2 * len(READING)} outputs equal" in report
