"""Every name of vLLM that vllm-steer relies on, with its use and the feature that needs it.

The table of docs/design.md is made from these, ``patching.wrap`` takes nothing that is not among
them, and the tests see that each exists in the installed vLLM and that no file uses another.
"""

from typing import Final

from vllm_steer.compat.names import (
    dynamic_strength,
    metrics,
    optional_features,
    runtime_loading,
    steering,
)
from vllm_steer.compat.vllm_name import Feature, VllmName

GLOBAL: Final[tuple[VllmName, ...]] = (
    *steering.GLOBAL,
    *dynamic_strength.GLOBAL,
)
"""Wrapped on classes and in modules, for all engines of a process."""
NAMES: Final[tuple[VllmName, ...]] = (
    *GLOBAL,
    *steering.OTHER,
    *dynamic_strength.OTHER,
    *metrics.OTHER,
    *optional_features.OTHER,
    *runtime_loading.OTHER,
)


def names_of(feature: Feature) -> tuple[VllmName, ...]:
    """The names that a feature needs."""
    return tuple(name for name in NAMES if name.feature == feature)
