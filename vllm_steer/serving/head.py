"""The site ``head``: wraps the methods of the model that compute logits.

``model.compute_logits`` is wrapped on the target model's instance. It is called outside CUDA graphs
and compiled code, by sampling and by prompt logprobs, and never by a draft model. Steers of the
hidden state act on its argument; ``offset`` steers act inside it, on what the LM head gives before
any soft cap and logit scale, at ``LogitsProcessor._get_logits``.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_steer.bank import HeadBank, HeadTable
from vllm_steer.compat.patching import unknown_behavior, wrap
from vllm_steer.errors import SteerError
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.dynamic.head_product import HeadProduct
from vllm_steer.serving.dynamic.strengths import DynamicStep
from vllm_steer.serving.head_rows import HeadRows

RowParts = list[tuple[slice, Any]]
"""Slices of rows, and the backend's metadata for each."""


@dataclass
class SteeredHead:
    """A model's head with a bank in front of it; ``calls`` counts passes that steered rows.

    ``is_profiled``: the memory profile of start-up is to see the widest step. ``serves_dynamic``:
    the engine serves dynamic strengths.
    """

    bank: HeadBank
    rows: HeadRows
    is_profiled: bool = False
    serves_dynamic: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    _logits_parts: RowParts = field(default_factory=list, repr=False)
    _starting: bool = True

    def attach(self, model: nn.Module) -> None:
        """Wrap the instance's methods. Raises ``SteerError`` if the model has no such head."""
        if not hasattr(model, "compute_logits"):
            raise SteerError(
                f"{type(model).__name__} has no compute_logits: there is no LM head to steer"
            )
        wrap(model, "compute_logits", self._steered)
        if self.bank.logits is not None:
            wrap(_logits_processor(model), "_get_logits", self._offset)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the steers run on, for hidden states and logits in ``dtype``."""
        for table in (self.bank.hidden, self.bank.logits):
            if table is not None:
                self.rows.backend.warm_up(table.weights, dtype)

    def unreached_tables(self) -> list[str]:
        """The tables with steers that no forward pass has reached so far."""
        tables = {"hidden": self.bank.hidden, "logits": self.bank.logits}
        return [name for name, table in tables.items() if table and not self.calls[name]]

    def start_serving(self) -> None:
        """Start-up is over: dummy runs no longer compute the widest step."""
        self._starting = False

    def _steered(
        self, original: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        compute = functools.partial(self._compute, original, args, kwargs)
        step = self.rows.dynamic_step_of(hidden_states)
        if step is not None:
            return self._with_strengths(compute, hidden_states, step)
        logits = compute(hidden_states, functools.partial(self._parts, hidden_states))
        if self._is_profiling and self.rows.is_dummy_run and logits is not None:
            self._run_widest(hidden_states, logits)
        return logits

    def _compute(
        self,
        original: Any,
        args: Any,
        kwargs: Any,
        hidden_states: torch.Tensor,
        parts: Callable[[HeadTable | None], RowParts],
    ) -> Any:
        """The model's logits of ``hidden_states``, whose steered pairs ``parts`` gives by table."""
        hidden_parts, self._logits_parts = parts(self.bank.hidden), parts(self.bank.logits)
        if hidden_parts and _covers_all_rows(hidden_parts, hidden_states):
            hidden_states = self._apply("hidden", hidden_states, hidden_parts[0][1])
        elif hidden_parts:
            unsteered, hidden_states = hidden_states, hidden_states.clone()
            for rows, metadata in hidden_parts:
                hidden_states[rows] = self._apply("hidden", unsteered[rows], metadata)
        try:
            return original(hidden_states, *args, **kwargs)
        finally:
            self._logits_parts = []

    def _run_widest(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        """Compute the widest step, so that vLLM's memory profile includes it.

        A dummy run has one row per request; a step with speculation has more, and so may a part of
        a prompt. The dummy run's own rows have already been steered.
        """
        num_rows = self.rows.rows_at_once or 0
        for name, x in (("hidden", hidden_states), ("logits", logits)):
            table = getattr(self.bank, name)
            if table is not None and num_rows > x.shape[0]:
                wide = x.new_zeros(num_rows, x.shape[1])
                self._apply(name, wide, self.rows.metadata_for(wide, table))
        if self.serves_dynamic:
            self.rows.strengths.warm_up(logits)

    @property
    def _is_profiling(self) -> bool:
        return self.is_profiled and self._starting

    def _with_strengths(
        self, compute: Callable[..., Any], hidden_states: torch.Tensor, step: DynamicStep
    ) -> torch.Tensor:
        """The step's logits, and the strengths of its dynamic requests.

        Probes at the head are extra rows of the product: of one product up to ``rows_at_once``
        rows, beyond that of several, whose logits are dropped one after the other. A request that
        is its own base is computed again once its strengths are known.
        """
        num_rows, whole = hidden_states.shape[0], hidden_states
        if step.probes:
            whole = torch.cat([whole, _rows_at([p.row for p in step.probes], hidden_states)])
        pairs = self._pairs(self.rows.first_product, step)
        logits: torch.Tensor | None = None
        for first, last in _spans(num_rows, whole.shape[0], self.rows.rows_at_once):
            part = [
                head_product.part(first, last) if head_product is not None else None
                for head_product in pairs
            ]
            part_logits = self._pass(compute, whole[first:last], part)
            logits = part_logits if logits is None else logits
            self.rows.strengths.compute(step, logits, part_logits, first)
        assert logits is not None
        self.rows.strengths.finish_step(step)
        logits = logits[:num_rows]
        if step.alone:
            rows = _rows_at(step.alone, hidden_states)
            steered = self._pass(compute, rows, self._pairs(self.rows.second_product, step))
            (indices,) = upload([np.array(step.alone, dtype=np.int64)], logits.device)
            logits.index_copy_(0, indices, steered)
        return logits

    def _pairs(
        self, of: Callable[..., HeadProduct | None], step: DynamicStep
    ) -> list[HeadProduct | None]:
        """The pairs of a step's pass, by table."""
        return [of(table, step) for table in self._tables]

    def _pass(
        self, compute: Callable[..., Any], rows: torch.Tensor, pairs: Sequence[HeadProduct | None]
    ) -> torch.Tensor:
        """The logits of ``rows`` under these pairs, by table."""
        metadata = {
            id(table): self.rows.prepare_product(head_product, table)
            for table, head_product in zip(self._tables, pairs, strict=True)
        }

        def parts(table: HeadTable | None) -> RowParts:
            prepared = metadata.get(id(table))
            return [] if prepared is None else [(slice(0, rows.shape[0]), prepared)]

        logits: torch.Tensor | None = compute(rows, parts)
        if logits is None:
            raise RuntimeError(
                unknown_behavior("this rank has no logits to compute dynamic strengths from")
            )
        return logits

    def _offset(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(*args, **kwargs)
        if logits is None:
            return None
        parts = self._logits_parts
        if parts and _covers_all_rows(parts, logits):
            return self._apply("logits", logits, parts[0][1])
        for rows, metadata in parts:
            logits[rows] = self._apply("logits", logits[rows], metadata)
        return logits

    def _parts(self, x: torch.Tensor, table: HeadTable | None) -> RowParts:
        """The rows of ``x`` that are steered at once, and their pairs."""
        if table is None:
            return []
        parts = [(part, self.rows.metadata_for(x[part], table)) for part in self.rows.parts_of(x)]
        return [(part, metadata) for part, metadata in parts if metadata is not None]

    @property
    def _tables(self) -> list[HeadTable]:
        return [table for table in (self.bank.hidden, self.bank.logits) if table is not None]

    def _apply(self, name: str, x: torch.Tensor, metadata: Any) -> torch.Tensor:
        self.calls[name] += 1
        return self.rows.backend.steer_rows(x, getattr(self.bank, name).weights, metadata)


def _covers_all_rows(parts: RowParts, x: torch.Tensor) -> bool:
    """True if there is one part with all rows."""
    return len(parts) == 1 and parts[0][0].start == 0 and parts[0][0].stop >= x.shape[0]


def _spans(num_rows: int, num_all: int, most: int | None) -> list[tuple[int, int]]:
    """Where the products of a step begin and end: the batch's rows in the first of them."""
    first = num_all if most is None else min(num_all, max(num_rows, most))
    starts = [0, *range(first, num_all, most or 1)]
    return list(itertools.pairwise([*starts, num_all]))


def _rows_at(rows: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    (where,) = upload([np.array(rows, dtype=np.int64)], x.device)
    return x.index_select(0, where)


def _logits_processor(model: nn.Module) -> Any:
    """The module that applies the LM head; a LoRA wrapper counts as the one it wraps."""
    processors = {name: m for name, m in model.named_modules() if hasattr(m, "_get_logits")}
    outer = {n: m for n, m in processors.items() if not n.endswith("base_layer")}
    if len(outer) != 1:
        raise SteerError(
            f"{type(model).__name__} has {len(outer)} logits processors; an offset steer needs "
            "exactly one"
        )
    return next(iter(outer.values()))
