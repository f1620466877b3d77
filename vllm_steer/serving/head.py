"""The site ``head``: the one place that touches the model's modules.

``model.compute_logits`` is wrapped on the target model's instance. It is called outside CUDA graphs
and compiled code, by sampling and by prompt logprobs, and never by a draft model. Steers of the
hidden state act on its argument; ``offset`` steers act inside it, on what the LM head gives before
any soft cap and logit scale, at ``LogitsProcessor._get_logits``.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_steer.bank import HeadBank, Shelf
from vllm_steer.errors import SteerError
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.streams.strengths import StepStrengths


@dataclass
class SteeredHead:
    """A model's head with a bank in front of it; ``calls`` counts passes that steered rows."""

    bank: HeadBank
    batch: SteeredBatch
    calls: Counter[str] = field(default_factory=Counter)
    _logits_rows: Any = field(default=None, repr=False)

    def attach(self, model: nn.Module) -> None:
        """Wrap the instance's methods. Raises ``SteerError`` if the model has no such head."""
        if not hasattr(model, "compute_logits"):
            raise SteerError(
                f"{type(model).__name__} has no compute_logits: there is no LM head to steer"
            )
        model.compute_logits = self._steered(model.compute_logits)
        if self.bank.logits is not None:
            processor = _logits_processor(model)
            processor._get_logits = self._offset(processor._get_logits)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the steers run on, for hidden states and logits in ``dtype``."""
        for shelf in (self.bank.hidden, self.bank.logits):
            if shelf is not None:
                self.batch.form.warm_up(shelf.tables, dtype)

    def passed_shelves(self) -> list[str]:
        """The shelves with steers that no pass has reached so far."""
        shelves = {"hidden": self.bank.hidden, "logits": self.bank.logits}
        return [name for name, shelf in shelves.items() if shelf and not self.calls[name]]

    def _steered(self, original: Any) -> Any:
        @functools.wraps(original)
        def compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            compute = functools.partial(self._compute, original, args, kwargs)
            step = self.batch.step_of(hidden_states)
            if step is not None:
                return self._with_strengths(compute, hidden_states, step)
            return compute(hidden_states, functools.partial(self._rows, hidden_states))

        return compute_logits

    def _compute(
        self,
        original: Any,
        args: Any,
        kwargs: Any,
        hidden_states: torch.Tensor,
        rows: Callable[[Shelf | None], Any],
    ) -> Any:
        """The model's logits of ``hidden_states``, whose steered pairs ``rows`` gives by shelf."""
        hidden_rows, self._logits_rows = rows(self.bank.hidden), rows(self.bank.logits)
        hidden_states = self._apply("hidden", hidden_states, self.bank.hidden, hidden_rows)
        try:
            return original(hidden_states, *args, **kwargs)
        finally:
            self._logits_rows = None

    def _with_strengths(
        self, compute: Callable[..., Any], hidden_states: torch.Tensor, step: StepStrengths
    ) -> torch.Tensor:
        """The step's logits, while the strengths of its dynamic requests are worked out.

        Probes at the head are more rows of the one product; a request that is its own base is
        computed again once its strengths are known.
        """

        def rows_of(pairs: Callable[..., Any]) -> Callable[[Shelf | None], Any]:
            return lambda shelf: None if shelf is None else pairs(shelf, step)

        whole = hidden_states
        if step.probes:
            whole = torch.cat([whole, _rows_at([p.row for p in step.probes], hidden_states)])
        logits: torch.Tensor | None = compute(whole, rows_of(self.batch.first_pass))
        if logits is None:
            raise RuntimeError(
                "vllm-steer: this rank has no logits to work out dynamic strengths from: this "
                "vLLM gathers them in another way than vllm-steer knows"
            )
        self.batch.dynamic.strengths.work_out(step, logits)
        logits = logits[: hidden_states.shape[0]]
        if step.alone:
            again = compute(_rows_at(step.alone, hidden_states), rows_of(self.batch.second_pass))
            (where,) = upload([np.array(step.alone, dtype=np.int64)], logits.device)
            logits.index_copy_(0, where, again)
        return logits

    def _offset(self, original: Any) -> Any:
        @functools.wraps(original)
        def get_logits(*args: Any, **kwargs: Any) -> Any:
            logits = original(*args, **kwargs)
            if logits is None:
                return None
            return self._apply("logits", logits, self.bank.logits, self._logits_rows)

        return get_logits

    def _rows(self, x: torch.Tensor, shelf: Shelf | None) -> Any:
        return None if shelf is None else self.batch.rows_of(x, shelf)

    def _apply(self, name: str, x: torch.Tensor, shelf: Shelf | None, rows: Any) -> torch.Tensor:
        if shelf is None or rows is None:
            return x
        self.calls[name] += 1
        return self.batch.form.steer_rows(x, shelf.tables, rows)


def _rows_at(rows: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    (where,) = upload([np.array(rows, dtype=np.int64)], x.device)
    return x.index_select(0, where)


def _logits_processor(model: nn.Module) -> Any:
    """The module that applies the LM head; a LoRA wrapper counts as the one it wraps."""
    found = {name: m for name, m in model.named_modules() if hasattr(m, "_get_logits")}
    outer = {n: m for n, m in found.items() if not n.endswith("base_layer")}
    if len(outer) != 1:
        raise SteerError(
            f"{type(model).__name__} has {len(outer)} logits processors; an offset steer needs "
            "exactly one"
        )
    return next(iter(outer.values()))
