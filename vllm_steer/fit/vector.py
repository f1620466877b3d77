"""Fit a steering vector or a concept vector: a difference between two sets of texts.

With ``x`` the activations of the selected tokens at a site of one layer, ``P`` and ``N`` those of
the positive and of the negative texts:

    mean  w = mean_P x - mean_N x
    unit  w = u / |u|,  u = sum_P (x - m) / |x - m| - sum_N (x - m) / |x - m|,  m = mean of all x
    pca   w = the first principal component of d_i = x_P(i) - x_N(i), over pairs i of texts

``mean`` has the length of the difference: adding it at strength 1 moves one mean onto the other.
``unit`` is the DiM probe of concept guidance, in which each token has the same weight. In ``pca``,
``x_P(i)`` is the mean over the tokens of the text; ``w`` has length 1 and is oriented towards the
positive texts: its sign is flipped if more pairs have ``d_i w < 0`` than ``d_i w > 0``.

Source: mean: Marks and Tegmark, "The Geometry of Truth", 2023 (arXiv 2310.06824), mass-mean
direction; unit: von Ruette et al., "A Language Model's Guide Through Latent Space", ICML 2024
(arXiv 2402.14433), section 3, as the authors' training script does it; pca: Zou et al.,
"Representation Engineering", 2023 (arXiv 2310.01405), as repeng does it, with tokens ``last``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import (
    SelectedTokens,
    all_layers,
    context_length,
    encode,
    read_tokens,
)
from vllm_steer.fit.answer_tokens import answer_start
from vllm_steer.fit.token_store import TokenStore, token_store
from vllm_steer.steers import Mode, VectorSteer
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite
from vllm_steer.steers.vector import MODES
from vllm_steer.untrusted_text import shown

Direction = Literal["mean", "unit", "pca"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Tokens = Literal["all", "last", "answer"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)
Text = str | tuple[str, str]
"""A text, or a prompt and its answer, which are read as one."""
ReadActivations = Callable[[Sequence[Text]], Iterator[torch.Tensor]]
# How many times each direction reads a text.
PASSES_OVER_TEXTS: Final[dict[Direction, int]] = {"mean": 1, "unit": 2, "pca": 1}


def fit_vector(
    model: Any,
    tokenizer: Any,
    positive_texts: Sequence[Text],
    negative_texts: Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    site: VectorSite = "resid",
    mode: Mode = "add",
    direction: Direction = "mean",
    tokens: Tokens = "all",
    batch_size: int = 16,
    max_length: int = 512,
    folder: Path | None = None,
    on_text: Callable[[int], None] | None = None,
) -> VectorSteer:
    """The vector ``[layers, hidden_size]``, float32, from the negative texts to the positive ones.

    ``tokens`` selects all tokens of the texts except special ones, the ``last`` of these, or those
    of the ``answer`` if each text is a prompt and an answer. In ``mean`` and ``unit`` each token
    counts once, so a longer text weighs more. ``layers`` None takes every layer. Sums are taken in
    float64; the same texts give the same vector. ``pca`` stores its differences on disk, in
    ``folder`` or in the directory for temporary files. ``on_text`` is called with the number of
    texts read so far, each text twice for ``unit`` and once otherwise.

    Raises ``SteerError`` for an empty side, sides that do not differ in any layer, an unknown
    direction, mode, site or layer, a text without a token to read, and for ``pca`` two sides of
    different length or a single pair.

    Source: see the module.

    >>> from vllm_steer.fit import fit_vector
    >>> from vllm_steer.models import load_language_model
    >>> small = load_language_model("embedded")
    >>> texts = ["A happy dog."], ["A sad dog."]
    >>> steer = fit_vector(small.model, small.tokenizer, *texts, layers=[1])
    >>> steer.layers, steer.mode
    ((1,), 'add')
    """
    check_choice("direction", direction, DIRECTIONS)
    check_choice("site", site, VECTOR_SITES)
    check_choice("mode", mode, MODES)
    check_choice("tokens", tokens, TOKENS)
    _check_sides(len(positive_texts), len(negative_texts), direction)
    chosen = tuple(sorted(all_layers(model) if layers is None else layers))
    length, text_number = context_length(model, max_length), itertools.count(1)

    def read(texts: Sequence[Text]) -> Iterator[torch.Tensor]:
        encoded = (encode_text(tokenizer, text, tokens, length) for text in texts)
        activations = read_tokens(model, encoded, site=site, layers=chosen, batch_size=batch_size)
        for rows in activations:
            if on_text is not None:
                on_text(next(text_number))
            yield rows.double()

    if direction == "pca":
        with token_store(len(chosen), folder) as store:
            vectors = pair_component(read, positive_texts, negative_texts, store, chosen)
    else:
        make = mean_difference if direction == "mean" else unit_difference
        vectors = make(read, positive_texts, negative_texts)
    if not vectors.any():
        raise SteerError(
            "the two sides do not differ in any layer, so the vector would be zero; give other "
            "texts, or take other tokens"
        )
    return VectorSteer(
        vectors=vectors.float(),
        layers=chosen,
        site=site,
        mode=mode,
        base_model=model.config.name_or_path,
    )


def encode_text(tokenizer: Any, text: Text, tokens: Tokens, max_length: int) -> SelectedTokens:
    """A text's ids and the positions to read; ``SteerError`` if there are none."""
    whole = encode(tokenizer, text if isinstance(text, str) else "".join(text), max_length)
    if tokens == "last":
        return SelectedTokens(whole.ids, whole.kept[-1:])
    if tokens == "answer":
        return SelectedTokens(whole.ids, _of_answer(tokenizer, text, whole))
    return whole


