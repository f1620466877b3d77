"""The divergence in Triton: likeliest tokens and KL against loops over one row in float64.

The expected values sort a row in Python. Weights that are equal in the reference are equal in the
kernel too, so a tie at the border is decided equally; no case here has a border between two sums
that float32 cannot distinguish.
"""

import math

import pytest
import torch

from vllm_steer.kernels.divergence import torch_sort, triton_fused
from vllm_steer.kernels.divergence import triton_fused_kernels as kernels

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(row: list[float]) -> list[float]:
    top = max(row)
    return [math.exp(value - top) for value in row]


def likeliest(row: list[float], top_p: float) -> set[int]:
    """Tokens in order until the sum exceeds ``top_p`` of the total, including that token.

    Sums of equal weights are products, so a border that falls on one is exact.
    """
    w = weights(row)
    total = math.fsum(w)
    chosen: set[int] = set()
    falling = sorted((v for v in range(len(row)) if row[v] > -INF), key=lambda v: -row[v])
    for token in falling:
        if top_p < 1 and math.fsum(w[v] for v in chosen) > top_p * total:
            break
        chosen.add(token)
    return chosen


def expected(base: list[float], probe: list[float], top_p: float) -> tuple[float, int]:
    """KL and size of the union."""
    union = likeliest(base, top_p) | likeliest(probe, top_p)
    w0, w1 = weights(base), weights(probe)
    m0, m1 = math.fsum(w0[v] for v in union), math.fsum(w1[v] for v in union)
    if any(w0[v] > 0 and probe[v] == -INF for v in union):
        return INF, len(union)
    top0, top1 = max(base), max(probe)
    return (
        math.fsum(w0[v] / m0 * (base[v] - top0 - probe[v] + top1) for v in union if w0[v] > 0)
        - math.log(m0)
        + math.log(m1),
        len(union),
    )


