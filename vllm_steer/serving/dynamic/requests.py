"""The dynamic requests of a worker, and the strengths of all their generation steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.streams import needs_streams, probed_doses

Role = int | None
"""The role of a logits row: the index of the dose that it probes; None for the base."""


class StrengthPool:
    """Strengths on the device, ``values [N]`` float32: one per dynamic dose and generation step.

    A dose keeps its range as long as its request lives, so tokens that are computed again after a
    preemption are steered as before. The pool doubles when it is full, when a request arrives.
    """

    def __init__(self, device: torch.device, size: int = 4096) -> None:
        self.values = torch.zeros(size, device=device)
        self._free = [(0, size)]

    @property
    def num_taken(self) -> int:
        """Number of strengths in use."""
        return self.values.numel() - sum(length for _, length in self._free)

    def take(self, length: int) -> int:
        """The first index of a range of ``length`` zeros."""
        for index, (start, size) in enumerate(self._free):
            if size >= length:
                self._free[index : index + 1] = (
                    [(start + length, size - length)] if size > length else []
                )
                self.values[start : start + length] = 0.0
                return start
        num_before = self.values.numel()
        self.values = torch.cat([self.values, self.values.new_zeros(max(num_before, length))])
        self.give_back(num_before, self.values.numel() - num_before)
        return self.take(length)

    def give_back(self, start: int, length: int) -> None:
        """Free a range."""
        ranges = sorted([*self._free, (start, length)])
        merged = ranges[:1]
        for begin, size in ranges[1:]:
            last, before = merged[-1]
            if last + before == begin:
                merged[-1] = (last, before + size)
            else:
                merged.append((begin, size))
        self._free = merged


@dataclass(eq=False)
class DynamicRequest:
    """One request, and the state of its next token's strengths.

    doses   all of its doses
    steps   by index of a dynamic dose: in how many generation steps it acts
    starts  by index of a dynamic dose: where its strengths begin in the pool
    probed  the dynamic doses with a probe stream; the probes of the others are extra LM-head rows,
            from the base's hidden state
    alone   True if the request is its own base: no dose acts inside the layers
    last_step    the last generation step whose strengths are in the pool
    stored_rows  logits rows ``[V]`` of the next step, until all streams have computed theirs
    """

    doses: tuple[Dose, ...]
    steps: Mapping[int, int]
    starts: Mapping[int, int]
    probed: tuple[int, ...]
    alone: bool
    last_step: int = -1
    stored_rows: dict[Role, torch.Tensor] = field(default_factory=dict)

    @property
    def at_head(self) -> bool:
        """Whether a dynamic dose acts at the LM head."""
        return len(self.probed) < len(self.steps)

    def active(self, step: int) -> list[int]:
        """The dynamic doses that act at a generation step."""
        return [dose for dose, steps in self.steps.items() if step < steps]


class DynamicRequests:
    """The dynamic requests of a worker by id, and the role of each of their streams."""

    def __init__(self, plan: SteerPlan, pool: StrengthPool) -> None:
        self.pool = pool
        self._plan = plan
        self._requests: dict[str, DynamicRequest] = {}
        self._roles: dict[str, tuple[str, Role]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_known(self) -> int:
        """Requests and streams that have not ended; a stream may outlive its request."""
        return len(self._requests) + len(self._roles)

    def add(self, main: str, doses: tuple[Dose, ...], max_tokens: int) -> DynamicRequest:
        """The dynamic request ``main``, created when its first stream arrives."""
        if main not in self._requests:
            steps = {
                index: min(max_tokens, self._plan.steer_of(dose).steps or max_tokens)
                for index, dose in enumerate(doses)
                if dose.dynamic
            }
            self._requests[main] = DynamicRequest(
                doses=doses,
                steps=steps,
                starts={index: self.pool.take(length) for index, length in steps.items()},
                probed=probed_doses(doses, self._plan),
                alone=not needs_streams(doses, self._plan),
            )
            if self._requests[main].alone:
                self._roles[main] = (main, None)
        return self._requests[main]

    def add_stream(self, stream: str, main: str, role: Role) -> None:
        """Add a base or probe stream of a known request."""
        self._roles[stream] = (main, role)

    def remove(self, req_id: str) -> None:
        """Remove a request or a stream that has ended."""
        self._roles.pop(req_id, None)
        request = self._requests.pop(req_id, None)
        if request is not None:
            for dose, start in request.starts.items():
                self.pool.give_back(start, request.steps[dose])

    def get(self, main: str) -> DynamicRequest | None:
        """The dynamic request of that id; None for any other."""
        return self._requests.get(main)

    def role(self, req_id: str) -> tuple[str, DynamicRequest, Role] | None:
        """The request whose base or probe a stream is, and its role; None for any other request."""
        main, role = self._roles.get(req_id, (None, None))
        request = self._requests.get(main) if main is not None else None
        return None if main is None or request is None else (main, request, role)
