"""Fit a condition: a direction, a layer and a threshold that tell prompts of one kind from others.

The prompts of each side are shuffled and divided: some make the direction of each layer, the others
are held out. Of each layer the threshold and side with the best F1 on the prompts held out are
taken, and of these the best layer (``thresholds.best_threshold``). A prompt is read as it is
served: with the special tokens of the tokenizer, or in its chat template.

    mean           w = mean of the positive prompts - mean of the negative ones, both by prompt
    dim, logistic, pca   the probes of concept guidance (``probes``), a row per prompt

Of a prompt the direction takes the last token, or, for a condition on any token, the mean over all
but special ones. Its score is the condition's similarity of the last token, or the largest (for
side ``below`` the smallest) of all tokens.

Source: the scheme of conditions is that of Lee et al., "Programming Refusal with Conditional
Activation Steering", ICLR 2025 (arXiv 2409.05907), section 3.3, with a threshold from held-out
prompts.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import SelectedTokens, all_layers, context_length
from vllm_steer.fit.probes import FIT, PROBES, oriented
from vllm_steer.fit.prompt_states import Extremes, mean_states, similarity_extremes
from vllm_steer.fit.prompts import encode_prompt
from vllm_steer.fit.thresholds import ALWAYS, Scores, Threshold, best_threshold
from vllm_steer.fit.token_store import TokenStore, token_store
from vllm_steer.hf.conditions import similarity as similarity_of
from vllm_steer.optional import require_package
from vllm_steer.steers import ConditionSteer, Similarity, Tokens
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.condition import SIMILARITIES, TOKENS
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite
from vllm_steer.untrusted_text import shown

Direction = Literal["mean", "dim", "logistic", "pca"]
DIRECTIONS: Final[tuple[Direction, ...]] = get_args(Direction)
FEWEST: Final = 4
"""Different prompts that each side needs."""


@dataclass(frozen=True)
class LayerThreshold:
    """The best threshold of one layer."""

    layer: int
    threshold: Threshold


@dataclass(frozen=True)
class ConditionFit:
    """The condition, and the best threshold of each layer that was read and tells prompts apart."""

    steer: ConditionSteer
    layers: tuple[LayerThreshold, ...]

    @property
    def best(self) -> Threshold:
        """The threshold of the condition."""
        (layer,) = self.steer.layers
        return next(one.threshold for one in self.layers if one.layer == layer)


@dataclass(frozen=True)
class _Prompts:
    """The prompts of both parts of the data, the training part first, and their labels."""

    texts: tuple[str, ...]
    is_positive: Any  # [prompts] bool
    num_train: int


def fit_condition(
    model: Any,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    site: VectorSite = "resid",
    tokens: Tokens = "last",
    similarity: Similarity = "cosine",
    direction: Direction = "mean",
    valid_share: float = 0.3,
    seed: int = 0,
    chat_template: bool = False,
    batch_size: int = 16,
    max_length: int = 1024,
    folder: Path | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> ConditionFit:
    """A condition that holds on prompts like the positive ones, in the best of ``layers``.

    ``valid_share`` of the prompts of each side is held out. Both sides count alike, however many
    prompts they have. Equal prompts of a side count once. The same prompts and ``seed`` give the
    same condition. ``on_prompt`` is called with the number of prompts read so far, each twice for
    ``tokens`` any. Meanwhile one row per prompt and layer lies on disk, in ``folder``.

    Raises ``SteerError`` for an unknown choice or layer, a prompt on both sides, fewer than
    ``FEWEST`` prompts of a side, and prompts that no layer tells apart better than a condition that
    always holds.

    Source: see the module.

    >>> from vllm_steer.fit import fit_condition
    >>> from vllm_steer.models import load_language_model
    >>> small = load_language_model("embedded")
    >>> french = [f"Le {noun} était" for noun in ("lit", "train", "vin", "livre", "café", "plat")]
    >>> english = [f"The {noun} was" for noun in ("bed", "train", "wine", "book", "bar", "dish")]
    >>> fit = fit_condition(small.model, small.tokenizer, french, english)
    >>> fit.best.valid.f1
    1.0
    """
    check_choice("site", site, VECTOR_SITES)
    check_choice("tokens", tokens, TOKENS)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("direction", direction, DIRECTIONS)
    if direction in PROBES:
        require_package("sklearn")  # an error before the work, not after it
    prompts = split(positive, negative, valid_share=valid_share, seed=seed)
    chosen = tuple(sorted(all_layers(model) if layers is None else layers))
    length = context_length(model, max_length)
    encoded = [
        encode_prompt(tokenizer, text, max_length=length, chat_template=chat_template)
        for text in prompts.texts
    ]

    with token_store(len(chosen), folder) as store:
        rows = mean_states(
            model,
            _selected(encoded, tokens, tokenizer),
            site=site,
            layers=chosen,
            batch_size=batch_size,
        )
        count = _store(rows, store, on_prompt)
        conditions = {
            index: ConditionSteer(
                vector=vector[None].float(),
                layers=(layer,),
                threshold=0.0,
                site=site,
                similarity=similarity,
                tokens=tokens,
                base_model=model.config.name_or_path,
            )
            for index, layer in enumerate(chosen)
            if (vector := _direction(store.layer(index), prompts, direction, seed)).any()
        }
        if tokens == "last":
            highest = lowest = _scores_of_rows(store, conditions)
        else:
            everything = [SelectedTokens(ids, range(len(ids))) for ids in encoded]
            found = similarity_extremes(
                model, everything, list(conditions.values()), batch_size=batch_size
            )
            lowest, highest = _extremes(found, conditions, count, on_prompt)
    return _select(conditions, highest, lowest, prompts)


def split(
    positive: Sequence[str], negative: Sequence[str], *, valid_share: float, seed: int
) -> _Prompts:
    """The different prompts in random order, those held out last; both sides are in both parts."""
    if not 0 < valid_share < 1:
        raise SteerError(f"valid_share is {valid_share}; expected a share above 0 and below 1")
    sides = [list(dict.fromkeys(side)) for side in (positive, negative)]
    if both := set(sides[0]) & set(sides[1]):
        raise SteerError(
            f"prompt {shown(min(both))} is on both sides ({len(both)} prompts are); remove it from "
            "one"
        )
    if min(map(len, sides)) < FEWEST:
        raise SteerError(
            f"{len(sides[0])} positive and {len(sides[1])} negative prompts that differ; each side "
            f"needs at least {FEWEST}, some to fit and some to be held out, and better dozens"
        )
    generator = random.Random(seed)
    train, valid = [], []
    for is_positive, side in zip((True, False), sides, strict=True):
        generator.shuffle(side)
        num_valid = min(max(1, round(valid_share * len(side))), len(side) - 2)
        train += [(text, is_positive) for text in side[num_valid:]]
        valid += [(text, is_positive) for text in side[:num_valid]]
    texts, labels = zip(*train, *valid, strict=True)
    return _Prompts(texts, np.array(labels), len(train))


def _selected(
    encoded: Sequence[Sequence[int]], tokens: Tokens, tokenizer: Any
) -> Iterator[SelectedTokens]:
    """The tokens of each prompt that the direction takes."""
    special = set(tokenizer.all_special_ids)
    for ids in encoded:
        own = [position for position, token in enumerate(ids) if token not in special]
        is_last = tokens == "last" or not own
        yield SelectedTokens(ids, [len(ids) - 1] if is_last else own)


def _store(
    rows: Iterable[torch.Tensor], store: TokenStore, on_prompt: Callable[[int], None] | None
) -> int:
    """Store a row per prompt and layer; return the number of prompts."""
    for row in rows:
        store.add(row[None])
        if on_prompt is not None:
            on_prompt(store.count)
    return store.count


def _direction(rows: Any, prompts: _Prompts, direction: Direction, seed: int) -> torch.Tensor:
    """The direction of one layer from the training prompts, ``[width]`` float64, of length 1.

    Zero if the two sides do not differ in this layer.
    """
    x, labels = rows[: prompts.num_train], prompts.is_positive[: prompts.num_train]
    if (x == x[:1]).all():
        return torch.zeros(x.shape[1], dtype=torch.float64)
    if direction == "mean":
        means = [x[labels == side].mean(0, dtype=np.float64) for side in (True, False)]
        vector = torch.tensor(means[0] - means[1])
    else:
        vector = torch.tensor(oriented(FIT[direction](x, labels.astype(int), seed)).direction)
    return torch.nn.functional.normalize(vector, dim=0)


def _scores_of_rows(store: TokenStore, conditions: dict[int, ConditionSteer]) -> dict[int, Any]:
    """By layer the similarity of each prompt's row, ``[prompts]``."""
    return {
        index: similarity_of(condition, torch.tensor(store.layer(index))).double().numpy()
        for index, condition in conditions.items()
    }


