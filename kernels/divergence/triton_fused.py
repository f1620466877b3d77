"""The divergence in Triton: each row is read a few times, without a sort or a copy.

One program per row finds its most likely tokens, one program per dose sums over them. They need
about 60 bytes of memory per dose besides the logits, for any vocabulary. No host synchronization.
"""

import torch

from vllm_steer.kernels.divergence import torch_sort
from vllm_steer.kernels.divergence import triton_fused_kernels as kernels

# 512 threads with 8 logits each: as many loads in flight as a multiprocessor's registers hold.
_BLOCK, _WARPS = 4096, 16
_LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""How many low bits of a float32 are 0 if it was converted from a dtype."""


def divergence(
    logits: torch.Tensor,
    base_of: torch.Tensor,
    probe_of: torch.Tensor,
    top_p: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and size of ``Q``, see ``DivergenceBackend``; float64 logits are sorted."""
    if logits.dtype not in _LOW_BITS:
        return torch_sort.divergence(logits, base_of, probe_of, top_p)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device, num_doses = logits.device, base_of.shape[0]
    kls = torch.empty(num_doses, dtype=torch.float32, device=device)
    sizes = torch.empty(num_doses, dtype=torch.int64, device=device)
    if num_doses == 0:
        return kls, sizes
    rows = torch.cat([base_of, probe_of])
    p = torch.empty(2, num_doses, dtype=torch.float32, device=device)
    p[:] = top_p
    # Separate allocations: a kernel is compiled for tensors aligned to 16 bytes.
    highest = torch.empty(2 * num_doses, dtype=torch.float32, device=device)
    thresholds = torch.empty(2 * num_doses, dtype=torch.int32, device=device)
    last_ties = torch.empty(2 * num_doses, dtype=torch.int32, device=device)
    constants = {
        "VOCAB": logits.shape[1],
        "BLOCK": min(_BLOCK, 1 << max(4, (logits.shape[1] - 1).bit_length())),
        "SHIFT": _LOW_BITS[logits.dtype],
        "num_warps": _WARPS,
        "enable_fp_fusion": False,
    }
    row_results = (highest, thresholds, last_ties)
    kernels.likeliest[(2 * num_doses,)](
        logits, logits.stride(0), rows, p, *row_results, **constants
    )
    kernels.divergence[(num_doses,)](
        logits, logits.stride(0), rows, *row_results, kls, sizes, num_doses, **constants
    )
    return kls, sizes
