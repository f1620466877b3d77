"""The cross-entropy after an LM head and its gradient, computed in chunks of tokens.

    logits = scale (h E^T + b + a O)          soft cap c:  c tanh(logits / c)
    loss   = sum_t -log softmax(logits_t)[y_t]
    d loss / d logits = softmax(logits) - onehot(y)

Computed for a few tokens at a time: their logits become the gradient in place and are dropped.
``h`` ``[tokens, hidden_size]`` is the head's input, ``E`` ``[vocab, hidden_size]`` and ``b``
``[vocab]`` the head's weight and bias, which get no gradient; ``a`` ``[tokens, columns]`` times
``O`` ``[columns, vocab]`` is the ``offset`` of an LM-Steer.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.hf.lm_head import LMHead, head_difference

# Large enough for bfloat16, and far below the effect of a missing scale or norm.
_TOLERANCE: Final = 0.05


@dataclass(frozen=True)
class LogitOffset:
    """Logits that are added before scale and soft cap: ``amounts @ vectors``."""

    amounts: torch.Tensor  # [tokens, columns]
    vectors: torch.Tensor  # [columns, vocab]


@dataclass(frozen=True)
class HeadLoss:
    """The summed loss and its gradient with respect to the hidden states, or to the offset."""

    total: torch.Tensor  # float64
    gradient: torch.Tensor  # [tokens, hidden_size], or [columns, vocab] for an offset


def check_head(model: Any, head: LMHead, tokens: torch.Tensor) -> None:
    """Raise ``SteerError`` unless the model's logits are ``head`` of its last hidden state."""
    if head_difference(model, head, tokens) > _TOLERANCE:
        raise SteerError(
            f"{type(model).__name__}: its logits are not those of its LM head on the last hidden "
            "state, times a logit scale and under a soft cap; neither LM-Steers nor low-rank maps "
            "can be fitted to it"
        )


@torch.no_grad()
def head_loss(
    head: LMHead,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    offset: LogitOffset | None = None,
    *,
    at_once: int | None = None,
) -> HeadLoss:
    """Sum of the cross-entropies of ``targets`` ``[tokens]`` and its gradient, see the module.

    ``at_once`` is the number of tokens per chunk; None selects it by the size of the vocabulary.
    Sums are in float32, in float64 for float64 hidden states.
    """
    size = at_once or head.tokens_at_once
    total = torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    gradient = (
        torch.empty_like(hidden_states) if offset is None else torch.zeros_like(offset.vectors)
    )
    for start in range(0, len(hidden_states), size):
        part = slice(start, start + size)
        raw = head.raw_logits(hidden_states[part])
        if offset is not None:
            raw.addmm_(offset.amounts[part], offset.vectors)
        loss, by_logits = _cross_entropy(head, raw, targets[part])
        total += loss
        if offset is None:
            gradient[part] = by_logits.to(head.weight.dtype) @ head.weight
        else:
            gradient.addmm_(offset.amounts[part].T, by_logits)
    return HeadLoss(total, gradient)


def _cross_entropy(
    head: LMHead, raw: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss, and its gradient with respect to ``raw``, which is overwritten."""
    logits = head.finish(raw)
    logs = torch.log_softmax(logits, dim=1)
    target_index = targets[:, None]
    loss = -logs.gather(1, target_index).sum(dtype=torch.float64)
    by_logits = logs.exp_()
    by_logits.scatter_add_(
        1, target_index, by_logits.new_full((1, 1), -1.0).expand_as(target_index)
    )
    if head.soft_cap:  # the slope of c tanh(x / c) is 1 - tanh^2
        by_logits.mul_(logits.div_(head.soft_cap).square_().neg_().add_(1.0))
    return loss, by_logits.mul_(head.scale) if head.scale != 1.0 else by_logits
