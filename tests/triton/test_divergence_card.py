"""The divergence in Triton at full size on a card."""

import pytest
import torch
import triton

from vllm_steer.kernels.divergence import torch_sort, triton_fused
from vllm_steer.kernels.divergence import triton_fused_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton.knobs.runtime.interpret or not torch.cuda.is_available(),
        reason="needs a CUDA device and compiled kernels",
    ),
]

VOCAB = 128256


def logits_of(rows: int, dtype: torch.dtype, scale: float = 2.5) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    return (scale * torch.randn(rows, VOCAB, device="cuda", generator=generator)).to(dtype)


def doses_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row but the first is the probe of the first's text or of its neighbour's."""
    probes = torch.arange(1, rows, device="cuda")
    return probes // 2, probes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5, 8.0])
def test_the_divergence_of_a_large_vocabulary_equals_a_sort_in_float64(
    scale: float, dtype: torch.dtype
) -> None:
    """The size of the union may differ by the tokens between two sums that float32 cannot tell."""
    logits = logits_of(6, dtype, scale)
    base_of, probe_of = doses_of(6)
    for top_p in (0.5, 0.9, 0.99, 1.0):
        kls, sizes = triton_fused.divergence(logits, base_of, probe_of, top_p)
        expected, expected_sizes = torch_sort.divergence(
            logits.cpu().double(), base_of.cpu(), probe_of.cpu(), float(torch.tensor(top_p))
        )
        off = (sizes.cpu() - expected_sizes).abs()
        assert (off <= 1e-5 * expected_sizes + 1).all()
        torch.testing.assert_close(kls.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 32, 128])
def test_the_host_never_waits_and_the_vocabulary_is_not_copied(rows: int) -> None:
    logits = logits_of(rows, torch.bfloat16)
    base_of, probe_of = doses_of(rows)
    top_p = torch.full((rows - 1,), 0.9, device="cuda")
    first = triton_fused.divergence(logits, base_of, probe_of, top_p)[0]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = triton_fused.divergence(logits, base_of, probe_of, top_p)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    assert torch.cuda.max_memory_allocated() - before < 1 << 17


def test_a_dose_has_the_same_bits_alone_and_among_others() -> None:
    logits = logits_of(64, torch.float32)
    base_of, probe_of = doses_of(64)
    together = triton_fused.divergence(logits, base_of, probe_of, 0.9)[0]
    for dose in (0, 7, 62):
        alone = triton_fused.divergence(logits, base_of[dose, None], probe_of[dose, None], 0.9)[0]
        assert torch.equal(alone[0], together[dose])


def test_no_number_of_doses_compiles_a_kernel_after_the_first() -> None:
    def compiled() -> int:
        jit_functions = (kernels.likeliest, kernels.divergence)
        return sum(len(cache[0]) for k in jit_functions for cache in k.device_caches.values())

    logits = logits_of(64, torch.bfloat16)
    triton_fused.divergence(logits, *doses_of(64), 0.9)
    before = compiled()
    assert before >= 2
    for rows in (2, 3, 17, 18, 33, 64):
        triton_fused.divergence(logits[:rows], *doses_of(rows), 0.9)
    assert compiled() == before
