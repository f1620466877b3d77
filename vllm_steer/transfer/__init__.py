"""LM-Steers from one model to another, over the vocabulary that both have."""

from vllm_steer.transfer.effect import Effect, match_strength, measure_effect
from vllm_steer.transfer.embedding_map import SOLVERS, Solver, fit_matrix
from vllm_steer.transfer.lm_steer import FitError, TransferResult, map_columns, transfer_steer
from vllm_steer.transfer.vocabulary import SharedVocabulary, shared_vocabulary

__all__ = [
    "SOLVERS",
    "Effect",
    "FitError",
    "SharedVocabulary",
    "Solver",
    "TransferResult",
    "fit_matrix",
    "map_columns",
    "match_strength",
    "measure_effect",
    "shared_vocabulary",
    "transfer_steer",
]
