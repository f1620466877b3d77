"""Steers that are loaded into a running engine, compared with Hugging Face in float64."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    GUIDED,
    Setting,
    doses_of,
    engine,
    greedy,
    guided_family,
    load_into,
    prompts,
    random_steers,
    steer_config,
)
from reference import assert_guided, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

from vllm_steer import (
    DeltaSteer,
    LMSteer,
    SteerError,
    VectorSteer,
    steers_of,
    unload_steer_from,
)

pytestmark = pytest.mark.engine

ROOM = {
    "lm_steers": 4,
    "max_rank": 48,
    "offsets": 1,
    "vectors": 3,
    "delta_steps": 9,
    "sites": ["attn_in", "attn_out", "heads", "resid"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=GUIDED_LAYERS)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return load_reference(model)


@contextmanager
def loading_engine(model: Path, room: Mapping[str, Any], **options: Any) -> Iterator[Any]:
    config = {"runtime": {"enabled": True, "room": room}}
    with engine(model, config, **options) as llm:
        yield llm


def push(seed: int) -> VectorSteer:
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(seed)) / 2
    return VectorSteer(vectors=vectors, layers=(0, 1))


def serve(llm: Any, settings: tuple[Setting, ...], **options: Any) -> list[Any]:
    params = greedy(settings, prompt_logprobs=1, **options)
    outputs: list[Any] = llm.generate(prompts(len(settings)), params, use_tqdm=False)
    return outputs


def test_steers_of_every_kind_that_are_loaded_steer_as_their_formulas_say(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    _, steers = guided_family("llama")
    with loading_engine(model, ROOM) as llm:
        before = serve(llm, ({},))
        for round_ in range(2):  # the second time into places that others have had
            load_into(llm, tmp_path / str(round_), steers)
            listed = {entry["id"]: entry for entry in steers_of(llm)}
            assert listed.keys() == steers.keys()
            assert all(entry["source"] == "runtime" for entry in listed.values())
            for output, setting in zip(serve(llm, GUIDED), GUIDED, strict=True):
                assert_guided(output, reference, doses_of(setting, steers), steers)
                shown = [applied.name for applied in output.applied_steers]
                assert shown == [name for name, value in setting.items() if _strength(value)]
            for name in steers:
                unload_steer_from(llm, name)
            steers = dict(reversed(steers.items()))
        assert steers_of(llm) == []
        with pytest.raises(ValueError, match="steer 'push' is unknown"):
            serve(llm, ({"push": 1.0},))
        after = serve(llm, ({},))
    assert after[0].outputs[0].token_ids == before[0].outputs[0].token_ids


def _strength(value: Any) -> Any:
    return value["strength"] if isinstance(value, Mapping) else value


def test_requests_keep_the_steer_that_they_were_admitted_with(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    old, new, other = push(1), push(2), push(3)
    setting, prompt = {"push": 1.5}, prompts(1)[0]
    params = greedy((setting,), max_tokens=24)[0]
    with loading_engine(model, {**ROOM, "vectors": 2}) as llm:
        llm_engine, outputs = llm.llm_engine, {}

        def step(times: int = 1) -> None:
            for _ in range(times):
                for output in llm_engine.step():
                    if output.finished:
                        outputs[output.request_id] = output

        load_into(llm, tmp_path, {"push": old})
        llm_engine.add_request("old", prompt, params)
        step(5)
        load_into(llm, tmp_path, {"push": new}, load_inplace=True)
        llm_engine.add_request("new", prompt, params)
        step(3)
        counts = {entry["id"]: entry["in_use"] for entry in steers_of(llm)}
        assert counts == {"push": 1}  # one each of the old and of the new one
        with pytest.raises(SteerError, match="all of the room is in use: no one of the 2 vectors"):
            load_into(llm, tmp_path, {"other": other})
        unload_steer_from(llm, "push")
        with pytest.raises(SteerError, match="all of the room is in use"):
            load_into(llm, tmp_path, {"other": other})
        while llm_engine.has_unfinished_requests():
            step()
        load_into(llm, tmp_path, {"other": other, "third": push(4)})
        (last,) = serve(llm, ({"other": 1.5},))
    for name, steer in (("old", old), ("new", new)):
        assert_guided(outputs[name], reference, doses_of(setting, {"push": steer}), {"push": steer})
    assert outputs["old"].applied_steers[0].digest != outputs["new"].applied_steers[0].digest
    assert_guided(last, reference, doses_of({"other": 1.5}, {"other": other}), {"other": other})


@pytest.mark.matrix
def test_a_replaced_steer_reads_no_block_of_the_one_before_it(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    prompt = prompts(1, length=40)
    with loading_engine(model, ROOM, block_size=32) as llm:
        for seed in (1, 2, 1):
            steers = {"push": push(seed)}
            load_into(llm, tmp_path, steers, load_inplace=True)
            for _ in range(2):
                (output,) = llm.generate(prompt, greedy(({"push": 2.0},)), use_tqdm=False)
                assert_guided(output, reference, doses_of({"push": 2.0}, steers), steers)


@pytest.mark.matrix
def test_replacement_while_requests_are_preempted(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    settings = tuple({"push": 0.5 + 0.25 * index} for index in range(6))
    options = {"num_gpu_blocks_override": 10, "block_size": 32, "max_num_seqs": 8}
    with loading_engine(model, ROOM, **options) as llm:
        llm_engine, outputs, used = llm.llm_engine, {}, {}
        params = greedy(settings, max_tokens=40)
        for index, prompt in enumerate(prompts(len(settings), length=20)):
            used[str(index)] = push(index % 3)
            load_into(llm, tmp_path, {"push": used[str(index)]}, load_inplace=True)
            llm_engine.add_request(str(index), prompt, params[index])
            for _ in range(4):
                outputs |= {o.request_id: o for o in llm_engine.step() if o.finished}
        while llm_engine.has_unfinished_requests():
            outputs |= {o.request_id: o for o in llm_engine.step() if o.finished}
        preempted = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert preempted > 0
    for index, setting in enumerate(settings):
        steers = {"push": used[str(index)]}
        assert_guided(outputs[str(index)], reference, doses_of(setting, steers), steers)


@pytest.mark.matrix
def test_steers_that_do_not_fit_change_nothing(model: Path, tmp_path: Path) -> None:
    steer = push(1)
    unfit = {
        "layers are 7": VectorSteer(vectors=steer.vectors[:1], layers=(7,)),
        "hidden size is": VectorSteer(vectors=torch.ones(2, HIDDEN + 1), layers=(0, 1)),
        "no room for vectors at attn_out": VectorSteer(
            vectors=steer.vectors, layers=(0, 1), site="attn_out"
        ),
        "its mode is rotate": VectorSteer(vectors=steer.vectors, layers=(0, 1), mode="rotate"),
        "no room for 12 delta_steps": DeltaSteer(
            delta=torch.ones(12, 2, HIDDEN), layers=(0, 1), site="resid"
        ),
        "its rank over all columns is 60": LMSteer(
            variant="multiply",
            projector1=torch.ones(1, HIDDEN, 60),
            projector2=torch.ones(1, HIDDEN, 60),
            epsilon=0.1,
            hidden_size=HIDDEN,
        ),
        "no room for offsets": random_steers(HIDDEN, VOCAB)["tilt"],
    }
    room = {**ROOM, "sites": ["resid"], "modes": ["add"], "offsets": 0}
    with loading_engine(model, room) as llm:
        load_into(llm, tmp_path, {"push": steer})
        before = serve(llm, ({"push": 1.0},))[0].outputs[0].token_ids
        for message, other in unfit.items():
            with pytest.raises(SteerError, match=message):
                load_into(llm, tmp_path / "other", {"push": other}, load_inplace=True)
        with pytest.raises(SteerError, match="steer push is loaded already; unload it first"):
            load_into(llm, tmp_path, {"push": steer})
        with pytest.raises(SteerError, match="no steer gone was loaded at run time; loaded: push"):
            unload_steer_from(llm, "gone")
        assert serve(llm, ({"push": 1.0},))[0].outputs[0].token_ids == before


@pytest.mark.matrix
def test_steers_of_a_config_and_loaded_ones_side_by_side(
    model: Path, reference: Any, tmp_path: Path
) -> None:
    _, steers = guided_family("llama")
    names = sorted(steers)
    of_config = {name: steers[name] for name in names[::2]}
    loaded = {name: steers[name] for name in names[1::2]}
    config = steer_config(of_config, tmp_path / "config")
    with engine(model, {**config, "runtime": {"enabled": True, "room": ROOM}}) as llm:
        load_into(llm, tmp_path / "loaded", loaded)
        sources = {entry["id"]: entry["source"] for entry in steers_of(llm)}
        assert sources == {n: "config" if n in of_config else "runtime" for n in names}
        for output, setting in zip(serve(llm, GUIDED), GUIDED, strict=True):
            assert_guided(output, reference, doses_of(setting, steers), steers)
        name = next(iter(of_config))
        with pytest.raises(SteerError, match=f"{name} is a steer of the steer config"):
            load_into(llm, tmp_path / "loaded", {name: steers[name]}, load_inplace=True)
        with pytest.raises(SteerError, match=f"{name} is a steer of the steer config"):
            unload_steer_from(llm, name)


@pytest.mark.matrix
def test_an_engine_without_room_says_so(model: Path, tmp_path: Path) -> None:
    with (
        engine(model, steer_config({"push": push(1)}, tmp_path)) as llm,
        pytest.raises(SteerError, match="give it a steer config with runtime"),
    ):
        load_into(llm, tmp_path, {"more": push(2)})
