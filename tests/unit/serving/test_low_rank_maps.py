"""Low-rank maps at a site on a CPU, against float64."""

import numpy as np
import pytest
import torch

from vllm_steer.bank import fill_layer_bank
from vllm_steer.doses import Dose
from vllm_steer.kernels.guidance import cpu
from vllm_steer.kernels.lm_steer import torch_grouped
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.steers import LowRankSteer

WIDTH, RANK = 512, 4
CPU = torch.device("cpu")
SUBSPACE = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(0))).Q


def setting_to(value: float) -> LowRankSteer:
    """LoReFT that sets each coordinate in the subspace: W = 0, h + R^T (b - R h)."""
    return LowRankSteer(
        a=-SUBSPACE.T[None].contiguous(),
        b=SUBSPACE[None].contiguous(),
        bias=torch.full((1, RANK), value),
        layers=(0,),
    )


def site_of(steers: dict[str, LowRankSteer]) -> SteeredSite:
    (table,) = fill_layer_bank(
        steers, layers=(0,), device=CPU, project=lambda _layer, rows: rows
    ).tables
    site = SteeredSite(table, cpu, torch_grouped, max_doses=4, max_tokens=16, device=CPU)
    site.start_serving()
    return site


def serve(
    site: SteeredSite, hidden: torch.Tensor, requests: dict[str, SteeredRequest], counts: list[int]
) -> torch.Tensor:
    """One step of requests ``a``, ``b``, ... with so many tokens each; their prompts' first."""
    names = [chr(ord("a") + i) for i in range(len(counts))]
    tokens = np.array(counts)
    starts = torch.tensor([0, *tokens.cumsum()], dtype=torch.int32)
    positions = torch.cat([torch.arange(count) for count in counts])
    site.begin_step()
    site.prepare(Step(names, tokens, tokens, starts, positions), requests, torch.zeros(1))
    out = hidden.clone()
    site.steer_(out, None, 0)
    return out


@pytest.mark.parametrize("size", [10.0, 50.0, 200.0])
def test_what_a_map_adds_is_rounded_once_though_its_parts_are_large(size: float) -> None:
    """Its two parts, the bias and the product, are as large as the coordinate that they set."""
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden += (size - hidden @ SUBSPACE) @ SUBSPACE.T
    hidden = hidden.to(torch.bfloat16)
    wide, basis = hidden.double(), SUBSPACE.double()
    exact = wide + (size + 1 - wide @ basis) @ basis.T
    site = site_of({"set": setting_to(size + 1)})
    out = serve(site, hidden, {"a": SteeredRequest((Dose("set", 1.0),), 3)}, [3])
    once = (exact.to(torch.bfloat16).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 1.01 * once


def test_each_request_has_its_own_maps_and_others_keep_every_bit() -> None:
    site = site_of({"low": setting_to(-1.0), "high": setting_to(2.0)})
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    hidden[3:5] = -0.0  # of the request without a steer
    requests = {
        "a": SteeredRequest((Dose("high", 1.0),), 3),
        "c": SteeredRequest((Dose("low", 1.0, phase="last"), Dose("high", 0.5)), 4),
    }
    for _ in range(2):  # the second step has the pairs of the first
        out = serve(site, hidden, requests, [3, 2, 4])
        assert torch.equal(out[3:5].view(torch.int32), hidden[3:5].view(torch.int32))
        torch.testing.assert_close(out[:3] @ SUBSPACE, torch.full((3, RANK), 2.0))
        before = hidden[5:] @ SUBSPACE
        expected = before + 0.5 * (2 - before)
        expected[-1] += -1 - before[-1]
        torch.testing.assert_close(out[5:] @ SUBSPACE, expected, rtol=1e-4, atol=1e-4)
    site.invalidate()
    out = serve(site, hidden, {"b": requests["a"]}, [3, 2, 4])
    assert torch.equal(out[:3], hidden[:3]) and torch.equal(out[5:], hidden[5:])
    torch.testing.assert_close(out[3:5] @ SUBSPACE, torch.full((2, RANK), 2.0))
