"""Converts an LM-Steer of one model into one of another.

    multiply  P1' = B P1,  P2' = B P2, so that W' = B W B^T
    add       A' = A B^T
    offset    O'[token] = O[token] for a shared token, the mean of these for every other

with ``B [d_to, d_from]`` such that ``E_to B ~ E_from``. A token's logit then changes by
``h' B W (B^T e')``, where ``B^T e' ~ e`` is its embedding in the source model; ``B^T`` is the
paper's ``H``, and no inverse is taken. A constant added to all of an offset changes no probability;
the mean leaves the other tokens where they were among the shared ones.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 3.4, equation 3: ``W' = H^T W H``. The paper transfers ``multiply`` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers import LMSteer, Steer
from vllm_steer.steers.checks import check_choice
from vllm_steer.transfer.embedding_map import SOLVERS, Solver, fit_matrix
from vllm_steer.transfer.vocabulary import SharedVocabulary, shared_vocabulary


@dataclass(frozen=True)
class FitError:
    """How well ``E_to B`` meets ``E_from``, over all shared tokens, each less its mean.

    ``relative_residual`` is ``|c E_to B - E_from|_F / |E_from|_F`` at the best factor ``c``, as a
    solver may leave the scale open: 0 is exact, 1 is nothing. ``mean_cosine`` is over the tokens.
    """

    relative_residual: float
    mean_cosine: float


@dataclass(frozen=True, eq=False)
class TransferResult:
    """A steer of the target model and how it was come by; an offset needs no map."""

    steer: LMSteer
    shared: SharedVocabulary
    fit: FitError | None
    matrix: torch.Tensor | None = field(default=None, repr=False)


def transfer_steer(
    steer: Steer,
    source: tuple[torch.Tensor, Any],
    target: tuple[torch.Tensor, Any],
    *,
    solver: Solver = "orthogonal",
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> TransferResult:
    """An LM-Steer for another model; ``source`` and ``target`` are output embedding and tokenizer.

    Fixed columns are carried over as fixed, epsilon and default strength as they are: strength may
    have to be tuned anew (see ``match_strength``), with ``authors`` always, which drops the scale.
    The tensors keep their dtype. ``seed`` and ``on_step`` are those of ``fit_matrix``.

    Raises ``SteerError`` for a steer of another kind, one that is not of the source model's width,
    and vocabularies that share too little.
    """
    check_choice("solver", solver, SOLVERS)
    if not isinstance(steer, LMSteer):
        raise SteerError(
            f"the steer is of kind {steer.kind}; only an LM-Steer can be transferred, "
            "since it acts on the vocabulary, which two models share"
        )
    source_rows, target_rows = source[0], target[0]
    source_width = source_rows.shape[0 if steer.variant == "offset" else 1]
    if steer.width != source_width:
        raise SteerError(
            f"the steer has width {steer.width} and the source model {source_width}; give the "
            f"model that it was fitted to{f' ({steer.base_model})' if steer.base_model else ''}"
        )
    shared = shared_vocabulary(
        source[1], target[1], source_rows=len(source_rows), target_rows=len(target_rows)
    )
    vocab_size, hidden_size = target_rows.shape
    if steer.variant == "offset":
        transferred = replace(
            steer, hidden_size=hidden_size, offset=_offset(steer, shared, vocab_size)
        )
        return TransferResult(transferred, shared, None)
    rows = target_rows[shared.target_ids], source_rows[shared.source_ids]
    matrix = fit_matrix(*rows, solver=solver, seed=seed, on_step=on_step)
    return TransferResult(map_columns(steer, matrix), shared, fit_error(*rows, matrix), matrix)


def map_columns(steer: LMSteer, matrix: torch.Tensor) -> LMSteer:
    """A steer of variant ``multiply`` or ``add`` through ``B [d_to, d_from]``."""
    tensors: dict[str, Any] = {
        # B P of each column, or a row A times B^T: both sum over the source's width.
        name: torch.einsum("ed,sd...->se...", matrix, tensor.to(matrix)).to(tensor.dtype)
        for name, tensor in steer.tensors.items()
    }
    return replace(steer, hidden_size=matrix.shape[0], **tensors)


def fit_error(target: torch.Tensor, source: torch.Tensor, matrix: torch.Tensor) -> FitError:
    """The fit error of ``B`` over the shared rows ``[shared, d_to]`` and ``[shared, d_from]``."""
    mapped = target.to(matrix) @ matrix
    mapped, centered = mapped - mapped.mean(0), source.to(matrix) - source.to(matrix).mean(0)
    scale = (mapped * centered).sum() / mapped.square().sum().clamp_min(1e-300)
    cosines = torch.nn.functional.cosine_similarity(mapped, centered, dim=1)
    residual = (scale * mapped - centered).norm() / centered.norm()
    return FitError(float(residual), float(cosines.mean()))


def _offset(steer: LMSteer, shared: SharedVocabulary, vocab_size: int) -> torch.Tensor:
    """``O' [columns, vocab_size]``."""
    (offset,) = steer.tensors.values()
    values = offset[:, shared.source_ids]
    transferred = values.double().mean(1, keepdim=True).to(offset.dtype).repeat(1, vocab_size)
    transferred[:, shared.target_ids] = values
    return transferred
