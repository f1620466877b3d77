"""Fit a steering vector or a concept vector: a difference between two sets of texts.

With ``x`` the activations at a site of one layer, over every token of every text, ``P`` and ``N``
the tokens of the positive and of the negative texts:

    mean  w = mean_P x - mean_N x
    unit  w = u / |u|,  u = sum_P (x - m) / |x - m| - sum_N (x - m) / |x - m|,  m = mean of all x

``mean`` has the length of the real difference: strength 1 added moves the one mean onto the other.
``unit`` is the DiM probe of concept guidance, where each token has one vote whatever its length.

Source: mean: Marks and Tegmark, "The Geometry of Truth", 2023 (arXiv 2310.06824), mass-mean
direction; unit: von Ruette et al., "A Language Model's Guide Through Latent Space", ICML 2024
(arXiv 2402.14433), section 3, as the authors' training script does it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import activations, all_layers
from vllm_steer.steers import Mode, VectorSteer
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.vector import MODES, VECTOR_SITES, VectorSite

Direction = Literal["mean", "unit"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Read = Callable[[Sequence[str]], Iterator[torch.Tensor]]


def fit_vector(
    model: Any,
    tokenizer: Any,
    positive_texts: Sequence[str],
    negative_texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    site: VectorSite = "resid",
    mode: Mode = "add",
    direction: Direction = "mean",
    batch_size: int = 16,
    max_length: int = 512,
    on_text: Callable[[int], None] | None = None,
) -> VectorSteer:
    """The vector ``[layers, hidden_size]``, float32, from the negative texts to the positive ones.

    The tokens are all tokens of the texts but the tokenizer's special ones, see ``activations``:
    each token counts once, so a longer text weighs more. ``layers`` None takes every layer. Sums
    are taken in float64; the same texts give the same vector. ``on_text`` is called with the
    number of texts read so far, each text once for ``mean`` and twice for ``unit``.

    Raises ``SteerError`` for an empty side, an unknown direction, mode, site or layer, and a text
    of special tokens only.
    """
    check_choice("direction", direction, DIRECTIONS)
    check_choice("site", site, VECTOR_SITES)
    check_choice("mode", mode, MODES)
    if not positive_texts or not negative_texts:
        raise SteerError(
            f"{len(positive_texts)} positive and {len(negative_texts)} negative texts; both sides "
            "need at least one"
        )
    chosen = tuple(sorted(all_layers(model) if layers is None else layers))
    done = itertools.count(1)

    def read(texts: Sequence[str]) -> Iterator[torch.Tensor]:
        found: Iterator[torch.Tensor] = activations(
            model,
            tokenizer,
            texts,
            site=site,
            layers=chosen,
            batch_size=batch_size,
            max_length=max_length,
        )
        for tokens in found:
            if on_text is not None:
                on_text(next(done))
            yield tokens.double()

    make = mean_difference if direction == "mean" else unit_difference
    return VectorSteer(
        vectors=make(read, positive_texts, negative_texts).float(),
        layers=chosen,
        site=site,
        mode=mode,
        base_model=model.config.name_or_path,
    )


def mean_difference(
    read: Read, positive_texts: Sequence[str], negative_texts: Sequence[str]
) -> torch.Tensor:
    """``mean_P x - mean_N x [layers, width]``, float64."""
    positive, count = _sum(read(positive_texts))
    negative, others = _sum(read(negative_texts))
    return positive / count - negative / others


def unit_difference(
    read: Read, positive_texts: Sequence[str], negative_texts: Sequence[str]
) -> torch.Tensor:
    """The DiM direction ``[layers, width]``, rows of length 1, float64; reads the texts twice."""
    total, count = _sum(read([*positive_texts, *negative_texts]))
    mean = total / count

    def votes(texts: Sequence[str]) -> Iterator[torch.Tensor]:
        for x in read(texts):
            away = x - mean
            # A token at the very mean has no direction to vote for.
            yield away / away.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    difference = _sum(votes(positive_texts))[0] - _sum(votes(negative_texts))[0]
    return torch.nn.functional.normalize(difference, dim=-1)


def _sum(texts: Iterator[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The sum over the tokens of all texts, ``[layers, width]``, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in texts:
        total = total + tokens.sum(0)
        count += len(tokens)
    return total, count
