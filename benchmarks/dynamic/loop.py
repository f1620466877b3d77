"""The authors' way of writing under a dynamic strength: a request at a time, nothing cached.

For each token the whole text goes through the model three times: unsteered, under the delta at its
maximum at every position from the last prompt token on, and under the strengths found so far. The
strength is ``min(max(KL, 0), maximum)`` with the KL over the likeliest tokens of both sides. Only
the last position goes through the LM head, which the authors do not spare.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), and the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_steer import DeltaSteer


@dataclass(frozen=True)
class Written:
    """The tokens of one request, and by how much each one's logit exceeds the second's."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class AuthorsLoop:
    """A Hugging Face model in float32 and one delta at the heads of its layers."""

    def __init__(self, folder: Path, delta: DeltaSteer, *, maximum: float, top_p: float) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._delta = delta
        self._maximum = maximum
        self._top_p = top_p
        self._added: torch.Tensor | None = None  # [layers, T, width], at the text's end
        for row, layer in enumerate(delta.layers):
            projection = self._model.model.layers[layer].self_attn.o_proj
            projection.register_forward_pre_hook(lambda _, inputs, row=row: self._add(row, inputs))

    @torch.inference_mode()
    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        """Write greedily, ``tokens`` tokens."""
        text, strengths, margins = list(prompt), [], []
        for step in range(tokens):
            unsteered = self._last_logits(text, [])
            probe = self._last_logits(text, [self._maximum] * (step + 1))
            divergence = divergence_over_likeliest(unsteered, probe, self._top_p)
            strengths.append(min(max(divergence, 0.0), self._maximum))
            best = self._last_logits(text, strengths).topk(2)
            text.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        return Written(tuple(text[len(prompt) :]), tuple(margins))

    def _last_logits(self, text: Sequence[int], strengths: Sequence[float]) -> torch.Tensor:
        self._added = None
        if strengths:
            steps = self._delta.delta[: len(strengths)]
            self._added = (steps * torch.tensor(strengths)[:, None, None]).transpose(0, 1)
        output = self._model(torch.tensor([text]), use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _add(self, row: int, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._added is None:
            return None
        heads = inputs[0].clone()
        heads[0, -self._added.shape[1] :] += self._added[row]
        return (heads, *inputs[1:])


def divergence_over_likeliest(unsteered: torch.Tensor, probe: torch.Tensor, top_p: float) -> float:
    """KL of two rows of logits ``[V]``, renormalised over the union of their likeliest tokens."""
    union = _likeliest(unsteered, top_p) | _likeliest(probe, top_p)
    log_p0, log_p1 = unsteered[union].log_softmax(-1), probe[union].log_softmax(-1)
    return float((log_p0.exp() * (log_p0 - log_p1)).sum())


def _likeliest(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the likeliest tokens, up to and with the one that crosses ``top_p``."""
    falling, order = logits.softmax(-1).sort(descending=True, stable=True)
    count = int((falling.cumsum(-1) <= top_p).sum()) + 1
    return torch.zeros_like(logits, dtype=torch.bool).index_fill_(0, order[:count], True)
