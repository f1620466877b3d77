"""Loading on all ranks of all engines, or on none; engines in which nothing of vLLM runs."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_tools import (
    fake_engines,
    lm_steer,
    loading_plan,
    replaced_attribute,
    steer_loading,
    vector,
)

from vllm_steer import LMSteer, SteerError, save_steer
from vllm_steer.runtime.refusal import Refused
from vllm_steer.runtime.registry import Registry
from vllm_steer.serving.request_args import RejectedSteer
from vllm_steer.serving.runtime import engine_core
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource


@pytest.fixture
def files(tmp_path: Path) -> list[SteerSource]:
    """Five different LM-Steers."""
    folder = tmp_path / "files"
    folder.mkdir()
    paths = [folder / f"{seed}.safetensors" for seed in range(5)]
    for seed, path in enumerate(paths):
        save_steer(lm_steer(seed), path)
    return [SteerSource(path, {}) for path in paths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loaded"
    folder.mkdir()
    return folder


def run(work: Any) -> Any:
    return asyncio.run(work)


def table_of(core: Any, rank: int = 0) -> Any:
    return core.workers[rank].head.hidden


def test_a_loaded_steer_is_in_the_tables_of_every_rank(
    folder: Path, files: list[SteerSource]
) -> None:
    plan = loading_plan()
    engines = fake_engines(plan, count=2)
    loading = steer_loading(plan, folder, engines)
    planned = run(loading.load("a", files[0], in_place=False))
    expected = lm_steer(0)
    assert isinstance(expected, LMSteer) and expected.projector1 is not None
    for core in engines.cores:
        assert core.contents() == [[planned.key], [planned.key]]
        table = table_of(core)
        slot = table.weights.slots[table.slots[planned.key]]
        assert torch.equal(table.weights.shrink[slot.start : slot.end], expected.projector1[0].T)
    assert loading.registry.names().steers == {"a": planned}
    assert [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] == []


@pytest.mark.parametrize("method", ["steer_read", "steer_ready", "steer_write"])
def test_a_rank_that_fails_leaves_the_old_state(
    folder: Path, files: list[SteerSource], method: str
) -> None:
    plan = loading_plan()
    engines = fake_engines(plan, count=2)
    loading = steer_loading(plan, folder, engines)
    before = run(loading.load("a", files[0], in_place=False))
    engines.cores[1].fail = method
    with pytest.raises(Refused, match="rank 1 has failed"):
        run(loading.load("a", files[1], in_place=True))
    engines.cores[1].fail = ""
    assert loading.registry.names().steers == {"a": before}
    assert all(before.key in rank for core in engines.cores for rank in core.contents())
    # the place is free again: both slots can be filled with other steers
    run(loading.load("b", files[2], in_place=False))
    with pytest.raises(Refused, match="all of the room is in use"):
        run(loading.load("c", files[3], in_place=False))


def test_no_rank_writes_before_all_have_read(folder: Path, files: list[SteerSource]) -> None:
    """A rank that wrote alone would wait for the others in a sum over all of them."""
    plan, calls, states = loading_plan(), list[str](), ["reading", "reading"]
    engines = fake_engines(plan)
    call = engines.cores[0].collective_rpc

    def slow(method: str, args: Any = ()) -> Any:
        calls.append(method)
        replies = call(method, args)
        if method == "steer_ready" and states:
            replies[1] = {"state": states.pop()}
        return replies

    engines.cores[0].collective_rpc = slow  # type: ignore[method-assign]
    run(steer_loading(plan, folder, engines).load("a", files[0], in_place=False))
    assert calls == ["steer_read", *["steer_ready"] * 3, "steer_write"]


def test_a_full_room_a_taken_name_and_an_unknown_one(
    folder: Path, files: list[SteerSource]
) -> None:
    loading = steer_loading(loading_plan(), folder)
    for name, file in zip("ab", files, strict=False):
        run(loading.load(name, file, in_place=False))
    for work, status, message in (
        (loading.load("c", files[2], in_place=False), 409, "all of the room is in use"),
        (loading.load("a", files[2], in_place=False), 409, "steer a is loaded already"),
        (loading.load("a b", files[2], in_place=False), 400, "cannot be a steer's name"),
        (loading.load("none", files[2], in_place=False), 400, "means no steer"),
        (loading.unload("c"), 404, "no steer c was loaded at run time; loaded: a, b"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            run(work)
        assert refused.value.status == status
    assert sorted(loading.registry.names().steers) == ["a", "b"]


def test_a_place_is_free_when_its_last_request_ends(folder: Path, files: list[SteerSource]) -> None:
    plan = loading_plan()
    engines = fake_engines(plan)
    core, loading = engines.cores[0], steer_loading(plan, folder, engines)
    first = run(loading.load("a", files[0], in_place=False))
    core.start("1", str(first.key))
    second = run(loading.load("a", files[1], in_place=True))
    core.start("2", str(second.key))
    with pytest.raises(Refused, match="all of the room is in use"):
        run(loading.load("b", files[2], in_place=False))
    assert sorted(core.contents()[0]) == sorted([first.key, second.key])
    core.end("1")
    third = run(loading.load("b", files[2], in_place=False))
    assert sorted(core.contents()[0]) == sorted([second.key, third.key])
    with pytest.raises(RejectedSteer, match="was unloaded while the request was on its way"):
        core.start("3", str(first.key))
    assert engine_core.residency_of(core).arriving == {}


def test_the_same_content_under_two_names_takes_one_place(
    folder: Path, files: list[SteerSource]
) -> None:
    plan = loading_plan()
    engines = fake_engines(plan)
    core, loading = engines.cores[0], steer_loading(plan, folder, engines)
    for name in ("a", "b"):
        run(loading.load(name, files[0], in_place=False))
    assert len(core.contents()[0]) == 1
    run(loading.unload("a"))
    run(loading.load("c", files[1], in_place=False))
    with pytest.raises(Refused, match="all of the room is in use"):  # b still has the first
        run(loading.load("d", files[2], in_place=False))


def test_a_requests_own_steers_are_found_again_and_leave_for_others(
    folder: Path, files: list[SteerSource]
) -> None:
    plan = loading_plan()
    engines = fake_engines(plan)
    core, loading = engines.cores[0], steer_loading(plan, folder, engines)
    sources = [SteerSource(Path(file.file).read_bytes(), {}) for file in files]  # type: ignore[arg-type]
    checks = []
    check = loading._check
    with replaced_attribute(loading, "_check", lambda *a: checks.append(a[0]) or check(*a)):
        for index in (0, 0, 1, 0, 2, 1):
            (steer,) = run(loading.of_request({"mine": sources[index]})).values()
            core.start(str(index), str(steer.key))
            core.end(str(index))
    assert checks == ["mine"] * 4  # 0, 1, 2, and 1 again after it had left
    assert loading.registry.names().steers == {}
    assert list(folder.glob("*.safetensors")) == []


def test_what_was_loaded_is_loaded_again_after_a_restart(
    tmp_path: Path, folder: Path, files: list[SteerSource]
) -> None:
    room = {"lm_steers": 3, "max_rank": 8, "vectors": 0, "delta_steps": 0}
    plan = loading_plan(state=str(folder), room=room)
    loading = steer_loading(plan, folder)
    planned = [run(loading.load(n, f, in_place=False)) for n, f in zip("ab", files, strict=False)]
    run(loading.load("b", files[2], in_place=True))
    run(loading.unload("b"))
    run(loading.load("b", files[3], in_place=False))
    assert len(list(folder.glob("*.safetensors"))) == 2  # those of a and b
    engines = fake_engines(plan)
    again = steer_loading(plan, folder, engines)
    run(again.restore())
    assert sorted(again.registry.names().steers) == ["a", "b"]
    assert planned[0].key in engines.cores[0].contents()[0]
    again.registry.names().steers["b"].path.write_bytes(b"damaged")
    with pytest.raises(SteerError, match=r"steer b, loaded before the restart, cannot be loaded"):
        run(steer_loading(plan, folder).restore())


def test_a_load_waits_for_another_processs_and_gives_up_in_the_end(
    folder: Path, files: list[SteerSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = steer_loading(loading_plan(), folder)
    lock = Registry(folder).try_lock()
    assert lock is not None
    monkeypatch.setattr("vllm_steer.serving.runtime.loading.LONGEST_LOAD", 0.05)
    with pytest.raises(Refused, match="others have been loading steers for too long"):
        run(loading.load("a", files[0], in_place=False))
    Registry.unlock(lock)
    run(loading.load("a", files[0], in_place=False))


def test_steers_that_fit_neither_model_nor_room_are_refused(tmp_path: Path, folder: Path) -> None:
    loading = steer_loading(loading_plan(), folder)
    narrow = LMSteer(variant="add", add=torch.ones(1, 5), epsilon=1.0, hidden_size=5)
    for name, steer, message in (
        ("vector", vector(0), "there is no room for vectors at resid"),
        ("narrow", narrow, "steer narrow: hidden size is 5; the model org/model has 6"),
        ("high", lm_steer(0, rank=9), "its rank over all columns is 9; runtime.room.max_rank is 8"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_steer(steer, path)
        with pytest.raises(Refused, match=message) as refused:
            run(loading.load(name, SteerSource(path, {}), in_place=False))
        assert refused.value.status == 422
    options = {"default_strength": "x"}
    with pytest.raises(Refused, match="default_strength") as refused:
        run(loading.load("a", SteerSource(path, options), in_place=False))
    assert refused.value.status == 400
    assert list(folder.glob("*.safetensors")) == []


def test_a_folder_that_was_cleaned_away_loses_no_name(
    folder: Path, files: list[SteerSource]
) -> None:
    loading = steer_loading(loading_plan(), folder)
    first = run(loading.load("a", files[0], in_place=False))
    shutil.rmtree(folder)
    assert loading.registry.names().steers == {"a": first}
    second = run(loading.load("b", files[1], in_place=False))
    assert Registry(folder).names().steers == {"a": first, "b": second}


def test_loads_at_once_come_one_after_the_other(folder: Path, files: list[SteerSource]) -> None:
    plan = loading_plan()
    loading = steer_loading(plan, folder)

    async def all_at_once(loading: SteerLoading) -> list[Any]:
        loads = [loading.load(f"s{i}", file, in_place=False) for i, file in enumerate(files)]
        return await asyncio.gather(*loads, return_exceptions=True)

    results = run(all_at_once(loading))
    assert sum(isinstance(result, Refused) for result in results) == 3
    assert len(loading.registry.names().steers) == 2
