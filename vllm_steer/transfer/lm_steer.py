"""Transfers an LM-Steer from one model to another.

    multiply  P1' = B P1,  P2' = B P2, so that W' = B W B^T
    add       A' = A B^T
    offset    O'[token] = O[token] for a shared token, their mean for every other token

with ``B [d_to, d_from]`` such that ``E_to B ~ E_from``. A token's logit then changes by
``h' B W (B^T e')``, where ``B^T e' ~ e`` is its embedding in the source model; ``B^T`` is the
paper's ``H``, and no inverse is needed. An offset that is constant over the vocabulary changes no
probability; the mean keeps the other tokens at the average of the shared ones.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 3.4, equation 3: ``W' = H^T W H``. The paper transfers ``multiply`` only.
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
    """The residual of ``E_to B ~ E_from`` over all shared tokens, both centred.

    ``relative_residual`` is ``|c E_to B - E_from|_F / |E_from|_F`` with the best factor ``c``,
    since a solver may leave the scale undetermined: 0 is an exact fit, 1 is none. ``mean_cosine``
    is the mean over the tokens.
    """

    relative_residual: float
    mean_cosine: float


@dataclass(frozen=True, eq=False)
class TransferResult:
    """A steer for the target model, the shared vocabulary, and the map with its residual.

    ``fit`` and ``matrix`` are None for an offset, which needs no map.
    """

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
    """Transfer an LM-Steer; ``source`` and ``target`` are pairs of output embedding and tokenizer.

    Fixed columns stay fixed; epsilon and default strength are kept, so the strength may need new
    tuning (see ``match_strength``), and always does with ``authors``, which loses the scale. The
    tensors keep their dtype. ``seed`` and ``on_step`` are those of ``fit_matrix``.

    Raises ``SteerError`` for a steer of another kind, for a width other than the source model's,
    and for vocabularies that share too few tokens.
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
    """Map a steer of variant ``multiply`` or ``add`` through ``B [d_to, d_from]``."""
    tensors: dict[str, Any] = {
        # B P of each column, or A B^T: both sum over the source's width.
        name: torch.einsum("ed,sd...->se...", matrix, tensor.to(matrix)).to(tensor.dtype)
        for name, tensor in steer.tensors.items()
    }
    return replace(steer, hidden_size=matrix.shape[0], **tensors)


def fit_error(target: torch.Tensor, source: torch.Tensor, matrix: torch.Tensor) -> FitError:
    """The residual of ``B`` over the shared rows ``[shared, d_to]`` and ``[shared, d_from]``."""
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
