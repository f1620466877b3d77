"""vLLM's LoRA kernels, shrink and expand, as a form of LM-Steer.

They end at rank 512, take one adapter per token and one scale for all. The result goes into a new
tensor, so the rows are copied first; vLLM itself adds to the layer's output in place.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from operations.lm_steer_inputs import Inputs
from operations.measure import Skipped

MAX_RANK = 512


def vllm_lora(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The call, with the batch's own distinct steers as the loaded adapters."""
    case, x = inputs.case, inputs.x
    _check_case(inputs)
    ops = _triton_ops()
    first = min(slot for slot, _, _ in inputs.steered.groups)
    stacked = (len(inputs.tables.slots), case.ranks[0], case.width)
    mine = slice(first, first + case.distinct)
    down = inputs.tables.shrink.view(stacked)[mine]
    up = inputs.tables.expand.view(stacked)[mine].transpose(1, 2).contiguous()
    arguments = _meta_arguments(ops, inputs, first)

    def call() -> torch.Tensor:
        inner = torch.empty(1, case.rows, case.ranks[0], dtype=torch.float32, device=x.device)
        ops.lora_shrink(x, [down], inner, *arguments, 1.0)
        out = x.clone()
        ops.lora_expand(inner, [up], out, *arguments, add_inputs=True)
        return out

    return call


def forget_weights() -> None:
    """Empty vLLM's caches of weights by address: a later tensor may lie where one lay."""
    utils: Any = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    for cache in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(utils, cache, {}).clear()


def _check_case(inputs: Inputs) -> None:
    case = inputs.case
    if inputs.device.type != "cuda":
        raise Skipped(f"vLLM's LoRA kernels are Triton for CUDA; the device is {inputs.device}")
    if case.dense:
        raise Skipped("vLLM's LoRA kernels take factors, the bank keeps their product")
    if max(case.ranks) > MAX_RANK:
        raise Skipped(f"vLLM's LoRA ends at rank {MAX_RANK}")
    if case.per_row > 1:
        raise Skipped("vLLM's LoRA takes one adapter per token")
    if inputs.x.dtype == torch.float32:
        raise Skipped("vLLM's LoRA kernels take 16-bit weights only")


def _triton_ops() -> Any:
    try:
        from vllm.lora.ops import triton_ops
    except ImportError as error:
        raise Skipped(f"vLLM's LoRA kernels cannot be imported: {error}") from None
    return triton_ops


def _meta_arguments(ops: Any, inputs: Inputs, first: int) -> tuple[Any, ...]:
    """Which adapter each row takes, in the order that both kernels want it."""
    mapping = torch.full((inputs.case.rows,), -1, dtype=torch.int32)
    for slot, start, end in inputs.steered.groups:
        mapping[torch.from_numpy(inputs.steered.rows[start:end])] = slot - first
    meta = ops.LoRAKernelMeta.make(inputs.case.distinct, inputs.case.rows, inputs.device)
    meta.prepare_tensors(mapping.to(inputs.device))
    options = {}
    if "specialize_active_lora" in inspect.signature(meta.meta_args).parameters:
        options["specialize_active_lora"] = False  # as vLLM's configuration has it by default
    return tuple(meta.meta_args(inputs.case.rows, **options))
