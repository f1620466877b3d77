"""The bank: the device tables that hold loaded steers; one for the head, one for the layers."""

from vllm_steer.bank.head import HeadBank, Shelf, fill_head_bank
from vllm_steer.bank.layers import Entry, LayerBank, LayerShelf, fill_layer_bank

__all__ = [
    "Entry",
    "HeadBank",
    "LayerBank",
    "LayerShelf",
    "Shelf",
    "fill_head_bank",
    "fill_layer_bank",
]
