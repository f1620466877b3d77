"""Fit an LM-Steer: maximum likelihood of every text under its own signed steer.

    minimise  mean_t -log softmax(h'_t E^T)[x_{t+1}]  +  regularization (|P1|^2 + |P2|^2)
    h'_t = h_t + epsilon sum_s v_s (h_t P1_s) P2_s^T

with ``h`` ``[batch, tokens, hidden_size]`` the LM head's input, ``P1``, ``P2``
``[columns, hidden_size, rank]`` and ``v`` ``[batch, columns]``: a text's label in column 0, and 1
in column 1 (the dummy steer), which takes up what all the texts have in common.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024
(arXiv 2305.12798), section 3; the recipe is that of the authors' training script.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer

_INITIAL_SCALE: Final = 1e-2
_IGNORED: Final = -100


@dataclass(frozen=True)
class Batch:
    """What one step is computed from; a target of -100 is ignored."""

    hidden_states: torch.Tensor  # [batch, tokens, hidden_size], the LM head's input
    targets: torch.Tensor  # [batch, tokens]
    strengths: torch.Tensor  # [batch, columns]


def fit_lm_steer(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    rank: int = 64,
    epsilon: float = 1e-3,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    regularization: float = 0.0,
    max_length: int = 256,
    dummy: bool = True,
    mask_padding: bool = True,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> LMSteer:
    """The steer under which each text is most likely at its label's strength.

    ``labels`` lie in [-1, 1]: strength +1 is fitted to the texts labelled 1, strength -1 to those
    labelled -1, and at generation a strength may go beyond (the paper uses +-5). The model stays
    as it is; only the projectors ``[columns, hidden_size, rank]``, float32, are trained (Adam).
    ``mask_padding=False`` also trains on the padding, as the authors' script does. ``on_step``
    is called with the step and its loss.

    Raises ``SteerError`` for no texts, labels that are not one per text, or out of [-1, 1].
    """
    _check_labels(texts, labels)
    head = output_head(model)
    hidden_size = model.get_output_embeddings().weight.shape[1]
    start = initial_projectors(2 if dummy else 1, hidden_size, rank, seed)
    projector1, projector2 = (p.to(model.device).requires_grad_() for p in start)
    optimizer = torch.optim.Adam([projector1, projector2], lr=learning_rate)
    chosen = _shuffled_batches(len(texts), batch_size, steps, seed)
    for step, rows in enumerate(chosen):
        batch = encode(
            model,
            tokenizer,
            [texts[row] for row in rows],
            [labels[row] for row in rows],
            max_length=max_length,
            dummy=dummy,
            mask_padding=mask_padding,
        )
        loss = steer_loss(head, batch, projector1, projector2, epsilon, regularization)
        # Gradients of the projectors alone: backward() would also fill the model's own.
        projector1.grad, projector2.grad = torch.autograd.grad(loss, (projector1, projector2))
        optimizer.step()
        if on_step is not None:
            on_step(step, loss.item())
    return LMSteer(
        variant="multiply",
        epsilon=epsilon,
        hidden_size=hidden_size,
        fixed_columns=(1,) if dummy else (),
        projector1=projector1.detach().cpu(),
        projector2=projector2.detach().cpu(),
        base_model=model.config.name_or_path,
    )


def initial_projectors(
    columns: int, hidden_size: int, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``projector1`` and ``projector2``, each 0.01 N(0, 1): both must be non-zero to be trained."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, hidden_size, rank)
    first = _INITIAL_SCALE * torch.randn(shape, generator=generator)
    return first, _INITIAL_SCALE * torch.randn(shape, generator=generator)


def steer_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    projector1: torch.Tensor,
    projector2: torch.Tensor,
    epsilon: float,
    regularization: float,
) -> torch.Tensor:
    """Mean cross-entropy over the targets plus ``regularization`` times the sum of squares."""
    inner = torch.einsum("btd,sdr->btsr", batch.hidden_states, projector1)
    inner = inner * batch.strengths[:, None, :, None]
    delta = torch.einsum("btsr,sdr->btd", inner, projector2)
    logits = head(batch.hidden_states + epsilon * delta)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=_IGNORED
    )
    return loss + regularization * (projector1.square().sum() + projector2.square().sum())


@torch.no_grad()
def encode(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    max_length: int,
    dummy: bool,
    mask_padding: bool = True,
) -> Batch:
    """Hidden states of the frozen model and what is to be predicted from each of them."""
    rows = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Padded on the right whatever the tokenizer's side: causal attention never sees it there.
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad
    ).to(model.device)
    targets = tokens[:, 1:].clone()
    if mask_padding:
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        positions = torch.arange(1, tokens.shape[1], device=tokens.device)
        targets[positions >= lengths[:, None]] = _IGNORED
    hidden_states = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    strengths = torch.tensor([[label, 1.0] if dummy else [label] for label in labels])
    return Batch(hidden_states.float(), targets, strengths.to(model.device))


def output_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits from a hidden state: the head with its bias, then the model's scale and soft cap."""
    lm_head = model.get_output_embeddings()
    multiplier = getattr(model.config, "logit_scale", None) or 1.0
    divisor = getattr(model.config, "logits_scaling", None) or 1.0
    cap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = lm_head(hidden_states.to(lm_head.weight.dtype)).float()
        logits = logits * (multiplier / divisor)
        return cap * torch.tanh(logits / cap) if cap else logits

    return head


def _check_labels(texts: Sequence[str], labels: Sequence[float]) -> None:
    if not texts or len(texts) != len(labels):
        raise SteerError(
            f"{len(texts)} texts and {len(labels)} labels; give one label for each text"
        )
    outside = [label for label in labels if not -1 <= label <= 1]
    if outside:
        raise SteerError(f"label {outside[0]}; labels lie in [-1, 1]")


def _shuffled_batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches of row numbers, epoch after epoch, each epoch in an order of its own."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < min(batch_size, count):
            order += rng.sample(range(count), count)
        yield [order.pop() for _ in range(min(batch_size, count))]
