"""The KL divergence from which a dynamic strength is computed, for pairs of logits rows.

With ``p0`` and ``p1`` the distributions of a dose's two rows of logits, base and probe:

    Q   = top(p0) | top(p1), top(p) the most likely tokens up to and including the one at which the
          cumulative probability exceeds top_p; ties go to the lower token id
    KL  = sum_{v in Q} P0(v) (ln P0(v) - ln P1(v)),  P0 and P1 = p0 and p1 renormalised over Q

``cpu`` is numpy, ``torch_sort`` runs on every device, ``triton_fused`` on CUDA. All implement
``DivergenceBackend``; ``dispatch`` selects one. Source: Scalena et al., BlackboxNLP 2024.
"""

from vllm_steer.kernels.divergence.backend import DivergenceBackend

__all__ = ["DivergenceBackend"]
