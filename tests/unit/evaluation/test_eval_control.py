"""The random control keeps all properties of the steer, including norms, but the direction."""

import dataclasses
from typing import Any

import pytest
import torch

from vllm_steer import DeltaSteer, SteerError, VectorSteer
from vllm_steer.evaluation.control import product_norms, random_steer
from vllm_steer.steers import LowRankSteer, SAESteer


def test_the_norm_of_a_product_is_that_of_the_full_matrix(make_steer: Any) -> None:
    steer = make_steer(columns=3, rank=4)
    full = steer.projector1.double() @ steer.projector2.double().transpose(1, 2)
    expected = full.flatten(1).norm(dim=1)
    torch.testing.assert_close(product_norms(steer.projector1, steer.projector2), expected)


def test_each_column_of_a_random_lm_steer_keeps_its_norm(make_steer: Any) -> None:
    steer = make_steer(columns=3, rank=4, fixed_columns=(1,))
    scales = torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    steer = dataclasses.replace(steer, projector1=steer.projector1 * scales)
    control = random_steer(steer)
    for s in range(3):
        w = steer.projector1[s].double() @ steer.projector2[s].double().T
        r = control.projector1[s].double() @ control.projector2[s].double().T
        assert r.norm().item() == pytest.approx(w.norm().item(), rel=1e-5)
        assert abs((w * r).sum() / (w.norm() * r.norm())) < 0.9  # another matrix
    assert (control.fixed_columns, control.epsilon) == (steer.fixed_columns, steer.epsilon)


def test_a_zero_column_stays_zero(make_steer: Any) -> None:
    steer = make_steer(columns=2)
    steer.projector1[1] = 0
    control = random_steer(steer)
    assert not (control.projector1[1] @ control.projector2[1].T).any()


@pytest.mark.parametrize("variant", ["add", "offset"])
def test_each_row_of_a_random_add_or_offset_keeps_its_norm(variant: str, make_steer: Any) -> None:
    steer = make_steer(variant, columns=2)
    (original,), (random,) = steer.tensors.values(), random_steer(steer).tensors.values()
    torch.testing.assert_close(random.norm(dim=1), original.norm(dim=1))
    assert not torch.allclose(random, original)


def test_each_layer_of_a_random_vector_keeps_its_norm() -> None:
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.1]])
    steer = VectorSteer(vectors=rows, layers=(2, 5), site="attn_in", mode="rotate")
    control = random_steer(steer)
    torch.testing.assert_close(control.vectors.norm(dim=1), torch.tensor([5.0, 0.1]))
    assert (control.layers, control.site, control.mode) == ((2, 5), "attn_in", "rotate")


def test_each_step_and_layer_of_a_random_delta_keeps_its_norm() -> None:
    delta = torch.zeros(2, 2, 3)
    delta[0, 0, 0], delta[1, 1] = 2.0, torch.tensor([1.0, 2.0, 2.0])
    control = random_steer(DeltaSteer(delta=delta, layers=(0, 1), schedule="dim"))
    expected = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(control.delta.norm(dim=2), expected)
    assert control.schedule == "dim"


def test_the_seed_determines_the_control(make_steer: Any) -> None:
    steer = make_steer()
    first, again, other = (random_steer(steer, seed) for seed in (1, 1, 2))
    assert torch.equal(first.projector1, again.projector1)
    assert not torch.equal(first.projector1, other.projector1)
    assert first.recipe == {"method": "random control", "settings": {"seed": 1}}


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_out_of_range_is_refused(seed: int, make_steer: Any) -> None:
    with pytest.raises(SteerError, match=f"control seed is {seed}; expected a number from 0"):
        random_steer(make_steer(), seed)


def test_each_layer_of_a_random_low_rank_map_keeps_its_norm() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(2, 3, 8, generator=generator) * torch.tensor([1.0, 30.0])[:, None, None]
    b, bias = torch.randn(2, 8, 3, generator=generator), torch.ones(2, 3)
    steer = LowRankSteer(a=a, b=b, bias=bias, layers=(1, 2))
    control = random_steer(steer)
    for row in range(2):
        original = (b[row].double() @ a[row].double()).norm()
        torch.testing.assert_close(
            (control.b[row].double() @ control.a[row].double()).norm(), original, rtol=1e-5, atol=0
        )
    torch.testing.assert_close(control.bias.norm(dim=1), bias.norm(dim=1))
    assert not torch.allclose(control.a, a)


def test_a_random_feature_keeps_its_encoder_and_the_norm_of_its_decoder() -> None:
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.1]])
    steer = SAESteer(
        encoder=rows,
        decoder=rows,
        bias=torch.tensor([-1.0, 2.0]),
        threshold=torch.tensor([0.0, 0.5]),
        layers=(0, 1),
        high=2.0,
    )
    control = random_steer(steer)
    assert torch.equal(control.encoder, rows) and torch.equal(control.threshold, steer.threshold)
    torch.testing.assert_close(control.decoder.norm(dim=1), torch.tensor([5.0, 0.1]))
    assert not torch.allclose(control.decoder, rows) and control.high == 2.0