def run(
    device: torch.device, base: torch.Tensor, probe: torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row of two tensors."""
    logits = torch.cat([base, probe]).to(device)
    rows = torch.arange(len(base), device=device)
    if isinstance(top_p, torch.Tensor):
        top_p = top_p.to(device)
    kls, sizes = triton_fused.divergence(logits, rows, rows + len(base), top_p)
    return kls.cpu(), sizes.cpu()


def random_rows(*shape: int, seed: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def check(device: torch.device, base: torch.Tensor, probe: torch.Tensor, top_p: float) -> None:
    kls, sizes = run(device, base, probe, top_p)
    p = float(torch.tensor(top_p))  # as float32 has it
    for i, (b, q) in enumerate(zip(base.double().tolist(), probe.double().tolist(), strict=True)):
        kl, size = expected(b, q, p)
        assert sizes[i].item() == size, (i, sizes[i].item(), size)
        assert kls[i].item() == pytest.approx(kl, rel=1e-5, abs=2e-6)


@dtypes
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("vocab_size", [2, 37, pytest.param(701, marks=pytest.mark.matrix)])
def test_rows_of_any_vocabulary_size(
    device: torch.device, vocab_size: int, scale: float, top_p: float, dtype: torch.dtype
) -> None:
    """Ties at the border too: rounded rows, 16-bit logits, tokens that are ruled out."""
    base, probe = (
        random_rows(4, vocab_size, seed=seed, scale=scale, dtype=dtype) for seed in (0, 1)
    )
    base[1], probe[2] = (base[1].float() * 2).round().to(dtype) / 2, probe[2].round()
    if vocab_size > 7:
        base[3, ::5], probe[3, 1::5], probe[0, ::7], base[0, ::7] = -INF, -INF, -INF, -INF
    check(device, base, probe, top_p)


@dtypes
@pytest.mark.parametrize("count", [1, 3, 64, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.25, 0.5, 0.75])
def test_equal_logits_are_ordered_by_token_id(
    device: torch.device, top_p: float, count: int, dtype: torch.dtype
) -> None:
    """Of ``n`` equal logits, the first ``floor(p n) + 1`` are taken; the other row takes them from
    the other end.
    """
    base = torch.full((1, 600), -INF, dtype=dtype)
    base[0, 17 : 17 + count] = -2.5
    probe = torch.zeros(1, 600, dtype=dtype)
    probe[0, 500:] = 3.0
    check(device, base, probe, top_p)
    check(device, probe, base, top_p)


@dtypes
def test_zeros_of_either_sign_are_equal(device: torch.device, dtype: torch.dtype) -> None:
    base = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]], dtype=dtype)
    probe = torch.tensor([[-1.0, 0.0, -0.0, -0.0, 0.0]], dtype=dtype)
    check(device, base, probe, 0.3)


@dtypes
def test_the_divergence_is_exactly_zero_where_only_one_token_is_likely(
    device: torch.device, dtype: torch.dtype
) -> None:
    base, probe = (random_rows(8, 99, seed=seed, scale=2.0, dtype=dtype) for seed in (0, 1))
    base[:, 7] += 14
    probe[:, 7] += 14
    kls, sizes = run(device, base, probe, 0.5)
    assert (kls == 0).all() and (sizes == 1).all()
    same, _ = run(device, base, base, 0.9)
    assert (same == 0).all()


@pytest.mark.parametrize("side", ["base", "probe", "both"])
@pytest.mark.parametrize("spoilt", [[NAN], [INF], [-INF] * 11], ids=["nan", "inf", "no-token"])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_an_invalid_row_gives_nan_and_does_not_affect_other_rows(
    device: torch.device, top_p: float, spoilt: list[float], side: str
) -> None:
    base, probe = (random_rows(4, 11, seed=seed, scale=2.0, dtype=torch.float32) for seed in (0, 1))
    clean, _ = run(device, base, probe, top_p)
    for name, logits in (("base", base), ("probe", probe)):
        if side in (name, "both"):
            logits[2, : len(spoilt)] = torch.tensor(spoilt)
    result, _ = run(device, base, probe, top_p)
    valid_rows = [0, 1, 3]
    assert torch.equal(result[valid_rows], clean[valid_rows])
    assert result[2].isnan()


def test_a_probe_that_rules_out_a_likely_token_has_infinite_divergence(
    device: torch.device,
) -> None:
    base = torch.tensor([[0.0, 0.0, -9.0]])
    probe = torch.tensor([[-INF, 0.0, -9.0]])
    assert run(device, base, probe, 0.9)[0].item() == INF


def test_every_dose_has_its_own_rows_and_top_p(device: torch.device) -> None:
    logits = random_rows(5, 300, seed=2, scale=3.0, dtype=torch.bfloat16).to(device)
    base_of, probe_of, ps = [4, 0, 4, 2], [1, 3, 3, 2], [0.4, 0.9, 1.0, 0.5]
    kls, sizes = triton_fused.divergence(
        logits,
        torch.tensor(base_of, device=device),
        torch.tensor(probe_of, device=device),
        torch.tensor(ps, device=device),
    )
    x = logits.double().cpu().tolist()
    for i, (b, q, p) in enumerate(zip(base_of, probe_of, ps, strict=True)):
        kl, size = expected(x[b], x[q], float(torch.tensor(p)))
        assert sizes[i].item() == size
        assert kls[i].item() == pytest.approx(kl, rel=1e-5, abs=2e-6)


def test_a_row_has_the_same_bits_alone_and_among_others(device: torch.device) -> None:
    base, probe = (
        random_rows(3, 5000, seed=seed, scale=2.0, dtype=torch.float32) for seed in (0, 1)
    )
    together = run(device, base, probe, 0.8)[0]
    alone = [run(device, b[None], q[None], 0.8)[0] for b, q in zip(base, probe, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    again = run(device, base, probe, 0.8)[0]
    assert torch.equal(together, again)


def test_rows_longer_than_a_block_and_rows_of_a_longer_tensor(device: torch.device) -> None:
    """The sort in float64 is the reference here: a loop in Python would take minutes."""
    frame = random_rows(6, 9200, seed=3, scale=2.0, dtype=torch.bfloat16).to(device)
    logits, rows = frame[:, :9001], torch.arange(3, device=device)
    for top_p in (0.5, 0.9, 0.999):
        kls, sizes = triton_fused.divergence(logits, rows, rows + 3, top_p)
        expected, expected_sizes = torch_sort.divergence(logits.double(), rows, rows + 3, top_p)
        assert torch.equal(sizes, expected_sizes)
        torch.testing.assert_close(kls.double(), expected, rtol=1e-5, atol=1e-6)


def test_no_dose_launches_no_kernel(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    kls, sizes = triton_fused.divergence(torch.zeros(2, 50, device=device), none, none, 0.5)
    assert kls.shape == sizes.shape == (0,)


def test_float64_logits_are_sorted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "likeliest", None)
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], dtype=torch.float64, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    kls, _ = triton_fused.divergence(logits, one, one + 1, 0.9)
    assert kls.dtype == torch.float64
    expected_kl, _ = expected(*logits.cpu().tolist(), 0.9)
    assert kls.item() == pytest.approx(expected_kl, rel=1e-9)
