"""Ranks of one world, and engines behind one frontend, that do not have the same plan."""

import asyncio
import json
import multiprocessing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_steer import SteerError
from vllm_steer.environment import ACTIVE, HEADLESS, activate
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.plan_agreement import (
    CHECK,
    check_engine_core,
    check_ranks,
    plan_digest,
    require_checked,
    with_checked_engines,
)
from vllm_steer.serving.request_args import RejectedSteer


def other_plan(plan: SteerPlan) -> SteerPlan:
    return plan.model_copy(update={"default": "a:2"})


@pytest.fixture
def plan(make_plan: Any) -> SteerPlan:
    made: SteerPlan = make_plan({"a": 1.0})
    return made


def config(plan: SteerPlan | None, size: int = 2) -> Any:
    additional = {} if plan is None else {"steer": plan.to_json()}
    return SimpleNamespace(
        additional_config=additional, parallel_config=SimpleNamespace(data_parallel_size=size)
    )


def test_the_digest_names_contents_and_not_paths(plan: SteerPlan) -> None:
    elsewhere = plan.to_json()
    elsewhere["steers"]["a"]["path"] = "/elsewhere/a.safetensors"
    assert plan_digest(SteerPlan.from_json(elsewhere)) == plan_digest(plan)
    elsewhere["steers"]["a"]["content"] = "other"
    assert plan_digest(SteerPlan.from_json(elsewhere)) != plan_digest(plan)
    assert plan_digest(other_plan(plan)) != plan_digest(plan)


def rank_of_a_world(rank: int, plans: list[Any], folder: str) -> None:
    """A process of a world with two ranks; writes its error, or nothing, to a file."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    error = ""
    if plans[rank] is not None:
        try:
            check_ranks(SteerPlan.from_json(plans[rank]), timedelta(seconds=3))
        except SteerError as raised:
            error = str(raised)
    Path(folder, str(rank)).write_text(json.dumps(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def errors_of(folder: Path, plans: list[SteerPlan | None]) -> list[str]:
    data = [plan and plan.to_json() for plan in plans]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_of_a_world, args=(rank, data, str(folder))) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


@pytest.mark.matrix
def test_ranks_with_one_plan_agree(plan: SteerPlan, tmp_path: Path) -> None:
    assert errors_of(tmp_path, [plan, plan]) == ["", ""]


@pytest.mark.matrix
def test_ranks_with_two_plans_do_not_start(plan: SteerPlan, tmp_path: Path) -> None:
    errors = errors_of(tmp_path, [plan, other_plan(plan)])
    assert errors == [
        "ranks 1 and 0 have different steer plans: start every node with the same --steer-config",
        "ranks 0 and 1 have different steer plans: start every node with the same --steer-config",
    ]


def test_a_rank_beside_one_without_a_plan_does_not_start(plan: SteerPlan, tmp_path: Path) -> None:
    errors = errors_of(tmp_path, [None, plan])
    assert errors == [
        "",
        "rank 0 has no steer plan and rank 1 has one: start every node with the same "
        "--steer-config",
    ]


def test_one_rank_alone_needs_no_store(plan: SteerPlan) -> None:
    check_ranks(plan)


def test_an_engine_core_checks_the_frontends_digest(plan: SteerPlan) -> None:
    digest = plan_digest(plan)
    check_engine_core(SimpleNamespace(vllm_config=config(plan)), digest)
    for core_plan, message in ((other_plan(plan), "another steer plan"), (None, "no steer plan")):
        with pytest.raises(SteerError, match=f"{message}: start every node with the same"):
            check_engine_core(SimpleNamespace(vllm_config=config(core_plan)), digest)


def test_a_headless_core_steers_for_a_frontend_that_has_asked_it_only(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(vllm_config=config(plan))
    monkeypatch.setenv(ACTIVE, "steering")
    require_checked(core)
    activate(HEADLESS)
    with pytest.raises(RejectedSteer, match="frontend has no steer plan: start every node with"):
        require_checked(core)
    check_engine_core(core, plan_digest(plan))
    require_checked(core)


@pytest.mark.parametrize(
    ("frontend", "core", "size", "asks"),
    [("plan", "plan", 2, 1), ("plan", "other", 2, 1), ("plan", None, 1, 0), (None, "plan", 2, 0)],
)
def test_a_frontend_asks_data_parallel_engines_once(
    plan: SteerPlan, frontend: str | None, core: str | None, size: int, asks: int
) -> None:
    plans = {"plan": plan, "other": other_plan(plan), None: None}
    calls = []

    async def call_utility_async(method: str, *args: Any) -> None:
        calls.append(method)
        check_engine_core(SimpleNamespace(vllm_config=config(plans[core])), *args)

    async def get_supported_tasks(client: Any) -> str:
        return "tasks"

    client = SimpleNamespace(
        vllm_config=config(plans[frontend], size),
        engine_core=SimpleNamespace(call_utility_async=call_utility_async),
    )

    async def start() -> None:
        for _ in range(2):
            assert await with_checked_engines(get_supported_tasks, client) == "tasks"

    if core == "other":
        with pytest.raises(SteerError, match="start every node with the same --steer-config"):
            asyncio.run(start())
    else:
        asyncio.run(start())
    assert calls == [CHECK] * asks
