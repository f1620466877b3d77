"""Greedy decoding of one batch on a Hugging Face model, in legs like those of
``decode.BenchmarkEngine``.

A step does what ``generate`` does for greedy search: one forward pass with the KV cache
(``DynamicCache``), the most likely token of the last position, and one read of it on the host.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from benchmarks.decode import LEAD_STEPS, TAIL_STEPS, DecodeLeg, median_step_ms, prompt


class HuggingFaceEngine:
    """``set_steer(steer or None)`` is called with the steer of all requests of a batch."""

    def __init__(self, model: Any, set_steer: Callable[[str | None], None]) -> None:
        self._model = model
        self._set_steer = set_steer

    @torch.inference_mode()
    def leg(
        self,
        steers: Sequence[str | None],
        steps: int,
        vocab_size: int,
        *,
        logprobs: bool = False,
        forced: Sequence[Sequence[int]] = (),
    ) -> DecodeLeg:
        """As ``decode.BenchmarkEngine.leg``; all rows have one steer. Row ``b`` continues with
        ``forced[b]`` if given, instead of the most likely token.
        """
        (steer,) = set(steers)
        self._set_steer(steer)
        prompts, cache = [prompt(row, vocab_size) for row in range(len(steers))], None
        inputs = torch.tensor(prompts, device=self._model.device)
        times, tokens, total = [], [], torch.zeros(len(steers))
        for step in range(LEAD_STEPS + steps + TAIL_STEPS):
            start = perf_counter()
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
            inputs = logits.argmax(-1)[:, None]
            if forced:
                inputs = torch.tensor([[row[step]] for row in forced], device=logits.device)
            tokens.append(inputs[:, 0].tolist())
            times.append(perf_counter() - start)
            if logprobs:
                total += logits.float().log_softmax(-1).gather(1, inputs)[:, 0].cpu()
        by_row = tuple(zip(*tokens, strict=True))
        return DecodeLeg(median_step_ms(times, steps), by_row, tuple(total.tolist()))