def _extremes(
    found: Iterable[Extremes],
    conditions: dict[int, ConditionSteer],
    count: int,
    on_prompt: Callable[[int], None] | None,
) -> tuple[dict[int, Any], dict[int, Any]]:
    """By layer the smallest and the largest similarity of each prompt's tokens, ``[prompts]``."""
    extremes: list[Extremes] = []
    for one in found:
        extremes.append(one)
        if on_prompt is not None:
            on_prompt(count + len(extremes))
    layer_of = {index: condition.layers[0] for index, condition in conditions.items()}
    lowest, highest = (
        {
            index: np.array([one[layer][side] for one in extremes])
            for index, layer in layer_of.items()
        }
        for side in (0, 1)
    )
    return lowest, highest


def _select(
    conditions: dict[int, ConditionSteer],
    highest: dict[int, Any],
    lowest: dict[int, Any],
    prompts: _Prompts,
) -> ConditionFit:
    """The best layer; the lower one of equal ones."""
    found: dict[int, Threshold] = {}
    for index in conditions:
        parts = [
            Scores(highest[index][part], lowest[index][part], prompts.is_positive[part])
            for part in (slice(None, prompts.num_train), slice(prompts.num_train, None))
        ]
        threshold = best_threshold(*parts)
        if threshold is not None:
            found[index] = threshold
    best = max(found, key=lambda index: (found[index].rank, -index), default=None)
    if best is None or found[best].valid.balanced_f1 <= ALWAYS:
        figure = "none" if best is None else f"{found[best].valid.balanced_f1:.3f}"
        raise SteerError(
            "no layer tells the prompts that are held out apart: the best balanced F1 is "
            f"{figure}, and a condition that always holds has {ALWAYS:.3f}; give more prompts, or "
            "other layers, tokens or similarity"
        )
    return ConditionFit(
        steer=replace(conditions[best], threshold=found[best].value, side=found[best].side),
        layers=tuple(
            LayerThreshold(conditions[index].layers[0], threshold)
            for index, threshold in found.items()
        ),
    )
