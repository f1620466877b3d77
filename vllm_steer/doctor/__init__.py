"""Diagnosis of whether and how steering works with one model on this machine.

``examine`` checks the installation, the model's config, the parity of a real engine with Hugging
Face, and the memory of steers, and is behind ``vllm-steer doctor``. Each check yields findings.

The names in ``__all__`` follow the version number: they change only with a new minor version and a
line in CHANGELOG.md; everything else may change at any time.
"""

from typing import TYPE_CHECKING

from vllm_steer.doctor.finding import Finding, State
from vllm_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from vllm_steer.doctor.architecture import Architecture, read_architecture
    from vllm_steer.doctor.report import examine

__all__ = ["Architecture", "Finding", "State", "examine", "read_architecture"]

__getattr__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Architecture", "read_architecture"), f"{__name__}.architecture"),
        "examine": f"{__name__}.report",
    },
)
