"""Inspection of a steer: norms, singular values, nearest tokens, and its evidence in a text.

``nearest_tokens`` and ``spectrum`` are behind ``vllm-steer inspect``, ``text_evidence`` is behind
``vllm-steer evidence``.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

from vllm_steer.inspection.evidence import Evidence, TextSpan, text_evidence, token_evidence
from vllm_steer.inspection.nearest_tokens import Direction, NearTokens, Token, nearest_tokens
from vllm_steer.inspection.output_embedding import read_output_embedding
from vllm_steer.inspection.spans import ScoredSpan, best_spans
from vllm_steer.inspection.spectrum import Spectrum, spectrum

__all__ = [
    "Direction",
    "Evidence",
    "NearTokens",
    "ScoredSpan",
    "Spectrum",
    "TextSpan",
    "Token",
    "best_spans",
    "nearest_tokens",
    "read_output_embedding",
    "spectrum",
    "text_evidence",
    "token_evidence",
]
