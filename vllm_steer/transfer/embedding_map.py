"""The linear map between two models' output embeddings, fitted over their shared tokens.

    E_to B ~ E_from,  E_to [shared, d_to],  B [d_to, d_from],  E_from [shared, d_from]

Solvers:

    orthogonal     B = U V^T,  U S V^T = svd(F^T G),  with F, G the rows of E_to, E_from, centred
                   and of norm 1: maximises the sum of cosines between the rows of F B and G over
                   all B with orthonormal columns (rows, if d_to < d_from)
    least-squares  B = argmin |E_to B - E_from|^2
    authors        the same objective over the first 4000 rows, by 5000 steps of Adam from N(0, 1);
                   then each row of B is normalised

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024 (arXiv 2305.12798),
section 3.4 and equation 3, ``e = H e'`` with ``H = B^T``; ``authors`` is the solver of their
script. Orthogonal: Schoenemann, "A generalized solution of the orthogonal Procrustes problem",
1966.
"""

from collections.abc import Callable
from typing import Final, Literal, get_args

import torch

from vllm_steer.errors import SteerError
from vllm_steer.steers.checks import check_choice

Solver = Literal["orthogonal", "least-squares", "authors"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

AUTHORS_ROWS: Final = 4000
AUTHORS_STEPS: Final = 5000
AUTHORS_LEARNING_RATE: Final = 0.01

OnStep = Callable[[int], None]


def orthogonal(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``B`` of the solver ``orthogonal``, which suits embeddings and hidden states alike.

    ``B W B^T`` is exact if ``E_to B = E_from`` and, for hidden states, ``h' = h B^T``; both can
    hold only if ``B^T B = 1``, which this solver ensures. The means are removed because a common
    shift of all embeddings changes no probability.
    """
    rows = (torch.nn.functional.normalize(e - e.mean(0), dim=1) for e in (target, source))
    first, second = rows
    left, _, right = torch.linalg.svd(first.T @ second, full_matrices=False)
    matrix: torch.Tensor = left @ right
    return matrix


def least_squares(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``B`` of the solver ``least-squares``, with the minimum norm if it is not unique."""
    # Only the SVD-based driver gelsd accepts a rank-deficient matrix on the CPU.
    matrix: torch.Tensor = torch.linalg.lstsq(target, source, driver="gelsd").solution
    return matrix


def authors(
    target: torch.Tensor, source: torch.Tensor, start: torch.Tensor, *, steps: int, on_step: OnStep
) -> torch.Tensor:
    """``B`` by Adam on ``mean((E_to B - E_from)^2)`` from ``start``, before its rows are
    normalised.

    The authors also train a map in the other direction, which is never used; Adam updates each
    parameter by its own gradient, so ``B`` is the same without it. The gradient uses ``E_to^T
    E_to``, so that a step costs ``d_to^2 d_from`` operations for any number of shared tokens.
    """
    gram, cross = target.T @ target, target.T @ source
    matrix = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=AUTHORS_LEARNING_RATE)
    for step in range(steps):
        matrix.grad = (gram @ matrix.detach() - cross) * (2 / source.numel())
        optimizer.step()
        on_step(step + 1)
    return matrix.detach()


def fit_matrix(
    target: torch.Tensor,
    source: torch.Tensor,
    *,
    solver: Solver = "orthogonal",
    seed: int = 0,
    on_step: OnStep = lambda _: None,
) -> torch.Tensor:
    """``B [d_to, d_from]``, float64, from the shared rows of both embeddings.

    ``target`` is ``[shared, d_to]``, ``source`` is ``[shared, d_from]``. ``seed`` determines the
    start of ``authors``; ``on_step`` receives the number of its steps so far.

    Raises ``SteerError`` for an unknown solver, and for fewer than ``d_to`` shared rows, since each
    column of ``B`` has ``d_to`` unknowns.
    """
    check_choice("solver", solver, SOLVERS)
    if len(target) < target.shape[1]:
        raise SteerError(
            f"the vocabularies share {len(target)} tokens; fitting the map needs at least "
            f"{target.shape[1]}, the hidden size of the target model; use models with more "
            "tokens in common"
        )
    target, source = target.double(), source.double()
    if solver == "orthogonal":
        return orthogonal(target, source)
    if solver == "least-squares":
        return least_squares(target, source)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(target.shape[1], source.shape[1], generator=generator).double()
    target, source = target[:AUTHORS_ROWS], source[:AUTHORS_ROWS]
    fitted = authors(target, source, start, steps=AUTHORS_STEPS, on_step=on_step)
    return torch.nn.functional.normalize(fitted, dim=1)
