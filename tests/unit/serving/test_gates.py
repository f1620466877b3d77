"""The gates of a worker's requests, and the rules of their tests."""

from typing import Any

import numpy as np
import pytest
import torch
from guidance import params, plan_for, vector

from vllm_steer.bank import fill_condition_tables, fill_layer_bank
from vllm_steer.doses import Dose, Gate
from vllm_steer.errors import SteerError
from vllm_steer.kernels.guidance import TokenMap, cpu, torch_gather
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import plan_loaded
from vllm_steer.serving.admission import reads_whole_prompt
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.gates import GateTable
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.serving.token_rules import condition_rules
from vllm_steer.steers import ConditionSteer

CPU = torch.device("cpu")


def condition(layer: int, **fields: Any) -> ConditionSteer:
    return ConditionSteer(vector=torch.ones(1, 5), layers=(layer,), threshold=0.1, **fields)


CONDITIONS = {
    "one": condition(1),
    "two": condition(3, tokens="any", side="below", similarity="dot"),
}


def planned() -> dict[str, Any]:
    from vllm_steer.config import Limits, SteerEntry

    entry = SteerEntry.model_validate({"path": "/steers/x.safetensors"})
    return {name: plan_loaded(name, entry, steer, Limits()) for name, steer in CONDITIONS.items()}


def table(most: int = 4) -> GateTable:
    return GateTable(plan_with_conditions(CONDITIONS), CPU, most)


ANY, ALL = Gate(("one", "two")), Gate(("one", "two"), "all")
ALONE = Gate(("two",))


def test_each_condition_of_a_gate_has_a_verdict_of_its_own() -> None:
    gates = table()
    taken = gates.take("a", [Dose("x", 1.0), Dose("y", 1.0, gate=ALL)], prompt_len=7)
    row = taken.gates[1]
    assert set(taken.gates) == {1} and row > 0
    assert [(test.condition, test.verdict, test.span) for test in taken.tests] == [
        ("one", 4 * row, (6, 7)),
        ("two", 4 * row + 1, (0, 7)),
    ]


def test_any_needs_one_verdict_and_all_need_each() -> None:
    gates = table()
    doses = [Dose("x", 1.0, gate=ANY), Dose("y", 1.0, gate=ALL), Dose("z", 1.0, gate=ANY)]
    rows = gates.take("a", doses, prompt_len=3).gates
    assert rows[0] == rows[2] != rows[1]  # equal gates of a request are one
    asked = torch.tensor([0, rows[0], rows[1]])
    assert gates.gates.are_open(asked).tolist() == [True, False, False]
    gates.gates.verdicts[rows[0], 1] = gates.gates.verdicts[rows[1], 1] = 1.0
    assert gates.gates.are_open(asked).tolist() == [True, True, False]
    gates.gates.verdicts[rows[1], 0] = 1.0
    assert gates.gates.are_open(asked).tolist() == [True, True, True]


def test_a_request_that_comes_again_keeps_its_verdicts_and_a_new_one_begins_without() -> None:
    gates = table(most=1)
    row = gates.take("a", [Dose("x", 1.0, gate=ALONE)], prompt_len=3).gates[0]
    gates.gates.verdicts[row, 0] = 1.0
    again = gates.take("a", [Dose("x", 1.0, gate=ALONE)], prompt_len=3)
    assert again.gates == {0: row} and gates.gates.verdicts[row, 0] == 1.0
    with pytest.raises(RuntimeError, match="more than 1 gates"):
        gates.take("b", [Dose("x", 1.0, gate=ALONE)], prompt_len=3)
    gates.give_back("a")
    assert gates.take("b", [Dose("x", 1.0, gate=ANY)], prompt_len=3).gates == {0: row}
    assert not gates.gates.verdicts.any()


def test_requests_that_end_give_their_gates_back() -> None:
    steers = {"push": vector((3,)), **CONDITIONS}
    plan = plan_with_conditions(steers)
    gates = GateTable(plan, CPU, 2)
    batch = SteeredBatch(plan, CPU, None, gates=gates)  # type: ignore[arg-type]
    steer = {"push": {"strength": 1.0, "when": {"any": ["one", "two"]}}}
    for step in range(5):
        new = [(f"{step}-{i}", params(steer), 4) for i in range(2)]
        batch.begin_step(new, [f"{step - 1}-{i}" for i in range(2)])
        assert len(gates._free) == 0
    batch.begin_step([], ["4-0", "4-1"])
    assert sorted(gates._free) == [1, 2]


def plan_with_conditions(steers: dict[str, Any]) -> SteerPlan:
    plan = plan_for({name: steer for name, steer in steers.items() if name not in CONDITIONS})
    return plan.model_copy(update={"steers": {**plan.steers, **planned()}})


