"""The head's product in steps that compute strengths: probe rows, rows that are computed again, and
unchanged rows.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guidance import WIDTH, plan_for, vector
from torch import nn

from vllm_steer import LMSteer
from vllm_steer.bank import HeadBank, fill_head_bank
from vllm_steer.kernels.lm_steer import reference, torch_grouped
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.dynamic.messages import StreamStep
from vllm_steer.serving.head import SteeredHead
from vllm_steer.serving.request_args import STREAM, StreamRequest
from vllm_steer.serving.step import Step

CPU = torch.device("cpu")
VOCAB = 11
GENERATOR = torch.Generator().manual_seed(8)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def lm_steer(variant: str, epsilon: float, **fields: Any) -> LMSteer:
    return LMSteer(variant=variant, hidden_size=WIDTH, epsilon=epsilon, **fields)


STEERS: dict[str, Any] = {
    "mul": lm_steer("multiply", 0.5, projector1=draw(1, WIDTH, 2), projector2=draw(1, WIDTH, 2)),
    "add": lm_steer("add", 0.25, add=draw(1, WIDTH)),
    "off": lm_steer("offset", 0.75, offset=draw(1, VOCAB)),
    "push": vector((0,)),
}
PLAN = plan_for(STEERS)
WEIGHT = draw(VOCAB, WIDTH)


class Processor(nn.Module):
    def _get_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ WEIGHT.T


class Model(nn.Module):
    """A linear head; ``calls`` are the numbers of rows of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()
        self.calls: list[int] = []

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls.append(hidden_states.shape[0])
        return self.processor._get_logits(hidden_states)