def _of_answer(tokenizer: Any, text: Text, whole: SelectedTokens) -> list[int]:
    """The selected positions from the first token that differs from the prompt's."""
    if isinstance(text, str):
        raise SteerError(
            f"text {shown(text)} has no prompt, so its answer is not known; give prompts, or take "
            "the tokens all or last"
        )
    prompt, answer = text
    start = answer_start(tokenizer(prompt)["input_ids"], whole.ids)
    positions = [position for position in whole.kept if position >= start]
    if not positions:
        raise SteerError(
            f"the answer {shown(answer)} has no token among the {len(whole.ids)} that are read; "
            "shorten its prompt, or read more"
        )
    return positions


def mean_difference(
    read: ReadActivations, positive_texts: Sequence[Text], negative_texts: Sequence[Text]
) -> torch.Tensor:
    """``mean_P x - mean_N x [layers, width]``, float64."""
    positive, count = _sum(read(positive_texts))
    negative, negative_count = _sum(read(negative_texts))
    return positive / count - negative / negative_count


def unit_difference(
    read: ReadActivations, positive_texts: Sequence[Text], negative_texts: Sequence[Text]
) -> torch.Tensor:
    """The DiM direction ``[layers, width]``, rows of length 1, float64; reads the texts twice."""
    total, count = _sum(read([*positive_texts, *negative_texts]))
    mean = total / count

    def votes(texts: Sequence[Text]) -> Iterator[torch.Tensor]:
        for x in read(texts):
            centred = x - mean
            # A token equal to the mean has no direction.
            yield centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    difference = _sum(votes(positive_texts))[0] - _sum(votes(negative_texts))[0]
    return torch.nn.functional.normalize(difference, dim=-1)


def pair_component(
    read: ReadActivations,
    positive_texts: Sequence[Text],
    negative_texts: Sequence[Text],
    store: TokenStore,
    layers: Sequence[int],
) -> torch.Tensor:
    """The first component of the pairs' differences ``[layers, width]``, of length 1, float64."""
    pairs = zip(positive_texts, negative_texts, strict=True)
    activations = read([text for pair in pairs for text in pair])
    for positive in activations:
        store.add((positive.mean(0) - next(activations).mean(0))[None])
    return torch.stack(
        [first_component(torch.tensor(store.layer(i)), layer) for i, layer in enumerate(layers)]
    )


def first_component(differences: torch.Tensor, layer: int) -> torch.Tensor:
    """The first principal component ``[width]`` of ``[pairs, width]``, oriented towards most of
    them. Raises ``SteerError`` if all differences are equal: they have no component.
    """
    svd = torch.linalg.svd(differences - differences.mean(0), full_matrices=False)
    if svd.S[0] <= 1e-6 * differences.norm():
        raise SteerError(
            f"all pairs differ alike in layer {layer}, or not at all, so pca has nothing to find: "
            "give other pairs, take other tokens, or leave the layer out"
        )
    component: torch.Tensor = svd.Vh[0]
    sides = (differences @ component).sign().sum()
    return -component if sides < 0 else component


def _check_sides(positive: int, negative: int, direction: Direction) -> None:
    if not positive or not negative:
        raise SteerError(
            f"{positive} positive and {negative} negative texts; both sides need at least one"
        )
    if direction == "pca" and (positive != negative or positive < 2):
        raise SteerError(
            f"{positive} positive and {negative} negative texts; pca takes pairs, at least two"
        )


def _sum(texts: Iterator[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The sum over the tokens of all texts, ``[layers, width]``, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in texts:
        total = total + tokens.sum(0)
        count += len(tokens)
    return total, count
