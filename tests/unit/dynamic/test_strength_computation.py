"""From logits to strengths: the compared rows, the step, and the result."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guidance import delta, head, plan_for, vector

from vllm_steer.serving.batch import steered_request
from vllm_steer.serving.dynamic import strengths as strengths_module
from vllm_steer.serving.dynamic.messages import StreamStep
from vllm_steer.serving.dynamic.worker_state import DynamicState
from vllm_steer.serving.request_args import STREAM, StreamRequest

CPU = torch.device("cpu")
VOCAB = 13
STEERS: dict[str, Any] = {
    "walk": delta(2, (0,)),
    "push": vector((0,)),
    "word": head(),
    "other": head(),
}
PLAN = plan_for(STEERS)


def strength(p0: Any, pj: Any, *, maximum: float, top_p: float, authors: bool = False) -> float:
    """The paper's formula in float64, token by token."""
    both = [np.exp(x - x.max()) for x in (np.asarray(v, dtype=np.float64) for v in (p0, pj))]
    p0, pj = (x / x.sum() for x in both)
    chosen: set[int] = set()
    for p in (p0, pj):
        total = 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if total > top_p:
                break
            chosen.add(token)
            total += p[token]
    q = sorted(chosen)
    p0, pj = p0[q] / p0[q].sum(), pj[q] / pj[q].sum()
    kl = float((p0 * np.log(p0 / pj)).sum()) / (len(q) if authors else 1)
    return float(np.sign(maximum)) * min(max(kl, 0.0), abs(maximum))


def add(part: DynamicState, main: str, steer: str, *, max_tokens: int = 8) -> None:
    """A request with a base and as many probes as it has doses inside."""
    doses = PLAN.doses(steer)
    for dose in (None, *(i for i, d in enumerate(doses) if PLAN.steers[d.steer].site != "head")):
        name = f"{main}-{'base' if dose is None else dose}"
        stream = {STREAM: StreamRequest(main, steer, dose).to_args()}
        params = SimpleNamespace(extra_args=stream, max_tokens=max_tokens)
        steered_request(name, params, 3, PLAN, part)
    user = SimpleNamespace(extra_args={"steer": steer}, max_tokens=max_tokens)
    steered_request(main, user, 3, PLAN, part)


@pytest.fixture
def part() -> DynamicState:
    return DynamicState(PLAN, CPU)


def work(part: DynamicState, logits: dict[str, torch.Tensor], *reading: str, **steps: int) -> Any:
    """Run one step: the rows of a batch, and the step of each request at its last token."""
    step_plan = StreamStep(steps={req_id: steps.get(req_id[0], 0) for req_id in reading})
    part.begin_step(step_plan)
    part.announce(list(logits))
    if part.step is not None:
        compute(part, part.step, torch.stack(list(logits.values())))
    pending_strengths = part.strengths.pop_results()
    return {} if pending_strengths is None else pending_strengths.read()


def compute(part: DynamicState, step: Any, logits: torch.Tensor) -> None:
    """All rows of a step in one part, as the head hands them over."""
    part.strengths.compute(step, logits, logits, first=0)
    part.strengths.finish_step(step)


def rows(seed: int, *req_ids: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {req_id: torch.randn(VOCAB, generator=generator) for req_id in req_ids}


def test_several_requests_in_a_step_each_with_its_own_settings(part: DynamicState) -> None:
    add(part, "a", "push:dynamic:2:0.6,walk:dynamic:1.5:0.9")
    add(part, "b", '{"push": {"strength": "dynamic", "max": -0.4, "kl": "authors"}}')
    x = rows(0, "a-1", "plain", "b-0", "a-base", "b-base", "a-0")
    strengths = work(part, x, "a-1", "b-0", "a-base", "b-base", "a-0")
    expected = {
        "a": {0: strength(x["a-base"], x["a-0"], maximum=2, top_p=0.6),
              1: strength(x["a-base"], x["a-1"], maximum=1.5, top_p=0.9)},
        "b": {0: strength(x["b-base"], x["b-0"], maximum=-0.4, top_p=0.5, authors=True)},
    }  # fmt: skip
    assert strengths.keys() == expected.keys()
    for main, doses in expected.items():
        assert strengths[main] == pytest.approx(doses, abs=1e-6)
        starts = part.requests.get(main).starts  # type: ignore[union-attr]
        for dose, value in doses.items():
            assert part.pool.values[starts[dose]].item() == pytest.approx(value, abs=1e-6)
    assert min(expected["b"].values()) < 0


def test_the_formula_here_equals_the_reference_of_the_engine_tests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "engine"))
    from dynamic_reference import divergence_over_likeliest

    for seed in range(20):
        x = [v.double() for v in rows(seed, "p0", "pj").values()]
        kl, _ = divergence_over_likeliest(x[0].softmax(-1), x[1].softmax(-1), 0.7, by_size=False)
        assert strength(*x, maximum=9.0, top_p=0.7) == pytest.approx(min(max(kl, 0), 9), abs=1e-12)
    sys.modules.pop("dynamic_reference")


