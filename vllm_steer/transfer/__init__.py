"""Transfer of LM-Steers between models, over their shared vocabulary.

``transfer_steer`` maps a steer to another model, and ``measure_effect`` and ``match_strength``
compare the effects; they are behind ``vllm-steer transfer``.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

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
