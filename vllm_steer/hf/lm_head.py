"""The LM head of a Hugging Face model as a weight, a bias, a scale and a soft cap.

    logits = scale (h E^T + b)          soft cap c:  c tanh(logits / c)

``h`` ``[tokens, hidden_size]`` is the head's input, ``E`` ``[vocab, hidden_size]`` its weight and
``b`` ``[vocab]`` its bias.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.hf.language_model import backbone, text_config
from vllm_steer.hf.sites import widened

# Logits per chunk: more are hardly faster on a CPU; a GPU needs larger products.
_LOGITS_AT_ONCE: Final = {"cpu": 1 << 23, "cuda": 1 << 27}
_CHECKED_TOKENS: Final = 16


@dataclass(frozen=True)
class LMHead:
    """The map from a hidden state to the logits: weight, bias, scale and soft cap."""

    weight: torch.Tensor  # [vocab, hidden_size]
    bias: torch.Tensor | None  # [vocab]
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def tokens_at_once(self) -> int:
        """Number of tokens whose logits are small enough to compute at once, by the vocabulary."""
        logits = _LOGITS_AT_ONCE.get(self.weight.device.type, _LOGITS_AT_ONCE["cuda"])
        return max(1, logits // len(self.weight))

    def raw_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits before scale and soft cap; the product is in the head's dtype, the result in a
        wider one.
        """
        inputs = hidden_states.to(self.weight.dtype)
        return widened(torch.nn.functional.linear(inputs, self.weight, self.bias))

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """Apply scale and soft cap, in place."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        return raw.div_(self.soft_cap).tanh_().mul_(self.soft_cap) if self.soft_cap else raw


def head_of(model: Any) -> LMHead:
    """The LM head of a Hugging Face model with its bias, logit scale and soft cap.

    Raises ``SteerError`` for a model without a plain weight matrix as its head.
    """
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise SteerError(f"{type(model).__name__} has no LM head with a plain weight matrix")
    bias = getattr(module, "bias", None)
    config = text_config(model)
    multiplier = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LMHead(
        weight.detach(),
        None if bias is None else bias.detach(),
        float(multiplier / divisor),
        getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def head_difference(model: Any, head: LMHead, tokens: torch.Tensor) -> float:
    """The largest difference between the logits of ``head`` on the model's last hidden states and
    the model's own logits, relative to the largest of these; infinite for another vocabulary.

    ``tokens`` are token ids ``[tokens]``, of which a few are used.
    """
    tokens = tokens[None, :_CHECKED_TOKENS].to(model.device)
    model_logits = widened(model(input_ids=tokens, use_cache=False).logits)
    hidden_states = backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state
    head_logits = head.finish(head.raw_logits(hidden_states))
    if model_logits.shape != head_logits.shape:
        return math.inf
    return float((head_logits - model_logits).abs().max() / model_logits.abs().max())