@pytest.mark.parametrize("seed", range(6))
def test_streams_may_arrive_in_any_step_and_order(part: DynamicState, seed: int) -> None:
    """Two requests over six tokens; early results are kept while other rows change."""
    rng = random.Random(seed)
    steers = {"a": "push:dynamic:2:0.6,walk:dynamic:1.5:0.8", "b": "push:dynamic:-3:0.4"}
    for main, steer in steers.items():
        add(part, main, steer)
    for step in range(6):
        streams = ["a-base", "a-0", *(["a-1"] if step < 2 else []), "b-base", "b-0"]
        truth = rows(100 * seed + step, *streams)
        rng.shuffle(streams)
        strengths: dict[str, Any] = {}
        while streams:
            arriving = [streams.pop() for _ in range(rng.randint(1, len(streams)))]
            batch = {**{r: truth[r] for r in arriving}, **rows(rng.randint(0, 99), "x", "y")}
            order = sorted(batch, key=lambda _: rng.random())
            pending_strengths = work(part, {r: batch[r] for r in order}, *arriving, a=step, b=step)
            assert not pending_strengths.keys() & strengths.keys()
            strengths |= pending_strengths
        expected = {
            "a": {0: strength(truth["a-base"], truth["a-0"], maximum=2, top_p=0.6)},
            "b": {0: strength(truth["b-base"], truth["b-0"], maximum=-3, top_p=0.4)},
        }
        if step < 2:
            expected["a"][1] = strength(truth["a-base"], truth["a-1"], maximum=1.5, top_p=0.8)
        for main, doses in expected.items():
            assert strengths[main] == pytest.approx(doses, abs=1e-6)


def test_a_kept_row_is_a_copy(part: DynamicState) -> None:
    add(part, "a", "push:dynamic:9:0.6")
    x = rows(1, "a-base", "a-0")
    buffer = x["a-base"].clone()[None]
    part.begin_step(StreamStep(steps={"a-base": 0}))
    part.announce(["a-base"])
    assert part.step is not None
    compute(part, part.step, buffer)
    buffer.fill_(3.0)
    strengths = work(part, {"a-0": x["a-0"]}, "a-0")
    expected = strength(x["a-base"], x["a-0"], maximum=9, top_p=0.6)
    assert strengths["a"][0] == pytest.approx(expected, abs=1e-6)


def test_streams_that_recompute_a_known_step_change_nothing(part: DynamicState) -> None:
    add(part, "a", "push:dynamic:2:0.6")
    x = rows(2, "a-base", "a-0")
    first = work(part, x, "a-base", "a-0")
    before = part.pool.values.clone()
    assert work(part, rows(3, "a-base", "a-0"), "a-base", "a-0") == {}
    assert torch.equal(part.pool.values, before)
    again = work(part, rows(4, "a-base", "a-0"), "a-base", "a-0", a=1)
    assert again.keys() == first.keys()
    starts = part.requests.get("a").starts  # type: ignore[union-attr]
    assert part.pool.values[starts[0]].item() == pytest.approx(first["a"][0])
    assert part.pool.values[starts[0] + 1].item() == pytest.approx(again["a"][0])


def test_a_batch_without_a_last_token_of_a_dynamic_request_has_no_plan(
    part: DynamicState,
) -> None:
    add(part, "a", "push:dynamic")
    for step_plan in (None, StreamStep(), StreamStep(steps={"x": 3})):
        part.begin_step(step_plan)
        part.announce(["a-base", "x"])
        assert part.step is None


