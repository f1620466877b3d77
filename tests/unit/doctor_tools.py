"""Helpers for tests of the doctor."""

from typing import Any

import torch

from vllm_steer import LMSteer
from vllm_steer.doctor import Finding

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def add_steer(seed: int = 1, size: float = 1.0) -> LMSteer:
    vector = size * torch.randn(1, 128, generator=torch.Generator().manual_seed(seed))
    return LMSteer(variant="add", add=vector, epsilon=0.5, hidden_size=128)
