"""The kinds and modes on a tiny Llama, against each equation written out for one token."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hand_steered import HIDDEN, SITES, TOKENS, Act, by_hand, llama, normal

from vllm_steer import SteerError, VectorSteer, hf
from vllm_steer.steers import LowRankSteer, SAESteer

PROMPT = 4


def check(
    doses: dict[str, Any], steers: dict[str, Any], acts: Mapping[tuple[str, int], Act]
) -> None:
    """``hf.steered`` gives the logits of the equations by hand, which are not the unsteered."""
    with by_hand(acts) as model:
        expected = model(TOKENS).logits
    with hf.steered(model, doses, steers, prompt_length=PROMPT):
        result = model(TOKENS).logits
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(result, model(TOKENS).logits, atol=1e-6)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


W = normal(1, HIDDEN, seed=5)
U = (W[0].double() / W[0].double().square().sum().sqrt()).double()


def projection(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    a = float((x * U).sum())
    return (clip(a, low, high) - a) * U


def vector(mode: str, site: str = "resid", **fields: Any) -> VectorSteer:
    return VectorSteer(vectors=W, layers=(1,), mode=mode, site=site, **fields)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("strength", [1.0, 0.4, -2.0])
def test_a_projection_moves_the_part_along_the_direction_into_its_bounds(
    site: str, strength: float
) -> None:
    act = {(site, 1): lambda x, t: x + strength * projection(x, -0.1, 0.2)}
    check({"s": strength}, {"s": vector("project", site, low=-0.1, high=0.2)}, act)


@torch.no_grad()
def test_a_projection_with_bounds_of_zero_removes_the_direction() -> None:
    seen: list[torch.Tensor] = []
    with hf.steered(llama(), {"s": 1.0}, {"s": vector("project")}) as model:
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(TOKENS)
        handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert (hidden @ U).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("low", "high"), [("-inf", 0.1), (-0.2, "inf"), (0.3, 0.3), (None, 0.5), (-0.5, None)], ids=str
)
def test_a_request_may_give_other_bounds_and_leave_a_side_open(low: Any, high: Any) -> None:
    bounds = [own if given is None else float(given) for given, own in ((low, -0.05), (high, 0.05))]
    act = {("resid", 1): lambda x, t: x + 0.8 * projection(x, *bounds)}
    options = {"strength": 0.8, "low": low, "high": high}
    check({"s": options}, {"s": vector("project", low=-0.05, high=0.05)}, act)


@pytest.mark.parametrize("strength", [0.3, -1.5])
def test_a_relative_vector_adds_a_share_of_the_norm(strength: float) -> None:
    act = {("resid", 1): lambda x, t: x + strength * x.square().sum().sqrt() * U}
    check({"s": strength}, {"s": vector("relative")}, act)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("site", SITES)
def test_a_low_rank_steer_is_its_affine_map(site: str, has_bias: bool) -> None:
    a, b, bias = normal(2, 3, HIDDEN), normal(2, HIDDEN, 3), normal(2, 3)
    steer = LowRankSteer(a=a, b=b, bias=bias if has_bias else None, layers=(0, 2), site=site)

    def mapped(x: torch.Tensor, row: int) -> torch.Tensor:
        inner = [
            sum(float(a[row, r, i]) * float(x[i]) for i in range(HIDDEN))
            + (float(bias[row, r]) if has_bias else 0.0)
            for r in range(3)
        ]
        return torch.tensor(
            [sum(float(b[row, i, r]) * inner[r] for r in range(3)) for i in range(HIDDEN)],
            dtype=torch.float64,
        )

    acts = {(site, 0): lambda x, t: x + 0.2 * mapped(x, 0), (site, 2): lambda x, t: x}
    check({"s": {"strength": 0.2, "layers": "0"}}, {"s": steer}, acts)
    acts[(site, 2)] = lambda x, t: x + 0.2 * mapped(x, 1)
    check({"s": 0.2}, {"s": steer}, acts)


E, D = normal(1, HIDDEN, seed=7), normal(1, HIDDEN, seed=8)
BIAS, THRESHOLD = torch.tensor([0.1]), torch.tensor([0.3])


def feature_of(x: torch.Tensor) -> float:
    p = float((x * E[0].double()).sum()) + float(BIAS[0])
    return p if p > float(THRESHOLD[0]) else 0.0


FEATURE_CHANGES = {
    "add": lambda f: 1.0,
    "clamp": lambda f: clip(f, 0.5, 2.0) - f,
    "scale": lambda f: f,
}


@pytest.mark.parametrize("mode", FEATURE_CHANGES)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_a_feature_is_added_clamped_or_scaled(mode: str, strength: float) -> None:
    bounds = {"low": 0.5, "high": 2.0} if mode == "clamp" else {}
    steer = SAESteer(
        encoder=E, decoder=D, bias=BIAS, threshold=THRESHOLD, layers=(1,), mode=mode, **bounds
    )
    d, change = D[0].double(), FEATURE_CHANGES[mode]
    acts = {("resid", 1): lambda x, t: x + strength * change(feature_of(x)) * d}
    check({"s": strength}, {"s": steer}, acts)


@torch.no_grad()
def test_some_features_are_on_and_some_are_off_in_these_tests() -> None:
    states = llama()(TOKENS, output_hidden_states=True).hidden_states[2]
    on = [feature_of(x) > 0 for row in states for x in row]
    assert 2 < sum(on) < len(on) - 2


@pytest.mark.parametrize(
    ("phase", "positions"),
    [
        ("last", {3}),
        ("answer", {3, 4, 5, 6}),
        ({"prompt": "-2:"}, {2, 3}),
        ({"prompt": ["-1", ":2"]}, {0, 1, 3}),
        ({"answer": "1:3"}, {4, 5}),
        ({"prompt": ":1", "answer": ["0", "2:"]}, {0, 3, 5, 6}),
    ],
    ids=str,
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_window_limits_a_steer_to_its_tokens(
    phase: Any, positions: set[int], strength: float
) -> None:
    def act(x: torch.Tensor, t: int) -> torch.Tensor:
        return x + strength * projection(x, 0, 0) if t in positions else x

    check(
        {"s": {"strength": strength, "phase": phase}}, {"s": vector("project")}, {("resid", 1): act}
    )


@pytest.mark.parametrize("rotates", [True, False], ids=["rotate", "add"])
def test_steers_of_one_site_read_the_same_activation_and_are_summed(rotates: bool) -> None:
    other = normal(1, HIDDEN, seed=9)
    v = other[0].double()
    v = v / v.square().sum().sqrt() if rotates else v
    a, b = normal(1, 2, HIDDEN), normal(1, HIDDEN, 2)
    steers = {
        "turn": VectorSteer(vectors=other, layers=(1,), mode="rotate" if rotates else "add"),
        "ablate": vector("project"),
        "share": vector("relative"),
        "map": LowRankSteer(a=a, b=b, layers=(1,)),
        "feature": SAESteer(encoder=E, decoder=D, bias=BIAS, threshold=THRESHOLD, layers=(1,)),
    }
    doses = {
        "turn": {"strength": 1.5, "phase": "answer"},
        "ablate": 0.5,
        "share": -0.2,
        "map": {"strength": 0.3, "phase": "prompt"},
        "feature": 1.0,
    }

    def act(x: torch.Tensor, t: int) -> torch.Tensor:
        norm = x.square().sum().sqrt()
        y = x + 0.5 * projection(x, 0, 0) - 0.2 * norm * U - feature_of(x) * D[0].double()
        if t < PROMPT:
            y = y + 0.3 * (b[0].double() @ (a[0].double() @ x))
        if t < PROMPT - 1:
            return y
        y = y + 1.5 * v
        return y * norm / y.square().sum().sqrt() if rotates else y

    check(doses, steers, {("resid", 1): act})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_narrower_models_are_steered_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = normal(2, 5, HIDDEN).to(dtype)
    seen: list[torch.Tensor] = []
    model = llama()
    try:
        model.to(dtype)
        layer = model.model.layers[1]
        given = layer.register_forward_hook(lambda _m, _a, out: x)
        with hf.steered(model, {"s": 0.7}, {"s": vector("relative")}):
            after = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(TOKENS[:, :5])
    finally:
        given.remove()
        after.remove()
        model.double()
        llama.cache_clear()
    wide = x.double()
    expected = wide + 0.7 * wide.square().sum(-1, keepdim=True).sqrt() * U
    error = (seen[0].double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_bounds_of_a_steer_without_them_and_out_of_order_are_refused() -> None:
    with (
        pytest.raises(SteerError, match="which only mode project"),
        hf.steered(llama(), {"s": {"strength": 1, "low": 0}}, {"s": vector("add")}),
    ):
        pass
    with (
        pytest.raises(SteerError, match="low must be at most high"),
        hf.steered(llama(), {"s": {"low": 2, "high": 1}}, {"s": vector("project")}),
    ):
        pass


def test_maps_and_features_of_another_width_are_refused() -> None:
    narrow = LowRankSteer(a=torch.ones(1, 2, 6), b=torch.ones(1, 6, 2), layers=(0,))
    row, number = torch.ones(1, 6), torch.zeros(1)
    feature = SAESteer(encoder=row, decoder=row, bias=number, threshold=number, layers=(0,))
    for steer in (narrow, feature):
        with (
            pytest.raises(SteerError, match="steer s is 6 wide; the site resid of this model is 8"),
            hf.steered(llama(), {"s": 1.0}, {"s": steer}),
        ):
            pass
    assert math.isinf(vector("project", low=-math.inf).low)