def test_probes_at_the_head_are_extra_rows_of_the_bases_hidden_state(part: DynamicState) -> None:
    add(part, "a", "push:dynamic:2:0.6,word:dynamic:1.5:0.7,other:dynamic:-1:0.8")
    part.begin_step(StreamStep(steps={"a-0": 1, "a-base": 1}))
    part.announce(["x", "a-0", "a-base"])
    step = part.step
    assert step is not None
    assert [(p.row, p.steer, p.strength) for p in step.probes] == [
        (2, "word", 1.5), (2, "other", -1.0),
    ]  # fmt: skip
    assert step.alone == []
    x = rows(5, "x", "a-0", "a-base", "word", "other")
    compute(part, step, torch.stack(list(x.values())))
    pending_strengths = part.strengths.pop_results()
    assert pending_strengths is not None
    assert pending_strengths.read()["a"] == pytest.approx(
        {0: strength(x["a-base"], x["a-0"], maximum=2, top_p=0.6),
         1: strength(x["a-base"], x["word"], maximum=1.5, top_p=0.7),
         2: strength(x["a-base"], x["other"], maximum=-1, top_p=0.8)},
        abs=1e-6,
    )  # fmt: skip


def test_a_request_that_is_its_own_base_gets_a_strength_each_step(part: DynamicState) -> None:
    add(part, "a", "word:dynamic:1.5")
    part.begin_step(StreamStep(steps={"a": 0}))
    part.announce(["x", "a"])
    step = part.step
    assert step is not None
    assert (step.alone, step.steps) == ([1], {"a": 0})
    assert [(p.row, p.steer) for p in step.probes] == [(1, "word")]
    x = rows(6, "x", "a", "probe")
    compute(part, step, torch.stack(list(x.values())))
    part.begin_step(StreamStep(steps={"a": 0}))
    part.announce(["a", "x"])
    assert part.step is not None
    assert (part.step.alone, part.step.probes, part.step.request_logits) == ([], [], [])


def test_an_earlier_step_is_recomputed(part: DynamicState) -> None:
    """vLLM dropped the later tokens and chooses others."""
    add(part, "a", "word:dynamic:1.5")
    for number in (0, 1, 0, 1):
        part.begin_step(StreamStep(steps={"a": number}))
        part.announce(["a"])
        step = part.step
        assert step is not None and len(step.request_logits) == 1
        compute(part, step, torch.stack(list(rows(number, "a", "probe").values())))
        pending_strengths = part.strengths.pop_results()
        assert pending_strengths is not None and pending_strengths.read().keys() == {"a"}


def test_strengths_are_returned_once(part: DynamicState) -> None:
    add(part, "a", "push:dynamic")
    assert work(part, rows(7, "a-base", "a-0"), "a-base", "a-0").keys() == {"a"}
    assert part.strengths.pop_results() is None


def test_a_finished_request_is_not_a_base(part: DynamicState) -> None:
    add(part, "a", "push:dynamic")
    part.requests.remove("a")
    assert work(part, rows(8, "a-base", "a-0"), "a-base", "a-0") == {}


def test_many_doses_are_computed_in_chunks(
    part: DynamicState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a step is bounded for any number of requests."""
    names = [f"r{i}" for i in range(150)]
    for name in names:
        add(part, name, "push:dynamic:2:0.6")
    shapes: list[int] = []
    inner = strengths_module.strength_of_rows

    def recording(logits: torch.Tensor, *args: Any, **kw: Any) -> Any:
        shapes.append(logits.shape[0])
        return inner(logits, *args, **kw)

    monkeypatch.setattr(strengths_module, "strength_of_rows", recording)
    x = rows(9, *(f"{name}-{role}" for name in names for role in ("base", "0")))
    step_plan = StreamStep(steps=dict.fromkeys(x, 0))
    part.begin_step(step_plan)
    part.announce(list(x))
    assert part.step is not None
    compute(part, part.step, torch.stack(list(x.values())))
    pending_strengths = part.strengths.pop_results()
    assert pending_strengths is not None
    strengths = pending_strengths.read()
    assert len(shapes) == 3 and max(shapes) <= 128
    for name in names:
        expected = strength(x[f"{name}-base"], x[f"{name}-0"], maximum=2, top_p=0.6)
        assert strengths[name][0] == pytest.approx(expected, abs=1e-6)


def test_a_dummy_run_takes_the_memory_of_the_largest_step_and_leaves_nothing(
    part: DynamicState, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[torch.Size, torch.dtype]] = []
    inner = strengths_module.strength_of_rows

    def recording(logits: torch.Tensor, *args: Any, **kw: Any) -> Any:
        shapes.append((logits.shape, logits.dtype))
        return inner(logits, *args, **kw)

    monkeypatch.setattr(strengths_module, "strength_of_rows", recording)
    before = part.pool.values.clone()
    part.strengths.warm_up(torch.zeros(3, VOCAB, dtype=torch.bfloat16))
    assert shapes == [((128, VOCAB), torch.bfloat16)]
    assert torch.equal(part.pool.values, before)
    assert part.strengths.pop_results() is None
