"""The gates of a worker's requests: whether their gated doses act, decided on the device.

A gate has a row of verdicts, one per condition. The pass that computes the prompt writes them; the
kernels that steer read them, in the same pass where they come later in the model. A request keeps
its gates as long as it lives, so a prompt that is computed again after a preemption, or taken from
the prefix cache then, finds its verdicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from vllm_steer.doses import Dose, Gate, Span
from vllm_steer.kernels.guidance import Gates
from vllm_steer.plan import SteerPlan
from vllm_steer.request.gates import MOST_CONDITIONS

GATES_PER_REQUEST_SLOT: Final = 8
"""Rows for each request that may run at once and each of its steers: preempted ones keep theirs."""


@dataclass(frozen=True)
class PromptTest:
    """A condition, by its entry in the device tables, that is read at some tokens of a prompt, and
    the verdict that it writes to.
    """

    condition: str
    verdict: int
    span: Span


@dataclass(frozen=True)
class RequestGates:
    """By index of a gated dose its gate; and the tests of the prompt that decide about them."""

    gates: Mapping[int, int]
    tests: tuple[PromptTest, ...]


class GateTable:
    """The gates of all requests of a worker. ``most`` bounds those that are in use at once."""

    def __init__(self, plan: SteerPlan, device: torch.device, most: int) -> None:
        self.gates = Gates(
            verdicts=torch.zeros(most + 1, MOST_CONDITIONS, device=device),
            needed=torch.zeros(most + 1, device=device),
        )
        self._plan = plan
        self._free = list(range(most, 0, -1))
        self._rows: dict[str, dict[Gate, int]] = {}

    def take(self, req_id: str, doses: Sequence[Dose], prompt_len: int) -> RequestGates:
        """The gates of a request's doses; those that it has where it came before."""
        rows = self._rows.get(req_id)
        needed = list(dict.fromkeys(dose.gate for dose in doses if dose.gate is not None))
        if rows is None or set(rows) != set(needed):
            self.give_back(req_id)
            rows = {gate: self._open_row(gate) for gate in needed}
            if rows:
                self._rows[req_id] = rows
        return RequestGates(
            {i: rows[dose.gate] for i, dose in enumerate(doses) if dose.gate is not None},
            tuple(
                test for gate, row in rows.items() for test in self._tests(gate, row, prompt_len)
            ),
        )

    def give_back(self, req_id: str) -> None:
        """A request has ended."""
        self._free += self._rows.pop(req_id, {}).values()

    def _open_row(self, gate: Gate) -> int:
        if not self._free:
            raise RuntimeError(
                f"vllm-steer: more than {len(self.gates.needed) - 1} gates are in use at once"
            )
        row = self._free.pop()
        self.gates.verdicts[row].zero_()
        self.gates.needed[row].fill_(1.0 if gate.needs == "any" else float(len(gate.conditions)))
        return row

    def _tests(self, gate: Gate, row: int, prompt_len: int) -> Sequence[PromptTest]:
        tests = []
        conditions = zip(gate.entries, self._plan.conditions_of(gate), strict=True)
        for column, (entry, steer) in enumerate(conditions):
            assert steer.condition is not None
            first = prompt_len - 1 if steer.condition.tokens == "last" else 0
            verdict = row * MOST_CONDITIONS + column
            tests.append(PromptTest(entry, verdict, (first, prompt_len)))
        return tests
