"""Fit a vector by likelihood: LM-Steer's objective for a direction inside the layers.

With ``y`` in ``{-1, 1}`` the label of a text and ``w`` a vector per layer, the fit maximises the
likelihood of the tokens ``t`` of all texts under the model whose sites are changed by ``y w``:

    minimise  sum_t c_t * (-log p(x_t | x_<t; h + y w)) / sum_t c_t

``c_t`` is 1 where the text shows its label and ``background`` elsewhere, which preserves the rest
of the text. A difference of means works only if the model already has a direction for the property;
this fit finds a direction that leads to it.

Source: the objective of Han et al., ACL 2024 (arXiv 2305.12798), section 3; a trained vector added
to the residual stream: Subramani et al., "Extracting Latent Steering Vectors", 2022
(arXiv 2205.05124).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.hf import sites
from vllm_steer.hf.language_model import text_config
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.sites import VectorSite

Spans = Sequence[tuple[int, int]]


def fit_vector_by_likelihood(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    layers: Sequence[int],
    site: VectorSite = "resid",
    focus: Callable[[str], Spans] | None = None,
    background: float = 0.2,
    learning_rate: float = 2.0,
    steps: int = 240,
    batch_size: int = 48,
    max_length: int = 96,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> VectorSteer:
    """The vector ``[layers, hidden_size]`` that makes the texts of label 1 likely at strength 1.

    ``focus`` returns the character spans of a text that show its label; None uses the whole text.
    The model is unchanged. The learning rate is in the units of the site's activations and falls to
    zero. The same arguments give the same vector. ``on_step`` is called with the step and its loss.

    Raises ``SteerError`` for no texts, or for labels that are not one per text.
    """
    if not texts or len(texts) != len(labels):
        raise SteerError(f"{len(texts)} texts and {len(labels)} labels; give one for each text")
    chosen = tuple(sorted(layers))
    width = int(text_config(model).hidden_size)
    generator = torch.Generator().manual_seed(seed)
    vectors = (0.01 * torch.randn(len(chosen), width, generator=generator)).to(model.device)
    vectors.requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=learning_rate)
    rows = [_encode(tokenizer, text, focus, background, max_length) for text in texts]
    order = random.Random(seed)
    with _shifted(model, chosen, site, vectors) as shift:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            picked = order.sample(range(len(rows)), min(batch_size, len(rows)))
            shift(torch.tensor([labels[row] for row in picked], device=model.device))
            loss = _loss(model, [rows[row] for row in picked])
            (vectors.grad,) = torch.autograd.grad(loss, vectors)
            optimizer.step()
            if on_step is not None:
                on_step(step, loss.item())
    fitted = vectors.detach().float().cpu()
    return VectorSteer(
        vectors=fitted, layers=chosen, site=site, base_model=model.config.name_or_path
    )


@contextmanager
def _shifted(
    model: Any, layers: Sequence[int], site: VectorSite, vectors: torch.Tensor
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Context in which the sites are changed by each row's label times the layer's vector."""
    labels = torch.zeros(0)

    def shift(new_labels: torch.Tensor) -> None:
        nonlocal labels
        labels = new_labels

    names, blocks = sites.family(model), sites.layers_of(model)
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def steer(x: torch.Tensor, index: int = index) -> torch.Tensor:
                return x + labels[:, None, None] * vectors[index]

            hooks.callback(sites.attach(blocks[layer], names, site, steer).remove)
        yield shift


def _loss(model: Any, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The weighted mean negative log-likelihood of all tokens except each text's first."""
    tokens, weights = (
        torch.nn.utils.rnn.pad_sequence(list(c), True) for c in zip(*rows, strict=True)
    )
    tokens, weights = tokens.to(model.device), weights.to(model.device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    loss_weights = weights[:, 1:].flatten()
    return (losses * loss_weights).sum() / loss_weights.sum()


def _encode(
    tokenizer: Any,
    text: str,
    focus: Callable[[str], Spans] | None,
    background: float,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their weights in the loss; padding has weight 0."""
    encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    spans = [(0, len(text))] if focus is None else focus(text)
    weights = [
        1.0 if any(a < end and begin < b for a, b in spans) else background
        for begin, end in encoded["offset_mapping"]
    ]
    return torch.tensor(encoded["input_ids"]), torch.tensor(weights)
