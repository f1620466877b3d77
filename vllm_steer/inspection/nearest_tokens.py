"""The nearest tokens of a steer's directions.

    score = E w [vocab]

with ``E [vocab, hidden_size]`` the output embedding and ``w`` a direction at the input of the LM
head: the change of each logit per unit of ``w``. The highest scores are the tokens that become most
likely, the lowest those that become least likely; the sign of a singular vector is arbitrary.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 5: the 20 highest and 20 lowest tokens of the first ten right singular vectors of ``W``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.inspection.spectrum import spectrum
from vllm_steer.steers import (
    ConditionSteer,
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    SAESteer,
    Steer,
    VectorSteer,
)

_ROWS_AT_ONCE = 8192
STREAM_SITES = ("resid", "attn_out")


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of a steer with its label and weight (singular value, score or norm).

    ``vector`` is ``[hidden_size]``, or ``[vocab]`` for an offset.
    """

    label: str
    weight: float
    vector: torch.Tensor = field(repr=False)  # [hidden_size], or [vocab] for an offset


@dataclass(frozen=True)
class Token:
    """A token: its id, its string in the vocabulary, its decoded text, and its score."""

    id: int
    token: str
    text: str
    score: float


@dataclass(frozen=True)
class NearTokens:
    """The tokens with the highest and the lowest scores of one direction, most extreme first."""

    label: str
    weight: float
    highest: tuple[Token, ...]
    lowest: tuple[Token, ...]


def nearest_tokens(
    steer: Steer, embedding: torch.Tensor, tokenizer: Any, *, top: int = 10, count: int = 20
) -> list[NearTokens]:
    """The ``count`` highest and lowest tokens of the ``top`` leading directions of a steer.

    Directions are the right singular vectors of each free column's ``W`` (``multiply``), the free
    columns themselves (``add``, ``offset``), the rows of a vector, delta or SAE decoder with the
    highest layer scores, or else norms, or the left singular vectors of ``B A`` of all layers of a
    low-rank map. Rows of the embedding beyond the tokenizer's vocabulary (padding)
    are ignored.

    Raises ``SteerError`` for a steer at a site that the LM head does not read (``attn_in``,
    ``heads``), for a condition, which adds nothing, and for a steer whose width is not that of
    ``embedding [vocab, hidden_size]``.
    """
    reason = no_tokens_reason(steer)
    if reason is not None:
        raise SteerError(reason)
    offset = isinstance(steer, LMSteer) and steer.variant == "offset"
    _check_width(steer, embedding.shape[0 if offset else 1])
    strings = {i: token for token, i in tokenizer.get_vocab().items() if i < embedding.shape[0]}
    ids = torch.tensor(sorted(strings))
    nearest = []
    for direction in directions(steer, top):
        scores = (direction.vector.double() if offset else _scores(embedding, direction.vector))[
            ids
        ]
        highest, lowest = (
            tuple(
                Token(i, strings[i], _text(tokenizer, i, strings[i]), float(scores[row]))
                for row, i in _extreme(scores, ids, count, descending)
            )
            for descending in (True, False)
        )
        nearest.append(NearTokens(direction.label, direction.weight, highest, lowest))
    return nearest


def no_tokens_reason(steer: Steer) -> str | None:
    """The reason why a steer has no nearest tokens; None if the LM head reads its site."""
    if isinstance(steer, ConditionSteer):
        return "a condition adds nothing, so no token becomes more likely by it"
    if isinstance(steer, LMSteer) or steer.site in STREAM_SITES:
        return None
    return (
        f"a steer at the site {steer.site} has no nearest tokens: its directions are not in the "
        f"space of the output embedding; expected the LM head, {' or '.join(STREAM_SITES)}"
    )


def directions(steer: Steer, top: int) -> Iterator[Direction]:
    """The leading directions of a steer: ``top`` per column of an LM-Steer, else ``top`` of all
    rows.
    """
    if isinstance(steer, LMSteer):
        for column in steer.free_columns:
            yield from _column_directions(steer, column, top)
    elif isinstance(steer, VectorSteer):
        norms = steer.vectors.double().norm(dim=1)
        weights = norms if steer.layer_scores is None else torch.tensor(steer.layer_scores)
        for row in _leading(weights, top):
            label = f"layer {steer.layers[row]}"
            yield Direction(label, float(weights[row]), steer.vectors[row])
    elif isinstance(steer, SAESteer):
        norms = steer.decoder.double().norm(dim=1)
        for row in _leading(norms, top):
            yield Direction(f"layer {steer.layers[row]}", float(norms[row]), steer.decoder[row])
    elif isinstance(steer, LowRankSteer):
        yield from _low_rank_directions(steer, top)
    elif isinstance(steer, DeltaSteer):
        yield from _delta_directions(steer, top)


def _check_width(steer: Steer, model_width: int) -> None:
    width = steer.width if isinstance(steer, LMSteer) else steer.hidden_size
    if width != model_width:
        raise SteerError(
            f"the steer has width {width} and the model {model_width}; give the model that the "
            f"steer was fitted to{f' ({steer.base_model})' if steer.base_model else ''}"
        )


def _column_directions(steer: LMSteer, column: int, top: int) -> Iterator[Direction]:
    if steer.variant != "multiply":
        (vectors,) = steer.tensors.values()
        yield Direction(f"column {column}", float(vectors[column].double().norm()), vectors[column])
        return
    decomposition = spectrum(steer, column)
    for i, value in enumerate(decomposition.values[:top].tolist()):
        yield Direction(f"column {column}, direction {i}", value, decomposition.right[i])


def _low_rank_directions(steer: LowRankSteer, top: int) -> Iterator[Direction]:
    """The left singular vectors of each layer's ``B A``, by way of its small factors."""
    left, small = torch.linalg.qr(steer.b.double())
    right = torch.linalg.qr(steer.a.double().mT).R
    u, values, _ = torch.linalg.svd(small @ right.mT)
    for index in _leading(values.flatten(), top):
        row, i = divmod(index, values.shape[1])
        vector = left[row] @ u[row, :, i]
        yield Direction(f"layer {steer.layers[row]}, direction {i}", float(values[row, i]), vector)


def _delta_directions(steer: DeltaSteer, top: int) -> Iterator[Direction]:
    norms = steer.delta.double().norm(dim=2)
    for index in _leading(norms.flatten(), top):
        step, row = divmod(index, len(steer.layers))
        label = f"layer {steer.layers[row]}, step {step}"
        yield Direction(label, float(norms[step, row]), steer.delta[step, row])


def _leading(weights: torch.Tensor, top: int) -> Sequence[int]:
    """The indices of the largest weights, descending; the first of equal ones."""
    indices: list[int] = weights.argsort(descending=True, stable=True)[:top].tolist()
    return indices


def _scores(embedding: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``E w [vocab]``, float64, in parts: a large embedding in float64 takes gigabytes."""
    w = vector.double()
    return torch.cat([part.double() @ w for part in torch.split(embedding, _ROWS_AT_ONCE)])


def _extreme(
    scores: torch.Tensor, ids: torch.Tensor, count: int, descending: bool
) -> list[tuple[int, int]]:
    """Rows and token ids with the most extreme scores; the first of equal ones."""
    rows = scores.argsort(descending=descending, stable=True)[:count]
    return list(zip(rows.tolist(), ids[rows].tolist(), strict=True))


def _text(tokenizer: Any, number: int, string: str) -> str:
    """The decoded text of a token; the vocabulary's string for an incomplete character."""
    text = str(tokenizer.decode([number]))
    return string if not text.strip() or "\ufffd" in text else text
