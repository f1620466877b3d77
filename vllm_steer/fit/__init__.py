"""Fitting steers and conditions on a plain Hugging Face model, to labelled texts or to two sets of
them.
"""

from vllm_steer.fit.activations import activations
from vllm_steer.fit.concept import fit_concept
from vllm_steer.fit.condition import fit_condition
from vllm_steer.fit.delta import fit_delta
from vllm_steer.fit.likelihood import fit_vector_by_likelihood
from vllm_steer.fit.lm_steer import fit_lm_steer
from vllm_steer.fit.low_rank import fit_low_rank
from vllm_steer.fit.vector import fit_vector

__all__ = [
    "activations",
    "fit_concept",
    "fit_condition",
    "fit_delta",
    "fit_lm_steer",
    "fit_low_rank",
    "fit_vector",
    "fit_vector_by_likelihood",
]
