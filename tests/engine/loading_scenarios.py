"""Scenarios of ``own_process.py`` that load steers into an engine of several workers.

Functions that import vLLM are looked up where they are called, as another scenario sees that
nothing is imported without need. The workers import this module too. Where ``VLLM_STEER_TEST_FAIL``
names a file, the worker of rank 1 cannot read a steer as long as that file exists.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import GUIDED, Setting, doses_of, engine, greedy, guided_family, load_into, prompts
from reference import assert_guided, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, save_tiny_model

import vllm_steer
from vllm_steer import Steer, SteerError, VectorSteer
from vllm_steer.planned_steer import PlannedSteer

FAIL = "VLLM_STEER_TEST_FAIL"
PLACES = 4
ROOM = {
    "lm_steers": 4,
    "max_rank": 48,
    "offsets": 1,
    "vectors": PLACES,
    "delta_steps": 9,
    "sites": ["attn_in", "attn_out", "heads", "resid"],
}


def _fail_on_rank_1(flag: Path) -> None:
    load = PlannedSteer.load

    def load_or_fail(self: PlannedSteer, *, verifies: bool = True) -> Steer:
        is_worker = torch.distributed.is_initialized()
        if is_worker and torch.distributed.get_rank() == 1 and flag.exists():
            raise PermissionError(f"rank 1 may not read {self.path.name}")
        return load(self, verifies=verifies)

    PlannedSteer.load = load_or_fail  # type: ignore[method-assign]


if FAIL in os.environ:
    _fail_on_rank_1(Path(os.environ[FAIL]))


def _push(seed: int) -> VectorSteer:
    """A vector in the first and the last layer: two pipeline stages have one each."""
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(seed)) / 2
    return VectorSteer(vectors=vectors, layers=(0, GUIDED_LAYERS - 1))


def _check(llm: Any, reference: Any, setting: Setting, steers: Mapping[str, Steer]) -> None:
    outputs = llm.generate(prompts(1), greedy((setting,), prompt_logprobs=1), use_tqdm=False)
    assert_guided(outputs[0], reference, doses_of(setting, steers), steers)


def loaded_in_parallel(folder: Path, **options: Any) -> None:
    """Steers of every kind on two workers; then one that rank 1 cannot read, on none."""
    flag = Path(os.environ[FAIL])
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    reference = load_reference(model)
    _, steers = guided_family("llama")
    config = {"runtime": {"enabled": True, "room": ROOM}}
    with engine(model, config, distributed_executor_backend="mp", **options) as llm:
        load_into(llm, folder / "steers", steers)
        params = greedy(GUIDED, prompt_logprobs=1)
        outputs = llm.generate(prompts(len(GUIDED)), params, use_tqdm=False)
        for output, setting in zip(outputs, GUIDED, strict=True):
            assert_guided(output, reference, doses_of(setting, steers), steers)
        for name in steers:
            vllm_steer.unload_steer_from(llm, name)
        old, new = {"push": _push(1)}, {"push": _push(2)}
        load_into(llm, folder / "old", old)
        digests = [entry["digest"] for entry in vllm_steer.steers_of(llm)]
        flag.touch()
        failing = {**new, "other": _push(3)}  # what was loaded before may still be in its place
        for name, steer in failing.items():
            for _ in range(PLACES + 1):  # more often than there are places
                with pytest.raises(SteerError, match="rank 1 may not read"):
                    load_into(llm, folder / "new", {name: steer}, load_inplace=True)
            _check(llm, reference, {"push": 1.5}, old)
        assert [entry["digest"] for entry in vllm_steer.steers_of(llm)] == digests
        with pytest.raises(ValueError, match="steer 'other' is unknown"):
            _check(llm, reference, {"other": 1.0}, failing)
        flag.unlink()
        load_into(llm, folder / "new", new, load_inplace=True)
        _check(llm, reference, {"push": 1.5}, new)
    print(f"{len(outputs)} outputs equal the reference; a load that fails on rank 1 is on none")


def loaded_on_tensor_ranks(folder: Path) -> None:
    loaded_in_parallel(folder, tensor_parallel_size=2)


def loaded_on_pipeline_stages(folder: Path) -> None:
    loaded_in_parallel(folder, pipeline_parallel_size=2)
