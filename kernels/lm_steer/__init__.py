"""LM-Steer as an operation over the rows of one batch.

``reference`` spells the equation out, ``grouped`` is plain torch and runs on every device,
``by_tile`` and ``by_row`` are Triton; all offer what ``form`` says, ``dispatch`` beside this folder
chooses.
"""

from vllm_steer.kernels.lm_steer.form import LMSteerForm
from vllm_steer.kernels.lm_steer.operands import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerTables,
)

__all__ = [
    "Constant",
    "Dense",
    "LMSteerForm",
    "LowRank",
    "Slot",
    "SteerTables",
    "SteeredRows",
]
