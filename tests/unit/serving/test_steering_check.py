"""The check at start-up on small stacks of layers: which changes it accepts, which it refuses."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guidance import WIDTH, delta, vector
from torch import nn

from vllm_steer import SteerError
from vllm_steer.bank.layers import fill_layer_bank
from vllm_steer.kernels.guidance import Directions, cpu, torch_gather
from vllm_steer.selftest.changes import Place
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.steering_check import check_steering

CPU = torch.device("cpu")
LAYERS, MAX_ROWS = 3, 8
EVERY = tuple(range(LAYERS))
ADD, ROTATE = vector(EVERY), vector(EVERY, mode="rotate", seed=1)
STEPS = delta(2, EVERY, site="resid", seed=2)


class Layer(nn.Module):
    """A decoder layer that returns the stream, or hidden states and residual as a pair."""

    def __init__(self, *, is_pair: bool) -> None:
        super().__init__()
        self.is_pair = is_pair
        self.feed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        stream = x if residual is None else x + residual
        added = self.feed(stream)
        return (added, stream.clone()) if self.is_pair else stream + added


def steer_everywhere(
    steers: Mapping[str, Any], backend: Any, *, is_pair: bool = False, max_rows: int = MAX_ROWS
) -> SteeredSite:
    """Check a stack of layers whose outputs ``backend`` steers; the site that was checked."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(is_pair=is_pair) for _ in EVERY)
    (table,) = fill_layer_bank(
        steers, layers=EVERY, device=CPU, project=lambda _, rows: rows
    ).tables
    site = SteeredSite(table, backend, max_doses=2, max_tokens=MAX_ROWS, device=CPU)
    site.start_serving()

    def hook(index: int) -> Callable[[Any, Any, Any], None]:
        def steer(_module: Any, _args: Any, output: Any) -> None:
            if not site.is_disabled:
                site.steer_(*(output if is_pair else (output, None)), index)

        return steer

    def run(num_rows: int) -> None:
        stream: Any = (torch.zeros(num_rows, WIDTH),)
        for layer in layers:
            output = layer(*stream)
            stream = output if is_pair else (output,)

    for index, number in enumerate(table.layers):
        layers[number].register_forward_hook(hook(index))
    check_steering(
        [site],
        lambda site, index: Place(layers[site.table.layers[index]], is_pair=is_pair),
        layers[0],
        WIDTH,
        run,
        max_rows=max_rows,
        attention_layers=[],
        device=CPU,
    )
    return site


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def wrong_in(layer: int, change: Change) -> Any:
    """A backend that is right but in one layer: ``change`` of the old and the right tensor."""

    def steer_tokens_(hidden: torch.Tensor, *args: Any) -> None:
        before = hidden.clone()
        torch_gather.steer_tokens_(hidden, *args)
        if args[2] == layer:
            hidden.copy_(change(before, hidden))

    return SimpleNamespace(**{**vars(torch_gather), "steer_tokens_": steer_tokens_})


def of_neighbor_in(layer: int) -> Any:
    """A backend that is right but in one layer, which takes the directions of the one before."""

    def steer_tokens_(
        hidden: torch.Tensor, residual: Any, directions: Directions, index: int, *args: Any
    ) -> None:
        if index == layer:
            directions = Directions(directions.vectors.roll(1, 0), directions.is_rotation)
        torch_gather.steer_tokens_(hidden, residual, directions, index, *args)

    return SimpleNamespace(**{**vars(torch_gather), "steer_tokens_": steer_tokens_})


@pytest.mark.parametrize("backend", [torch_gather, cpu], ids=["map", "host"])
@pytest.mark.parametrize("max_rows", [2, MAX_ROWS], ids=["one-by-one", "together"])
@pytest.mark.parametrize("is_pair", [False, True], ids=["stream", "pair"])
@pytest.mark.parametrize("steer", [ADD, ROTATE, STEPS], ids=["add", "rotate", "delta"])
def test_the_right_change_passes_and_leaves_the_site_unsteered(
    steer: Any, is_pair: bool, max_rows: int, backend: Any
) -> None:
    site = steer_everywhere({"a": steer}, backend, is_pair=is_pair, max_rows=max_rows)
    hidden = torch.ones(MAX_ROWS, WIDTH)
    for index in EVERY:
        site.steer_(hidden, None, index)
    assert site.is_disabled and torch.equal(hidden, torch.ones(MAX_ROWS, WIDTH))


@pytest.mark.parametrize("is_pair", [False, True], ids=["stream", "pair"])
@pytest.mark.parametrize("layer", EVERY)
@pytest.mark.parametrize(
    ("change", "share"),
    [
        pytest.param(lambda old, right: old, "-?0", id="none"),
        pytest.param(lambda old, right: 2 * old - right, "-1", id="sign"),
        pytest.param(lambda old, right: (old + right) / 2, "0.5", id="half"),
        pytest.param(lambda old, right: 2 * right - old, "2", id="twice"),
        pytest.param(lambda old, right: right * float("nan"), "nan", id="nan"),
    ],
)
@pytest.mark.parametrize("steer", [ADD, ROTATE], ids=["add", "rotate"])
def test_a_wrong_change_in_any_one_layer_is_refused_with_its_share(
    steer: Any, change: Change, share: str, layer: int, is_pair: bool
) -> None:
    message = f"steer a: at resid of layer {layer} the forward pass has {share} of the change"
    with pytest.raises(SteerError, match=message):
        steer_everywhere({"a": steer}, wrong_in(layer, change), is_pair=is_pair)


@pytest.mark.parametrize("layer", EVERY)
@pytest.mark.parametrize("steer", [ADD, ROTATE], ids=["add", "rotate"])
def test_the_directions_of_a_neighbor_layer_are_refused(steer: Any, layer: int) -> None:
    with pytest.raises(SteerError, match=f"steer a: at resid of layer {layer} "):
        steer_everywhere({"a": steer}, of_neighbor_in(layer))


def test_the_steer_with_the_largest_direction_of_a_layer_is_checked() -> None:
    small = vector((0, 1))
    large = vector((1, 2), seed=3)
    large.vectors.mul_(10)
    for layer, name in ((0, "small"), (1, "large"), (2, "large")):
        with pytest.raises(SteerError, match=f"steer {name}: at resid of layer {layer} "):
            steer_everywhere(
                {"small": small, "large": large}, wrong_in(layer, lambda old, right: old)
            )


def test_a_layer_whose_directions_are_zero_is_not_checked() -> None:
    half_zero = vector((0, 1))
    half_zero.vectors[0] = 0
    steer_everywhere({"a": half_zero}, wrong_in(0, lambda old, right: 3 * old))
    with pytest.raises(SteerError, match="at resid of layer 1 "):
        steer_everywhere({"a": half_zero}, wrong_in(1, lambda old, right: old))
