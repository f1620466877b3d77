"""The same steers on a plain Hugging Face model: the reference for parity, useful by itself."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer, Steer


@contextmanager
def steered(
    model: nn.Module, strengths: Mapping[str, float], steers: Mapping[str, Steer]
) -> Iterator[nn.Module]:
    """Within the block, every forward pass of ``model`` is steered, ``generate`` included.

    ``strengths`` maps names in ``steers`` to strengths, for all rows and positions alike. Sums are
    taken in float32, or in float64 for a float64 model, and rounded once to the model's dtype;
    strength 0 leaves every bit. Nothing stays on the model afterwards. Raises ``SteerError`` for an
    unknown name, a model without an LM head, or a steer of another width.
    """
    unknown = sorted(set(strengths) - set(steers))
    if unknown:
        raise SteerError(f"steer {', '.join(unknown)} is unknown; steers: {', '.join(steers)}")
    head = _head(model)
    active = [(steers[name], float(v)) for name, v in strengths.items() if v != 0]
    for steer, _ in active:
        _check_width(steer, head)
    with ExitStack() as hooks:
        for handle in _hook(head, active):
            hooks.callback(handle.remove)
        yield model


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


def _hook(
    head: nn.Module, active: list[tuple[LMSteer, float]]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    before = [(s, v) for s, v in active if s.variant != "offset"]
    after = [(s, v) for s, v in active if s.variant == "offset"]
    if before:
        yield head.register_forward_pre_hook(lambda _, args: (_steer(args[0], before), *args[1:]))
    if after:
        yield head.register_forward_hook(lambda _module, _args, logits: _steer(logits, after))


def _steer(x: torch.Tensor, active: list[tuple[LMSteer, float]]) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    total = sum((change(steer, wide, strength) for steer, strength in active), start=wide)
    return total.to(x.dtype)


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise SteerError(f"{type(model).__name__} has no LM head to steer")
    return head


def _check_width(steer: LMSteer, head: nn.Module) -> None:
    vocab_size, hidden_size = head.weight.shape  # type: ignore[misc]
    wanted = vocab_size if steer.variant == "offset" else hidden_size
    width = steer.vocab_size if steer.variant == "offset" else steer.hidden_size
    if width != wanted:
        raise SteerError(f"the steer's width is {width}; the model's LM head has {wanted}")
