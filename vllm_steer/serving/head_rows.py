"""Which rows of the LM head's input are steered: the pairs of row and slot of the current step.

The pairs of a step's logits rows are kept by the head's table, so that a batch that does not change
costs one comparison per step. Prompt logprobs ask for rows of whole prompts instead, see
``over_tokens``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_steer.bank import HeadTable
from vllm_steer.compat.patching import unknown_behavior
from vllm_steer.doses import Dose
from vllm_steer.kernels.guidance import Gates
from vllm_steer.kernels.lm_steer import LMSteerBackend, SteeredRows
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.dynamic.head_product import HeadProduct, first_product, second_product
from vllm_steer.serving.dynamic.strengths import DynamicStep, StrengthComputation
from vllm_steer.serving.dynamic.worker_state import DynamicState
from vllm_steer.serving.row_slots import RequestSlots, steered_rows
from vllm_steer.serving.step import BatchRows, SteeredRequest, Step

_BATCHES_KEPT = 4

MIN_ROWS_AT_ONCE = 128
"""Rows that a product of the LM head takes in about the time of one: its weights set the pace."""


class PreparedRows(NamedTuple):
    """The pairs of some rows as the backend prepared them; where some have gates, the gate of each
    pair, and its scale while that is open.
    """

    metadata: Any
    gate: torch.Tensor | None = None
    scales: torch.Tensor | None = None


class HeadRows:
    """The LM head's view of a batch.

    ``requests`` are the steered requests of the batch, which fills them. ``max_rows`` bounds the
    logits rows of a step; None if nothing does. ``rows_at_once`` is how many rows the head computes
    at once where there are more: ``max_rows``, or ``MIN_ROWS_AT_ONCE`` in a small engine.
    ``max_doses`` is how many steers a request may have; ``gates`` is None in an engine without
    conditions.
    """

    def __init__(
        self,
        requests: Mapping[str, SteeredRequest],
        dynamic: DynamicState,
        backend: LMSteerBackend,
        device: torch.device,
        *,
        max_rows: int | None,
        max_doses: int,
        gates: Gates | None = None,
    ) -> None:
        self.backend = backend
        self.rows_at_once = None if max_rows is None else max(max_rows, MIN_ROWS_AT_ONCE)
        self.is_dummy_run = True
        self._requests = requests
        self._dynamic = dynamic
        self._device = device
        self._max_doses = max_doses
        self._gates = gates
        self._logits_rows: BatchRows | None = None
        self._token_rows: BatchRows | None = None
        self._hidden_states: torch.Tensor | None = None
        self._slots: dict[int, RequestSlots] = {}
        self._prepared: dict[int, PreparedRows | None] = {}
        self._batches: dict[tuple[tuple[str, ...], bytes], dict[int, PreparedRows | None]] = {}

    @property
    def strengths(self) -> StrengthComputation:
        """Computes the strengths of dynamic requests."""
        return self._dynamic.strengths

    def begin_step(self) -> None:
        """A step has begun; ``announce`` has to follow if a request is steered."""
        self.is_dummy_run = False
        self._token_rows = None

    def begin_dummy_run(self) -> None:
        """The next forward pass is a dummy run."""
        self.is_dummy_run = True

    def announce(self, step: Step) -> None:
        """The rows and tokens of the current step."""
        self._token_rows = BatchRows(step.req_ids, step.tokens)
        logits_rows = BatchRows(step.req_ids, step.logits)
        if not logits_rows.same_as(self._logits_rows):
            self._logits_rows = logits_rows
            self._prepared = self._prepared_for(logits_rows)

    def set_request(self, req_id: str, request: SteeredRequest | None) -> None:
        """A steered request came, came again with other steers, or ended (None)."""
        self._logits_rows = None
        self._batches.clear()
        for slots in self._slots.values():
            slots.set(req_id, request)

    @contextmanager
    def over_tokens(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Within it the head is given rows of ``hidden_states``, one per token: prompt logprobs."""
        self._hidden_states = hidden_states
        try:
            yield
        finally:
            self._hidden_states = None

    def parts_of(self, x: torch.Tensor) -> list[slice]:
        """The rows of ``x`` that the head steers at once: all of a step's, of a prompt's some.

        A step's logits rows are within the bound. Prompt logprobs may be computed for a whole chunk
        of a prompt, whose changes would take many times the memory in vLLM's profile. A row's
        result does not depend on the rows beside it, so the parts give what the whole would.
        """
        num_rows = x.shape[0]
        if self._hidden_states is None or self.rows_at_once is None:
            return [slice(0, num_rows)]
        size = self.rows_at_once
        return [slice(at, at + size) for at in range(0, num_rows, size)]

    def metadata_for(self, x: torch.Tensor, table: HeadTable) -> Any:
        """The pairs of ``x`` and a table's slots, as the backend prepared them; None if no row of
        ``x`` has one of its steers.
        """
        if self.is_dummy_run:
            return self._widest(x.shape[0], table)
        if not self._requests:
            return None
        if self._token_rows is None or self._logits_rows is None:
            raise RuntimeError(unknown_behavior("a step reached the LM head without its rows"))
        if self._hidden_states is not None:
            window = self._token_rows.window(_first_token(x, self._hidden_states), x.shape[0])
            return self._ready(self._prepare(steered_rows(window, self._slots_of(table)), table))
        if id(table) not in self._prepared:
            pairs = steered_rows(self._logits_rows, self._slots_of(table))
            self._prepared[id(table)] = self._prepare(pairs, table)
        assert self._logits_rows.num_rows == x.shape[0], (
            f"vllm-steer: {x.shape[0]} logits rows, {self._logits_rows.num_rows} announced"
        )
        return self._ready(self._prepared[id(table)])

    def dynamic_step_of(self, x: torch.Tensor) -> DynamicStep | None:
        """The strengths that the step computes from the logits of ``x``; None if none."""
        step = self._dynamic.step
        if self.is_dummy_run or self._hidden_states is not None or step is None:
            return None
        assert self._logits_rows is not None and self._logits_rows.one_each
        assert self._logits_rows.num_rows == x.shape[0]
        return step

    def first_product(self, table: HeadTable, step: DynamicStep) -> HeadProduct | None:
        """The pairs of the step's rows and probes; None if there are none."""
        return self._pass(first_product, table, step)

    def second_product(self, table: HeadTable, step: DynamicStep) -> HeadProduct | None:
        """The pairs of the rows that are computed again under their strengths."""
        return self._pass(second_product, table, step)

    def prepare_product(self, head_product: HeadProduct | None, table: HeadTable) -> Any:
        """A pass's pairs as the backend places them, under the strengths that are known by now."""
        if head_product is None:
            return None
        metadata = self._ready(self._prepare(head_product.steered, table))
        head_product.scale_by(self._dynamic.pool.values, metadata.scales)
        return metadata

    def _pass(self, make: Any, table: HeadTable, step: DynamicStep) -> HeadProduct | None:
        assert self._logits_rows is not None
        slots, requests = self._slots_of(table), self._dynamic.requests
        head_product: HeadProduct | None = make(step, self._logits_rows, slots, table, requests)
        return head_product

    def _prepared_for(self, rows: BatchRows) -> dict[int, PreparedRows | None]:
        """What is kept for these rows; streams bring the same batches back in turns."""
        key = (tuple(rows.req_ids), rows.counts.tobytes())
        if key not in self._batches and len(self._batches) == _BATCHES_KEPT:
            del self._batches[next(iter(self._batches))]
        return self._batches.setdefault(key, {})

    def _slots_of(self, table: HeadTable) -> RequestSlots:
        if id(table) not in self._slots:
            self._slots[id(table)] = RequestSlots(table, self._requests)
        return self._slots[id(table)]

    def _prepare(self, pairs: SteeredRows | None, table: HeadTable) -> PreparedRows | None:
        if pairs is None:
            return None
        metadata = self.backend.prepare(pairs, table.weights, self._device)
        if pairs.gates is None:
            return PreparedRows(metadata)
        (gate,) = upload([pairs.gates], self._device)
        return PreparedRows(metadata, gate, metadata.scales.clone())

    def _ready(self, prepared: PreparedRows | None) -> Any:
        """The metadata with the scales of this step: 0 behind a gate that is closed."""
        if prepared is None:
            return None
        if prepared.gate is not None and prepared.scales is not None and self._gates is not None:
            is_open = self._gates.are_open(prepared.gate)
            torch.mul(prepared.scales, is_open, out=prepared.metadata.scales)
        return prepared.metadata

    def _widest(self, num_rows: int, table: HeadTable) -> Any:
        """For dummy runs: all rows under as many steers as a request may have, the widest, so that
        vLLM's memory profile and warm-up see the largest operation.
        """
        rows = BatchRows(("dummy",), np.array([num_rows]))
        steers = table.widest(self._max_doses)
        request = SteeredRequest(tuple(Dose(name, 1.0) for name in steers), prompt_len=1)
        pairs = steered_rows(rows, RequestSlots(table, {"dummy": request}))
        return self._ready(self._prepare(pairs, table))


def _first_token(x: torch.Tensor, hidden_states: torch.Tensor) -> int:
    """The row of ``hidden_states`` that its slice ``x`` begins with."""
    if x.untyped_storage().data_ptr() != hidden_states.untyped_storage().data_ptr():
        raise RuntimeError(
            unknown_behavior("prompt logprobs are of rows that are no slice of the model's output")
        )
    return (x.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
