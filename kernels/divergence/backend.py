"""The interface of a divergence backend."""

from typing import Protocol

import torch


class DivergenceBackend(Protocol):
    """A module with this function."""

    def divergence(
        self,
        logits: torch.Tensor,
        base_of: torch.Tensor,
        probe_of: torch.Tensor,
        top_p: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and size of ``Q`` of D doses, each ``[D]``, on the device of ``logits``.

        ``base_of`` and ``probe_of [D]`` int64 are their rows of ``logits [N, V]``; ``top_p`` is a
        number or ``[D]``. The KL is float32, or float64 where the logits are. A token whose logit
        is ``-inf`` is never in ``top(p)``; a row with a NaN or without any token gives NaN. There
        is no host synchronization and no shape depends on a value.
        """
