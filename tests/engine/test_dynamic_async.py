"""Dynamic strengths while vLLM schedules a step before the last one's tokens are known.

vLLM disables asynchronous scheduling on a CPU, where it gains nothing; here it is forced.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from engines import engine, greedy, reporting
from reference import load_reference
from scheduling import leftovers, preemptions, scheduler_of
from test_dynamic_stress import BLOCK, CONFIG, FRENCH, HEAD, KINDS, check, finished, serve, texts
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_steer import embedded, load_steer

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)
    )
    yield


@pytest.mark.parametrize(
    ("blocks", "length"),
    [(256, 8), pytest.param(20, 40, marks=pytest.mark.matrix)],
    ids=["roomy", "preempting"],
)
def test_strengths_and_tokens_are_those_of_the_texts(blocks: int, length: int) -> None:
    steers = {path.stem: load_steer(path) for path in embedded.STEERS.glob("*.safetensors")}
    options = {"max_num_seqs": 16, "num_gpu_blocks_override": blocks, "block_size": BLOCK}
    with engine(embedded.MODEL, CONFIG, **options) as llm:
        assert isinstance(scheduler_of(llm), AsyncScheduler)
        assert llm.llm_engine.engine_core.engine_core.batch_queue is not None
        outputs = serve(llm, texts(len(KINDS), 50), KINDS, max_tokens=length)
        count, resources = preemptions(llm), leftovers(llm)
    assert (count > 0) == (blocks < 100)
    assert resources == {}
    check(outputs, KINDS, load_reference(embedded.MODEL), steers)


def test_all_requests_may_be_preempted_while_a_step_is_computed() -> None:
    """As for an update of the weights: between a step and its output, also that of a last token."""
    steers = {path.stem: load_steer(path) for path in embedded.STEERS.glob("*.safetensors")}
    settings, outputs = [FRENCH, HEAD, {}], []
    with engine(embedded.MODEL, CONFIG, max_num_seqs=16, block_size=BLOCK) as llm:
        core, scheduler = llm.llm_engine, scheduler_of(llm)
        for moment in range(1, 9):
            pairs = zip(texts(3, 20), reporting(greedy(settings, max_tokens=3)), strict=True)
            for index, request in enumerate(pairs):
                core.add_request(f"{moment}-{index}", *request)
            update, steps = scheduler.update_from_output, itertools.count(1)

            def preempting(*step: Any, at: int = moment, update: Any = update, steps: Any = steps):
                if next(steps) == at:
                    scheduler.reset_prefix_cache(reset_running_requests=True)
                return update(*step)

            scheduler.update_from_output = preempting
            ended = finished(core, 3)
            scheduler.update_from_output = update
            outputs += sorted(ended, key=lambda output: output.request_id)
            assert leftovers(llm) == {}, f"after {moment} steps"
    check(outputs, settings * 8, load_reference(embedded.MODEL), steers)
