"""LM-Steer's objective and its gradient by the steer's parameters.

    mean_t -log softmax(logits_t)[y_t]  +  regularization * sum of the parameters' squares

    multiply: logits_t = head(h_t + epsilon sum_s v_s (h_t P1_s) P2_s^T)
    add:      logits_t = head(h_t + epsilon sum_s v_s A_s)
    offset:   logits_t = head(h_t) + epsilon sum_s v_s O_s     (before logit scale and soft cap)

with ``h_t`` the LM head's input, ``v`` the strengths of the text that token ``t`` stands in: its
label in column 0, and 1 in column 1 (the dummy steer).

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024
(arXiv 2305.12798), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_steer.fit.head_loss import HeadLoss, LogitOffset, head_loss
from vllm_steer.hf.lm_head import LMHead
from vllm_steer.steers.lm_steer import Variant

Parameters = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TokenBatch:
    """What one step is computed from: only tokens that are trained on, of all texts in a row."""

    hidden_states: torch.Tensor  # [tokens, hidden_size], float32 or float64
    targets: torch.Tensor  # [tokens]
    strengths: torch.Tensor  # [tokens, columns]


def initial_parameters(
    variant: Variant,
    *,
    columns: int,
    hidden_size: int,
    vocab_size: int,
    rank: int,
    initial_scale: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Random parameters by their names in a steer file, float32.

    Projectors are ``initial_scale`` times N(0, 1): both must differ from zero to be trained.
    ``add`` and ``offset`` are N(0, 1) as they are, as in the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    if variant != "multiply":
        width = hidden_size if variant == "add" else vocab_size
        return {variant: torch.randn((columns, width), generator=generator)}
    shape = (columns, hidden_size, rank)
    names = ("projector1", "projector2")
    return {name: initial_scale * torch.randn(shape, generator=generator) for name in names}


def loss_and_gradients(
    head: LMHead,
    tokens: TokenBatch,
    parameters: Parameters,
    *,
    epsilon: float,
    regularization: float,
    at_once: int | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The objective and its gradient by each of the parameters.

    ``parameters`` are ``projector1`` and ``projector2``, ``add`` or ``offset``, see
    ``initial_parameters``; ``at_once`` is that of ``head_loss``.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    count = len(tokens.targets)
    if "offset" in leaves:
        offset = LogitOffset(epsilon * tokens.strengths, leaves["offset"].detach())
        head_result = head_loss(head, tokens.hidden_states, tokens.targets, offset, at_once=at_once)
        by_loss = {"offset": head_result.gradient / count}
    else:
        steered = tokens.hidden_states + epsilon * change(tokens, leaves)
        head_result = head_loss(head, steered.detach(), tokens.targets, at_once=at_once)
        by_loss = _gradients(steered, leaves, head_result, count)
    squares = sum(float(value.detach().double().square().sum()) for value in leaves.values())
    loss = float(head_result.total) / count + regularization * squares
    return loss, {
        name: gradient.add_(leaves[name].detach(), alpha=2 * regularization)
        for name, gradient in by_loss.items()
    }


def change(tokens: TokenBatch, parameters: Parameters) -> torch.Tensor:
    """``sum_s v_s (h P1_s) P2_s^T``, or ``sum_s v_s A_s``: ``[tokens, hidden_size]``."""
    if "add" in parameters:
        return tokens.strengths @ parameters["add"]
    first, second = parameters["projector1"], parameters["projector2"]
    hidden_size, rank = first.shape[1:]
    if _matrices_cost_less(len(tokens.targets), hidden_size, rank):
        matrices = (first @ second.mT).flatten(0, 1)  # [columns * hidden_size, hidden_size]
        scaled = tokens.strengths[:, :, None] * tokens.hidden_states[:, None, :]
        return scaled.flatten(1) @ matrices
    inner = tokens.hidden_states @ first.transpose(0, 1).flatten(1)  # [tokens, columns * rank]
    inner = inner * tokens.strengths.repeat_interleave(rank, dim=1)
    return inner @ second.transpose(1, 2).flatten(0, 1)


def _gradients(
    steered: torch.Tensor, leaves: Parameters, head_result: HeadLoss, count: int
) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(steered, list(leaves.values()), head_result.gradient / count)
    return dict(zip(leaves, gradients, strict=True))


def _matrices_cost_less(tokens: int, hidden_size: int, rank: int) -> bool:
    """Is it cheaper to form ``P1 P2^T``? Multiplications forward and backward, per column."""
    by_matrix = 3 * hidden_size**2 * rank + 2 * tokens * hidden_size**2
    return by_matrix < 5 * tokens * hidden_size * rank