def test_tests_are_mapped_to_the_tokens_of_the_prompt() -> None:
    gates = table()
    (site,) = fill_condition_tables(CONDITIONS, layers=range(5), device=CPU)
    assert site.layers == (1, 3)
    taken = gates.take("a", [Dose("x", 1.0, gate=ANY)], prompt_len=3)
    requests = {"a": SteeredRequest((), 3, {}, (), taken.gates, taken.tests)}
    rules = condition_rules(["b", "a"], requests, site, torch.zeros(1))
    out = TokenMap(
        torch.full((2, 7), -1, dtype=torch.int32),
        torch.full((2, 2, 7), -1.0),
        gate=torch.full((2, 7), -1, dtype=torch.int32),
        gates=gates.gates,
    )
    starts, positions = torch.tensor([0, 2, 6]), torch.tensor([0, 1, 0, 1, 2, 3])
    torch_gather.map_tokens(rules, starts, positions, out)
    first = 4 * taken.gates[0]
    # "one" in layer 1 at the last token of the prompt, "two" in layer 3 at each of its three.
    assert out.strengths[0, 0, :6].tolist() == [0, 0, 0, 0, 1, 0]
    assert out.strengths[1, 1, :6].tolist() == [0, 0, 1, 1, 1, 0]
    assert not out.strengths[1, 0, :6].any() and not out.strengths[0, 1, :6].any()
    assert out.gate is not None
    assert out.gate[0, 4] == first and out.gate[1, 2:5].tolist() == [first + 1] * 3


def test_conditions_of_layers_on_other_ranks_have_no_place_here() -> None:
    assert fill_condition_tables(CONDITIONS, layers=[0, 2], device=CPU) == ()


def test_only_a_condition_on_any_token_reads_the_whole_prompt() -> None:
    plan = plan_with_conditions({"push": vector((3,)), **CONDITIONS})
    assert not reads_whole_prompt([Dose("push", 1.0)], plan)
    assert not reads_whole_prompt([Dose("push", 1.0, gate=Gate(("one",)))], plan)
    assert reads_whole_prompt([Dose("push", 1.0), Dose("push", 2.0, gate=ANY)], plan)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ({"one": 2.0}, "one is a condition, which changes nothing by itself"),
        ({"push": {"when": "push"}}, "when 'push', which is no condition; conditions: one, two"),
        ({"push": {"when": {"any": []}}}, "with 0 conditions; allowed: 1 to 4"),
        ({"push": {"when": {"any": ["one", "one"]}}}, "with 2 conditions; allowed: 1 to 4, each"),
        ({"push": {"when": {"none": ["one"]}}}, "a condition's name,"),
        ({"push": {"when": ["one"]}}, "a condition's name,"),
        ({"push": {"when": "one", "phase": "all"}}, "a phase with tokens of the prompt"),
        ({"push": {"when": "one", "phase": {"prompt": "-1:"}}}, "with tokens of the prompt"),
        ({"early": {"when": "two"}}, "in layer 0,2 and has when 'two'.* choose layers from 3"),
        ({"push": {"strength": "dynamic", "when": "one"}}, "has 'when' and a dynamic strength"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_with_the_reason(steer: Any, message: str) -> None:
    plan = plan_with_conditions({"push": vector((3,)), "early": vector((0, 2)), **CONDITIONS})
    with pytest.raises(SteerError, match=message):
        plan.doses(steer)


def test_a_layer_before_the_condition_may_act_from_the_second_token_on() -> None:
    plan = plan_with_conditions({"early": vector((0, 2)), **CONDITIONS})
    for phase in ("generation", {"answer": "1:"}):
        (dose,) = plan.doses({"early": {"when": "two", "phase": phase}})
        assert dose.gate == ALONE
    (dose,) = plan.doses({"early": {"when": "one", "layers": "2"}})
    assert dose.phase == "answer"


@pytest.mark.parametrize("backend", [cpu, torch_gather], ids=["cpu", "torch"])
def test_a_gated_dose_acts_once_its_gate_is_open(backend: Any) -> None:
    """In a step of decoding, beside a dose without a gate."""
    push = vector((3,))
    (site_table,) = fill_layer_bank(
        {"push": push}, layers=range(5), device=CPU, project=lambda _layer, rows: rows
    ).tables
    gates = table()
    site = SteeredSite(
        site_table, backend, max_doses=2, max_tokens=4, device=CPU, gates=gates.gates
    )
    site.start_serving()
    dose = Dose("push", 2.0, phase="answer", gate=ALONE)
    taken = gates.take("a", [dose], prompt_len=3)
    requests = {
        "a": SteeredRequest((dose,), 3, {}, (), taken.gates, taken.tests),
        "b": SteeredRequest((Dose("push", 1.0),), 3),
    }
    ones = np.ones(2, dtype=np.int64)
    step = Step(["a", "b"], ones, ones, torch.tensor([0, 1, 2]), torch.tensor([5, 5]))
    for verdict, strengths in ((0.0, [0.0, 1.0]), (1.0, [2.0, 1.0])):
        gates.gates.verdicts[taken.gates[0], 0] = verdict
        site.begin_step()
        site.prepare(step, requests, torch.zeros(1))
        hidden = torch.zeros(2, 5)
        site.steer_(hidden, None, 0)
        torch.testing.assert_close(hidden, torch.tensor(strengths)[:, None] * push.vectors)
