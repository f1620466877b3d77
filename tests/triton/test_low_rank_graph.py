"""Low-rank maps at a site where a CUDA graph replays the step: read from the token map alone."""

import numpy as np
import pytest
import torch

from vllm_steer.bank import SiteTable, fill_layer_bank
from vllm_steer.doses import Dose
from vllm_steer.kernels.guidance import Gates, TokenMap, triton_fused
from vllm_steer.kernels.lm_steer.triton_rowwise import ROWWISE
from vllm_steer.kernels.lm_steer.triton_tiled import TILED
from vllm_steer.serving.low_rank_pairs import GraphPairs
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.step import SteeredRequest, Step
from vllm_steer.steers import LowRankSteer, VectorSteer

WIDTH, LAYERS = 72, (0, 2)


def low_rank(rank: int, layers: tuple[int, ...], seed: int) -> LowRankSteer:
    generator = torch.Generator().manual_seed(seed)
    return LowRankSteer(
        a=torch.randn(len(layers), rank, WIDTH, generator=generator),
        b=torch.randn(len(layers), WIDTH, rank, generator=generator),
        bias=torch.randn(len(layers), rank, generator=generator),
        layers=layers,
    )


STEERS = {
    "small": low_rank(3, (0, 2), 0),
    "large": low_rank(70, (2,), 1),
    "plain": VectorSteer(vectors=torch.ones(2, WIDTH), layers=(0, 2)),
}


def table_on(device: torch.device) -> SiteTable:
    bank = fill_layer_bank(STEERS, layers=LAYERS, device=device, project=lambda _, rows: rows)
    (table,) = bank.tables
    return table


@pytest.mark.parametrize("backend", [ROWWISE, TILED], ids=["rows", "tiles"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_each_token_gets_the_map_of_its_direction(
    backend: object, with_residual: bool, device: torch.device
) -> None:
    table = table_on(device)
    generator = torch.Generator().manual_seed(5)
    hidden, residual = torch.randn(2, 7, WIDTH, generator=generator)
    starts = {name: entry.start for name, entry in table.entries.items()}
    names = [["small", "large", None, "plain", "small", "large", "small"]]
    names += [[None, "small", None, "small", None, "plain", "large"]]
    which = torch.tensor([[starts.get(name or "", 0) for name in line] for line in names])
    strengths = torch.randn(2, 2, 7, generator=generator)
    strengths[:, 0, 4] = 0.0
    gate = torch.tensor([[0, 0, 0, 0, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]])
    token_map = TokenMap(
        which.to(device, torch.int32),
        strengths.to(device),
        gate=gate.to(device, torch.int32),
        gates=Gates(
            torch.tensor([[0.0] * 4, [0.0] * 4, [1.0, 0, 0, 0]], device=device),
            torch.tensor([0.0, 1, 1], device=device),
        ),
    )
    assert table.maps is not None
    pairs = GraphPairs(
        table.maps,
        backend,  # type: ignore[arg-type]
        max_doses=2,
        max_tokens=12,
        device=device,
    )
    everything = TokenMap(
        token_map.directions.new_ones(2, 12), token_map.strengths.new_ones(2, 2, 12)
    )
    pairs.write(everything, 2, 12)  # a longer step before, of which nothing may remain
    pairs.write(token_map, 2, 7)
    stream = (hidden + residual if with_residual else hidden).to(device)
    for index, layer in enumerate(LAYERS):
        found = torch.zeros_like(stream)
        pairs.add_(found, stream, index, token_map)
        for token in range(7):
            x = hidden[token].double() + (residual[token].double() if with_residual else 0)
            expected = torch.zeros(WIDTH, dtype=torch.float64)
            for k, line in enumerate(names):
                steer = STEERS.get(line[token] or "")
                if not isinstance(steer, LowRankSteer) or layer not in steer.layers:
                    continue
                if gate[k, token] == 1:
                    continue  # the one gate that is closed
                row = steer.layers.index(layer)
                inner = steer.a[row].double() @ x
                expected += float(strengths[index, k, token]) * (steer.b[row].double() @ inner)
            torch.testing.assert_close(found[token].cpu().double(), expected, rtol=1e-4, atol=2e-3)
    pairs.clear()
    assert (pairs._metadata.bounds[:, 0] == -1).all() and (pairs._metadata.touched == -1).all()


def test_a_step_that_is_padded_beyond_every_graph_has_its_maps(device: torch.device) -> None:
    """Data-parallel ranks pad a small step to the largest of all."""
    table = table_on(device)
    site = SteeredSite(
        table,
        triton_fused,
        TILED,
        max_doses=2,
        max_tokens=16,
        device=device,
        graph_tokens=4,
    )
    site.start_serving()
    steer = STEERS["small"]
    assert isinstance(steer, LowRankSteer) and steer.bias is not None
    request = SteeredRequest((Dose("small", 0.5),), 2)
    ones = np.array([2])
    step = Step(
        ["a"],
        ones,
        ones,
        torch.tensor([0, 2], dtype=torch.int32, device=device),
        torch.arange(2, device=device),
    )
    site.begin_step()
    site.prepare(step, {"a": request}, torch.zeros(1, device=device))
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(4))
    out = hidden.clone().to(device)
    site.steer_(out, None, 0)
    inner = hidden[:2].double() @ steer.a[0].double().T + steer.bias[0].double()
    expected = hidden[:2].double() + 0.5 * inner @ steer.b[0].double().T
    torch.testing.assert_close(out[:2].cpu().double(), expected, rtol=1e-4, atol=2e-3)
    assert torch.equal(out[2:].cpu(), hidden[2:])
