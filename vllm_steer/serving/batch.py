"""The batch in flight: which of its requests are steered, and the rows of each tensor they own.

A runner adapter calls ``begin`` when a step starts and ``announce`` once the step's rows are known;
the sites in the layers are prepared then, and the head asks ``rows_of`` for the tensor it is given.
A step that was begun but not announced means that vLLM no longer calls what the
adapter wrapped: that raises, so nothing runs unsteered unseen.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vllm_steer.bank import Shelf
from vllm_steer.compat.patching import works_otherwise
from vllm_steer.doses import Dose
from vllm_steer.kernels.lm_steer import LMSteerForm, SteeredRows
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.guided_site import GuidedSite
from vllm_steer.serving.pairs import Uses, steered_rows
from vllm_steer.serving.rows import BatchRows, SteeredRequest, Step
from vllm_steer.serving.streams.head_pass import HeadPass, first_pass, second_pass
from vllm_steer.serving.streams.in_batch import DynamicPart
from vllm_steer.serving.streams.message import Turn
from vllm_steer.serving.streams.strengths import StepStrengths

_BATCHES_KEPT = 4

FEW = 128
"""Rows that a product of the LM head takes in about the time of one: its weights set the pace."""


class SteeredBatch:
    """Steered requests and rows of one worker. Between steps of real requests it is idle.

    ``max_rows`` bounds the logits rows of a step, None: nothing does. ``rows_at_once`` is how many
    rows the head takes at once where there are more: ``max_rows``, or ``FEW`` in a small engine.
    """

    def __init__(
        self,
        plan: SteerPlan,
        device: torch.device,
        form: LMSteerForm,
        sites: Sequence[GuidedSite] = (),
        *,
        max_rows: int | None = None,
    ) -> None:
        self.form = form
        self.rows_at_once = None if max_rows is None else max(max_rows, FEW)
        self._plan = plan
        self._device = device
        self._sites = sites
        self._requests: dict[str, SteeredRequest] = {}
        self._idle = True
        self._announced = False
        self._sampled: BatchRows | None = None
        self._tokens: BatchRows | None = None
        self._hidden_states: torch.Tensor | None = None
        self._uses: dict[int, Uses] = {}
        self._placed: dict[int, Any] = {}
        self._batches: dict[tuple[tuple[str, ...], bytes], dict[int, Any]] = {}
        self.dynamic = DynamicPart(plan, device)
        self._history = self.dynamic.pool.values

    @property
    def has_steered_requests(self) -> bool:
        """Whether any live request of this worker is steered."""
        return bool(self._requests or self.dynamic.requests)

    def begin(
        self,
        new: Iterable[tuple[str, Any, int]],
        finished: Iterable[str],
        turn: Turn | None = None,
    ) -> None:
        """Start a step: requests ``(req_id, sampling_params, prompt_len)`` that came, ids that
        ended, and what dynamic requests do in it.
        """
        self._idle = False
        self._announced = False
        self.dynamic.begin(turn)
        for req_id in finished:
            self.dynamic.requests.remove(req_id)
            self._set_request(req_id, None)
        for req_id, sampling_params, prompt_len in new:
            self._set_request(req_id, self.dynamic.steered(req_id, sampling_params, prompt_len))
        if self._history is not self.dynamic.pool.values:
            self._history = self.dynamic.pool.values
            for site in self._sites:
                site.forget()
        self._tokens = None
        for site in self._sites:
            if self.has_steered_requests:
                site.expect()
            else:
                site.idle()

    def rest(self) -> None:
        """The next forward pass is a dummy run."""
        self._idle = True
        for site in self._sites:
            site.idle()

    def announce(self, step: Step) -> None:
        """The rows and tokens of the step that has begun."""
        self._announced = True
        self._tokens = BatchRows(step.req_ids, step.tokens)
        sampled = BatchRows(step.req_ids, step.logits)
        if not sampled.same_as(self._sampled):
            self._sampled = sampled
            self._placed = self._placed_for(sampled)
        for site in self._sites:
            site.prepare(step, self._requests, self._history)
        self.dynamic.announce(step.req_ids)

    def require_announced(self) -> None:
        """Raise if the step that has begun has ended without ``announce``, with steered requests.

        Its layers then ran on the doses of another step, or on none.
        """
        if self.has_steered_requests and not self._announced:
            raise RuntimeError(works_otherwise("a step with steered requests ran without its rows"))

    @contextmanager
    def over_tokens(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Within it the head is given rows of ``hidden_states``, one per token: prompt logprobs."""
        self._hidden_states = hidden_states
        try:
            yield
        finally:
            self._hidden_states = None

    @property
    def is_idle(self) -> bool:
        """Whether the pass in flight is a dummy run."""
        return self._idle

    def parts_of(self, x: torch.Tensor) -> list[slice]:
        """The rows of ``x`` that the head steers at once: all of a step's, of a prompt's some.

        A step's logits rows are within the bound. Prompt logprobs may come for a whole chunk of a
        prompt, whose changes would take many times the memory that vLLM's profile has seen. A row's
        result does not depend on the rows beside it, so the parts give what the whole would.
        """
        num_rows = x.shape[0]
        if self._hidden_states is None or self.rows_at_once is None:
            return [slice(0, num_rows)]
        most = self.rows_at_once
        return [slice(at, at + most) for at in range(0, num_rows, most)]

    def rows_of(self, x: torch.Tensor, shelf: Shelf) -> Any:
        """The pairs of ``x`` and a shelf's slots, as the form placed them; None if no row of ``x``
        takes one of them.
        """
        if self._idle:
            return self._rehearsal(x.shape[0], shelf)
        if not self._requests:
            return None
        if self._tokens is None or self._sampled is None:
            raise RuntimeError(works_otherwise("a step reached the LM head without its rows"))
        if self._hidden_states is not None:
            window = self._tokens.window(self._first_token(x, self._hidden_states), x.shape[0])
            return self._place(steered_rows(window, self._uses_of(shelf)), shelf)
        if id(shelf) not in self._placed:
            pairs = steered_rows(self._sampled, self._uses_of(shelf))
            self._placed[id(shelf)] = self._place(pairs, shelf)
        assert self._sampled.num_rows == x.shape[0], (
            f"vllm-steer: {x.shape[0]} logits rows, {self._sampled.num_rows} announced"
        )
        return self._placed[id(shelf)]

    def step_of(self, x: torch.Tensor) -> StepStrengths | None:
        """What the step has to do with the logits of ``x`` to work out strengths, if anything."""
        step = self.dynamic.step
        if self._idle or self._hidden_states is not None or step is None:
            return None
        assert self._sampled is not None and self._sampled.one_each
        assert self._sampled.num_rows == x.shape[0]
        return step

    def first_pass(self, shelf: Shelf, step: StepStrengths) -> HeadPass | None:
        """The pairs of the step's rows and probes; None without any."""
        assert self._sampled is not None
        return first_pass(step, self._sampled, self._uses_of(shelf), shelf, self.dynamic.requests)

    def second_pass(self, shelf: Shelf, step: StepStrengths) -> HeadPass | None:
        """The same for the rows that come again under their strengths."""
        assert self._sampled is not None
        return second_pass(step, self._sampled, self._uses_of(shelf), shelf, self.dynamic.requests)

    def place_pass(self, head_pass: HeadPass | None, shelf: Shelf) -> Any:
        """A pass's pairs as the form places them, under the strengths that are known by now."""
        if head_pass is None:
            return None
        placed = self._place(head_pass.steered, shelf)
        head_pass.scale_by(self._history, placed.scales)
        return placed

    def _placed_for(self, rows: BatchRows) -> dict[int, Any]:
        """What is placed for these rows; streams that take turns bring batches back."""
        key = (tuple(rows.req_ids), rows.counts.tobytes())
        if key not in self._batches and len(self._batches) == _BATCHES_KEPT:
            del self._batches[next(iter(self._batches))]
        return self._batches.setdefault(key, {})

    def _uses_of(self, shelf: Shelf) -> Uses:
        if id(shelf) not in self._uses:
            self._uses[id(shelf)] = Uses(shelf, self._requests)
        return self._uses[id(shelf)]

    def _place(self, pairs: SteeredRows | None, shelf: Shelf) -> Any:
        return None if pairs is None else self.form.place(pairs, shelf.tables, self._device)

    def _rehearsal(self, num_rows: int, shelf: Shelf) -> Any:
        """All rows under as many steers as a request may take, the widest: in dummy runs, so that
        vLLM's memory profile counts the operation at its largest and its warm-up reaches it.
        """
        rows = BatchRows(("dummy",), np.array([num_rows]))
        steers = shelf.widest(self._plan.limits.max_steers_per_request)
        request = SteeredRequest(tuple(Dose(name, 1.0) for name in steers), prompt_len=1)
        return self._place(steered_rows(rows, Uses(shelf, {"dummy": request})), shelf)

    def _set_request(self, req_id: str, request: SteeredRequest | None) -> None:
        if request is not None:
            self._requests[req_id] = request
        elif self._requests.pop(req_id, None) is None:
            return
        self._sampled = None
        self._batches.clear()
        for uses in self._uses.values():
            uses.set(req_id, request)
        for site in self._sites:
            site.forget()

    @staticmethod
    def _first_token(x: torch.Tensor, hidden_states: torch.Tensor) -> int:
        """The row of ``hidden_states`` that its slice ``x`` begins with."""
        if x.untyped_storage().data_ptr() != hidden_states.untyped_storage().data_ptr():
            raise RuntimeError(
                works_otherwise(
                    "prompt logprobs are of rows that are no slice of the model's output"
                )
            )
        return (x.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
