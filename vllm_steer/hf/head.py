"""LM-Steers: the LM head's input, or its logits.

A gated LM-Steer acts from the prompt's last token on, at which its conditions decide.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.hf.conditions import Gates
from vllm_steer.hf.sites import widened
from vllm_steer.hf.token_positions import PositionTracker, SteppedDose, coefficients
from vllm_steer.steers import LMSteer

HeadDoses = Sequence[tuple[LMSteer, Dose]]


def hook_head(
    model: nn.Module, active: HeadDoses, gates: Gates, tracker: PositionTracker
) -> Iterator[RemovableHandle]:
    """Steer the head of ``model``; ``SteerError`` if there is none or its width is another."""
    if not active:
        return
    head = _head(model)
    for steer, _ in active:
        _check_width(steer, head)
    before = [(s, v) for s, v in active if s.variant != "offset"]
    after = [(s, v) for s, v in active if s.variant == "offset"]
    if before:
        yield head.register_forward_pre_hook(
            lambda _, args: (_steer(args[0], before, gates, tracker), *args[1:])
        )
    if after:
        yield head.register_forward_hook(
            lambda _module, _args, logits: _steer(logits, after, gates, tracker)
        )


def change(steer: LMSteer, x: torch.Tensor, strength: float) -> torch.Tensor:
    """What a steer adds at a strength: to ``x [..., hidden_size]``, or to logits for ``offset``.

    ``epsilon * sum_s a_s (x P1_s) P2_s^T``, or ``epsilon * sum_s a_s A_s``, where ``a_s`` is 1 for
    a fixed column and ``strength`` for the others; in ``x``'s dtype.
    """
    scale = torch.full((steer.columns,), strength, dtype=x.dtype, device=x.device)
    scale[list(steer.fixed_columns)] = 1.0
    if steer.projector1 is not None and steer.projector2 is not None:
        first, second = steer.projector1.to(x), steer.projector2.to(x)
        inner = torch.einsum("...d,sdr->...sr", x, first)
        return steer.epsilon * torch.einsum("...sr,ser,s->...e", inner, second, scale)
    (vectors,) = steer.tensors.values()
    return steer.epsilon * (scale @ vectors.to(x)).expand(*x.shape[:-1], -1)


def _steer(
    x: torch.Tensor, active: HeadDoses, gates: Gates, tracker: PositionTracker
) -> torch.Tensor:
    wide = widened(x)
    total = sum((_change(steer, wide, dose, gates, tracker) for steer, dose in active), start=wide)
    return total.to(x.dtype)


def _change(
    steer: LMSteer, x: torch.Tensor, dose: Dose, gates: Gates, tracker: PositionTracker
) -> torch.Tensor:
    whole = _history_change(steer, x, dose, tracker)
    if dose.gate is None:
        return whole
    acts = (tracker.span.steps >= 0)[-x.shape[-2] :]
    if not acts.any():
        return torch.zeros_like(x)
    acts = acts & gates.open_rows(dose.gate, len(x))[:, None]
    return torch.where(acts[..., None].to(x.device), whole, 0.0)


def _history_change(
    steer: LMSteer, x: torch.Tensor, dose: Dose, tracker: PositionTracker
) -> torch.Tensor:
    if not isinstance(dose, SteppedDose):
        return change(steer, x, dose.strength)
    # The head may be given the last tokens alone. A change is affine in the strength, but a token
    # of strength 0 is not steered at all, whatever columns are fixed.
    a = coefficients(dose, tracker.span, None)[-x.shape[-2] :, None].to(x)
    fixed_part = change(steer, x, 0.0)
    return torch.where(a != 0, fixed_part + a * (change(steer, x, 1.0) - fixed_part), 0.0)


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise SteerError(f"{type(model).__name__} has no LM head to steer")
    return head


def _check_width(steer: LMSteer, head: nn.Module) -> None:
    vocab_size, hidden_size = head.weight.shape  # type: ignore[misc]
    expected = vocab_size if steer.variant == "offset" else hidden_size
    if steer.width != expected:
        raise SteerError(f"the steer's width is {steer.width}; the model's LM head has {expected}")
