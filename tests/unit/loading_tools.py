"""Engines of the tests that load steers: everything of ours is real, nothing of vLLM runs.

Each engine has two ranks with the tables of a real worker, of which one can be made to fail, and a
scheduler that is a dict of requests.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from engine_tools import HIDDEN, LAYERS, VOCAB, engine_config

from vllm_steer import LMSteer, SteerConfig, VectorSteer
from vllm_steer.bank import HeadBank, HeadRoom, fill_head_bank
from vllm_steer.loaded_steers import LoadedSteers
from vllm_steer.plan import SteerPlan
from vllm_steer.runtime.registry import Registry
from vllm_steer.serving.request_args import LOADED
from vllm_steer.serving.runtime import engine_core
from vllm_steer.serving.runtime.loading import SteerLoading
from vllm_steer.serving.runtime.reserved_bank import Reply, ReservedBank

T = TypeVar("T")
RANKS = 2


@dataclass
class FakeCore:
    """An engine core: ``workers`` are its ranks; ``fail`` makes rank 1 fail a method."""

    vllm_config: Any
    workers: list[ReservedBank]
    fail: str = ""
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(requests={}))

    def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Reply]:
        def projection() -> Any:
            raise AssertionError("no steer of these tests is at heads")

        replies = []
        for rank, worker in enumerate(self.workers):
            if rank == 1 and method == self.fail:
                replies.append({"error": "rank 1 has failed"})
                continue
            replies.append(worker.call(method, args, projection))
            for reading in worker._reading.values():
                reading.done.result(10)
        return replies

    def start(self, request_id: str, *keys: str) -> None:
        """A request with these steers is admitted and reaches the scheduler."""
        loaded = {f"name {index}": key for index, key in enumerate(keys)}
        params = SimpleNamespace(extra_args={LOADED: loaded})
        request = SimpleNamespace(request_id=request_id, sampling_params=params)
        engine_core.admit_loaded(self, request)
        add = self.scheduler.requests.__setitem__
        engine_core.with_arrival(lambda _, r: add(r.request_id, r), self, request)

    def end(self, request_id: str) -> None:
        del self.scheduler.requests[request_id]

    def contents(self) -> list[list[str]]:
        """By rank, the keys in its table."""
        return [
            sorted(key for key in _slots(worker) if not key.startswith("<"))
            for worker in self.workers
        ]


def _slots(worker: ReservedBank) -> dict[str, int]:
    assert worker.head is not None and worker.head.hidden is not None
    return worker.head.hidden.slots


@dataclass
class FakeEngines:
    """The engines of a frontend; calls are made at once."""

    cores: list[FakeCore]

    async def call(self, method: str, *args: Any) -> list[Reply]:
        return [getattr(engine_core, method)(core, *args) for core in self.cores]

    async def sleep(self, seconds: float) -> None:
        assert seconds < 1

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


def loading_plan(**runtime: Any) -> SteerPlan:
    room = {"lm_steers": 2, "max_rank": 8, "vectors": 0, "delta_steps": 0}
    runtime = {"enabled": True, "room": room, **runtime}
    return SteerPlan.of(SteerConfig.load({"steers": {}, "runtime": runtime}))


def fake_engines(plan: SteerPlan, count: int = 1) -> FakeEngines:
    room = plan.runtime.room

    def bank() -> HeadBank:
        head_room = HeadRoom(room.lm_steers, room.offsets, room.max_rank, HIDDEN, VOCAB)
        return fill_head_bank({}, dtype=torch.float32, device=torch.device("cpu"), room=head_room)

    def worker() -> ReservedBank:
        return ReservedBank(LoadedSteers(), bank(), None, None, torch.float32)

    return FakeEngines(
        [FakeCore(engine_config(plan), [worker() for _ in range(RANKS)]) for _ in range(count)]
    )


def steer_loading(
    plan: SteerPlan, folder: Path, engines: FakeEngines | None = None
) -> SteerLoading:
    engines = engines or fake_engines(plan)
    return SteerLoading(plan, engine_config(plan), Registry(folder), engines)


def lm_steer(seed: int, rank: int = 2) -> LMSteer:
    generator = torch.Generator().manual_seed(seed)
    return LMSteer(
        variant="multiply",
        projector1=torch.randn(1, HIDDEN, rank, generator=generator),
        projector2=torch.randn(1, HIDDEN, rank, generator=generator),
        epsilon=0.1,
        hidden_size=HIDDEN,
    )


def vector(seed: int) -> VectorSteer:
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(range(LAYERS))
    return VectorSteer(vectors=torch.randn(LAYERS, HIDDEN, generator=generator), layers=layers)


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


copy_of = dataclasses.replace
