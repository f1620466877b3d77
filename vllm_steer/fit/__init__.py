"""Fitting steers to labelled text on a plain Hugging Face model."""

from vllm_steer.fit.lm_steer import fit_lm_steer

__all__ = ["fit_lm_steer"]
