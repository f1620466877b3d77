"""Dynamic requests as a worker keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.streams.pool import StrengthPool
from vllm_steer.serving.streams.stream import needs_streams, probed_doses

Role = int | None
"""The index of the dose that a row of logits is the probe of; None for the base."""


@dataclass(eq=False)
class DynamicRequest:
    """One request, and what is known of the strengths of its next token.

    doses   all of its doses
    steps   by index of a dynamic dose: how many generation steps it has room for
    starts  by index of a dynamic dose: where its strengths begin in the pool
    probed  the dynamic doses that have a stream of their own; the others' probes are rows of the
            head, made from the base's hidden state
    alone   whether the request is its own base: it takes nothing inside the layers
    known   the last step whose strengths are in the pool
    kept    rows of logits ``[V]`` of the next step, while other streams have yet to come
    """

    doses: tuple[Dose, ...]
    steps: Mapping[int, int]
    starts: Mapping[int, int]
    probed: tuple[int, ...]
    alone: bool
    known: int = -1
    kept: dict[Role, torch.Tensor] = field(default_factory=dict)

    @property
    def at_head(self) -> bool:
        """Whether a dynamic dose acts at the LM head."""
        return len(self.probed) < len(self.steps)

    def active(self, step: int) -> list[int]:
        """The dynamic doses that act at a generation step."""
        return [dose for dose, steps in self.steps.items() if step < steps]


class DynamicRequests:
    """The dynamic requests of a worker, and which stream plays which role for which of them."""

    def __init__(self, plan: SteerPlan, pool: StrengthPool) -> None:
        self.pool = pool
        self._plan = plan
        self._requests: dict[str, DynamicRequest] = {}
        self._roles: dict[str, tuple[str, Role]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, main: str, doses: tuple[Dose, ...], max_tokens: int) -> DynamicRequest:
        """The request of that id: of its streams the first to come brings it."""
        if main not in self._requests:
            steps = {
                index: min(max_tokens, self._plan.steers[dose.steer].steps or max_tokens)
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
        """A base or probe stream of a request that is known."""
        self._roles[stream] = (main, role)

    def remove(self, req_id: str) -> None:
        """A request or a stream has ended."""
        self._roles.pop(req_id, None)
        request = self._requests.pop(req_id, None)
        if request is not None:
            for dose, start in request.starts.items():
                self.pool.give_back(start, request.steps[dose])

    def get(self, main: str) -> DynamicRequest | None:
        """The dynamic request of that id, if it is one."""
        return self._requests.get(main)

    def role(self, req_id: str) -> tuple[str, DynamicRequest, Role] | None:
        """Whose base or probe a request of the engine is; None for all others."""
        main, role = self._roles.get(req_id, (None, None))
        request = self._requests.get(main) if main is not None else None
        return None if main is None or request is None else (main, request, role)
