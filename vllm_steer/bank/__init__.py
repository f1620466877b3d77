"""The bank: the device tables that hold loaded steers; one for the head, one for the layers."""

from vllm_steer.bank.conditions import ConditionTable, fill_condition_tables
from vllm_steer.bank.head import HeadBank, HeadRoom, HeadTable, fill_head_bank
from vllm_steer.bank.layers import (
    DirectionRange,
    LayerBank,
    LayerRoom,
    LayerTensors,
    SiteRoom,
    SiteTable,
    fill_layer_bank,
)
from vllm_steer.bank.low_rank import LowRankTable

__all__ = [
    "ConditionTable",
    "DirectionRange",
    "HeadBank",
    "HeadRoom",
    "HeadTable",
    "LayerBank",
    "LayerRoom",
    "LayerTensors",
    "LowRankTable",
    "SiteRoom",
    "SiteTable",
    "fill_condition_tables",
    "fill_head_bank",
    "fill_layer_bank",
]