class Head:
    """A steered head and its batch."""

    def __init__(self, backend: Any, max_rows: int | None = None) -> None:
        inside = {name: steer for name, steer in STEERS.items() if name != "push"}
        self.bank: HeadBank = fill_head_bank(inside, dtype=torch.float32, device=CPU)
        self.batch = SteeredBatch(PLAN, CPU, backend)
        self.batch.head_rows.rows_at_once = max_rows
        self.model = Model()
        self.head = SteeredHead(self.bank, self.batch.head_rows)
        self.head.attach(self.model)

    def step(
        self,
        hidden: dict[str, torch.Tensor],
        new: dict[str, Any] | None = None,
        **steps: int,
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """One step of decoding: the logits and the strengths that were computed."""
        self.batch.begin_step(
            [(r, params(r, s), 1) for r, s in (new or {}).items()], (), StreamStep(steps)
        )
        ones = np.ones(len(hidden), dtype=np.int64)
        starts, positions = torch.arange(len(hidden) + 1), torch.zeros(len(hidden)).long()
        self.batch.announce(Step(list(hidden), ones, ones, starts, positions))
        logits = self.model.compute_logits(torch.stack(list(hidden.values())))
        answer = self.batch.dynamic.strengths.pop_results()
        return dict(zip(hidden, logits, strict=True)), {} if answer is None else answer.read()


def params(req_id: str, steer: Any) -> Any:
    main, _, role = req_id.partition("_")
    extra = {"steer": steer}
    if role:
        extra = {
            STREAM: StreamRequest(main, steer, None if role == "base" else int(role)).to_args()
        }
    return SimpleNamespace(extra_args=extra, max_tokens=6)


@pytest.fixture(params=[reference, torch_grouped], ids=["reference", "torch"])
def head(request: pytest.FixtureRequest) -> Head:
    return Head(request.param)


def hidden_of(*req_ids: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(req_ids))
    return {r: torch.randn(WIDTH, generator=generator) for r in req_ids}


def steered(x: torch.Tensor, **strengths: float) -> torch.Tensor:
    """Logits in float64 under strengths by steer, each written out from its definition."""
    x = x.double()
    moved, offset = x.clone(), torch.zeros(VOCAB, dtype=torch.float64)
    for name, value in strengths.items():
        steer = STEERS[name]
        scale = steer.epsilon * value
        if name == "mul":
            moved += scale * (x @ steer.projector1[0].double()) @ steer.projector2[0].double().T
        elif name == "add":
            moved += scale * steer.add[0].double()
        else:
            offset += scale * steer.offset[0].double()
    return moved @ WEIGHT.double().T + offset


def strength(base: torch.Tensor, probe: torch.Tensor, maximum: float, top_p: float = 0.5) -> float:
    """The paper's formula, in float64."""
    chosen: set[int] = set()
    p0, pj = base.double().softmax(-1), probe.double().softmax(-1)
    for p in (p0, pj):
        falling, order = p.sort(descending=True)
        size = int((falling.cumsum(-1) <= top_p).sum()) + 1
        chosen |= set(order[:size].tolist())
    q = sorted(chosen)
    p0, pj = p0[q] / p0[q].sum(), pj[q] / pj[q].sum()
    size = min(max(float((p0 * (p0 / pj).log()).sum()), 0.0), abs(maximum))
    return size if maximum > 0 else -size


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steer", ["mul", "add", "off"])
@pytest.mark.parametrize("maximum", [1.5, -1.0])
def test_a_request_that_is_its_own_base_takes_the_strength_of_its_own_step(
    head: Head, steer: str, maximum: float
) -> None:
    x = hidden_of("x", "a", "y")
    logits, answer = head.step(x, {"x": None, "a": f"{steer}:dynamic:{maximum}", "y": "add:2"}, a=0)
    base, probe = steered(x["a"]), steered(x["a"], **{steer: maximum})
    value = strength(base, probe, maximum)
    assert answer["a"][0] == pytest.approx(value, abs=1e-5)
    close(logits["a"], steered(x["a"], **{steer: value}))
    close(logits["x"], steered(x["x"]))
    close(logits["y"], steered(x["y"], add=2))
    assert head.model.calls == [3 + 1, 1]


def test_ordinary_rows_equal_those_of_a_step_without_dynamic_requests(head: Head) -> None:
    x = hidden_of("x", "a", "y", "z")
    new = {"x": None, "y": "mul:2,off:1", "z": "add:-1"}
    logits, _ = head.step(x, {**new, "a": "add:dynamic:1.5,mul:dynamic:1"}, a=0)
    plain = Head(head.batch.head_rows.backend)
    expected, answer = plain.step(x, {**new, "a": None})
    assert answer == {}
    for name in new:
        torch.testing.assert_close(logits[name], expected[name], rtol=0, atol=1e-6)


def test_the_second_pass_uses_the_computed_strengths_as_fixed(head: Head) -> None:
    """Two dynamic doses and a fixed one; base and probes have none of the other doses."""
    x = hidden_of("b", "x", "a")
    logits, answer = head.step(
        x,
        {"a": "mul:dynamic:1.5,off:dynamic:2,add:3", "x": None, "b": "off:dynamic:-2"},
        a=0,
        b=0,
    )
    expected = {
        name: strength(steered(x["a"]), steered(x["a"], **{name: top}), top)
        for name, top in (("mul", 1.5), ("off", 2.0))
    }
    doses = PLAN.doses("mul:dynamic:1.5,off:dynamic:2,add:3")
    actual = {doses[index].steer: value for index, value in answer["a"].items()}
    assert actual == pytest.approx(expected, abs=1e-5)
    close(logits["a"], steered(x["a"], add=3, **expected))
    strength_of_b = strength(steered(x["b"]), steered(x["b"], off=-2), -2.0)
    close(logits["b"], steered(x["b"], off=strength_of_b))
    close(logits["x"], steered(x["x"]))
    assert head.model.calls == [3 + 3, 2]


def test_a_recomputed_step_keeps_its_strength(head: Head) -> None:
    """As after a preemption: nothing is recomputed, for any hidden state."""
    first = hidden_of("a")
    _, answer = head.step(first, {"a": "add:dynamic:1.5"}, a=0)
    other = hidden_of("x", "a")
    logits, again = head.step(other, {"x": None}, a=0)
    assert again == {}
    close(logits["a"], steered(other["a"], add=answer["a"][0]))
    assert head.model.calls == [2, 1, 2]


def test_main_base_and_probe_rows_of_a_request_with_streams(head: Head) -> None:
    """A dose inside the layers and one at the head: the base's row makes the probe at the head."""
    steer = "push:dynamic:2,add:dynamic:1.5,mul:2"
    x = hidden_of("a_base", "x", "a_0")
    logits, answer = head.step(
        x, {"a_base": steer, "a_0": steer, "a": steer, "x": "off:1"}, a_base=0, a_0=0
    )
    at_head = strength(steered(x["a_base"]), steered(x["a_base"], add=1.5), 1.5)
    inside = strength(steered(x["a_base"]), steered(x["a_0"]), 2.0)
    dose_indices = {d.steer: i for i, d in enumerate(PLAN.doses(steer))}
    assert answer["a"][dose_indices["push"]] == pytest.approx(inside, abs=1e-5)
    assert answer["a"][dose_indices["add"]] == pytest.approx(at_head, abs=1e-5)
    for name in ("a_base", "a_0"):
        close(logits[name], steered(x[name]))
    close(logits["x"], steered(x["x"], off=1))
    later = hidden_of("y", "a")
    logits, answer = head.step(later, {"y": None}, a=0)
    assert answer == {}
    close(logits["a"], steered(later["a"], add=at_head, mul=2))
    close(logits["y"], steered(later["y"]))
    assert head.model.calls == [3 + 1, 2]


def test_each_step_has_its_own_strength(head: Head) -> None:
    new: dict[str, Any] | None = {"a": "off:dynamic:2"}
    for step in range(6):
        x = {"a": torch.randn(WIDTH, generator=torch.Generator().manual_seed(step))}
        logits, answer = head.step(x, new, a=step)
        new = None
        value = strength(steered(x["a"]), steered(x["a"], off=2), 2.0)
        assert answer["a"][0] == pytest.approx(value, abs=1e-5)
        close(logits["a"], steered(x["a"], off=value))
    request = head.batch.dynamic.requests.get("a")
    assert request is not None
    assert request.last_step == 5


def test_a_rank_without_logits_raises_an_error(head: Head) -> None:
    head.model.processor._get_logits = lambda hidden_states: None  # type: ignore[assignment]
    model = Model()
    model.compute_logits = lambda hidden_states: None  # type: ignore[method-assign]
    SteeredHead(head.bank, head.batch.head_rows).attach(model)
    head.model = model
    with pytest.raises(RuntimeError, match="this rank has no logits"):
        head.step(hidden_of("a"), {"a": "add:dynamic"}, a=0)


def test_a_request_with_a_partial_prompt_gets_no_strength(head: Head) -> None:
    x = hidden_of("a", "x")
    logits, answer = head.step(x, {"a": "add:dynamic", "x": "add:1"})
    assert answer == {}
    close(logits["x"], steered(x["x"], add=1))
    assert head.model.calls == [2]


@pytest.mark.parametrize("max_rows", [3, 4, 5, 6])
def test_probes_beyond_the_row_limit_take_several_products(head: Head, max_rows: int) -> None:
    """Strengths and logits are those of one product, and no product is wider than a step."""
    x = hidden_of("x", "a", "b")
    new = {
        "a": "mul:dynamic:1.5,off:dynamic:2,add:dynamic:1",
        "b": "off:dynamic:-2,mul:1",
        "x": None,
    }
    expected, strengths = head.step(x, new, a=0, b=0)
    assert head.model.calls == [3 + 4, 2]
    parts = Head(head.batch.head_rows.backend, max_rows)
    logits, actual = parts.step(x, new, a=0, b=0)
    assert sum(parts.model.calls) == 3 + 4 + 2
    assert max(parts.model.calls) <= max_rows and len(parts.model.calls) > 2
    for main, values in strengths.items():
        assert actual[main] == pytest.approx(values, abs=1e-6)
    for name, row in expected.items():
        torch.testing.assert_close(logits[name], row, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_rows", [None, 2, 3, 5])
def test_probes_of_a_later_product_are_kept_for_streams_of_another_step(
    head: Head, max_rows: int | None
) -> None:
    """Bases first, with their probes at the head in several products; the layers' probes after."""
    one_head = Head(head.batch.head_rows.backend, max_rows)
    steer = "push:dynamic:2,add:dynamic:1.5,mul:dynamic:2"
    streams = ("a_base", "b_base", "a", "b", "a_0", "b_0")
    x, y = hidden_of("a_base", "b_base"), hidden_of("b_0", "x", "a_0")
    _, nothing = one_head.step(x, dict.fromkeys(streams, steer), a_base=0, b_base=0)
    assert nothing == {}
    _, actual = one_head.step(y, {"x": "mul:2"}, a_0=0, b_0=0)
    for name in ("a", "b"):
        base = steered(x[f"{name}_base"])
        assert actual[name] == pytest.approx(
            {
                0: strength(base, steered(y[f"{name}_0"]), 2.0),
                1: strength(base, steered(x[f"{name}_base"], add=1.5), 1.5),
                2: strength(base, steered(x[f"{name}_base"], mul=2.0), 2.0),
            },
            abs=1e-5,
        )


def test_prompt_tokens_are_steered_a_steps_rows_at_a_time(head: Head) -> None:
    """Memory for a chunk of a prompt is that of a step: no more pairs at once than it can have."""
    parts = Head(head.batch.head_rows.backend, max_rows=4)
    tokens = np.array([5, 3, 6])
    hidden_states = torch.randn(14, WIDTH, generator=torch.Generator().manual_seed(0))
    original = hidden_states.clone()
    actual = []
    for one_head in (head, parts):
        new = [
            (r, params(r, s), 9)
            for r, s in (("a", "mul:2,add:1,off:3"), ("b", None), ("c", "off:2"))
        ]
        one_head.batch.begin_step(new, ())
        one_head.batch.announce(
            Step(list("abc"), np.ones(3, dtype=np.int64), tokens, torch.arange(4), torch.arange(14))
        )
        with one_head.batch.head_rows.over_tokens(hidden_states):
            actual.append(one_head.model.compute_logits(hidden_states[1:]))
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(hidden_states, original)
    close(actual[1][0], steered(original[1], mul=2, add=1, off=3))
    close(actual[1][4], steered(original[5]))
    close(actual[1][12], steered(original[13], off=2))
    assert parts.model.calls == [13]


def test_a_dummy_run_at_start_up_steers_as_many_rows_as_speculation_can_have() -> None:
    rows: list[tuple[int, int]] = []
    backend = SimpleNamespace(
        **{name: getattr(torch_grouped, name) for name in ("prepare", "warm_up")}
    )
    backend.steer_rows = lambda x, weights, metadata: (
        rows.append((x.shape[0], metadata.rows.shape[0])),
        torch_grouped.steer_rows(x, weights, metadata),
    )[1]
    head = Head(backend, max_rows=12)
    head.head.is_profiled = True
    dummy = torch.zeros(3, WIDTH)
    head.model.compute_logits(dummy)
    hidden, logits = head.bank.hidden, head.bank.logits
    assert hidden is not None and logits is not None
    a_row = (len(hidden.slots), len(logits.slots))
    assert rows == [(3, 3 * a_row[0]), (3, 3 * a_row[1]), (12, 12 * a_row[0]), (12, 12 * a_row[1])]
    rows.clear()
    head.head.start_serving()
    head.model.compute_logits(dummy)
    assert [n for n, _ in rows] == [3, 3]
