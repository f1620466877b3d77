"""The self-test on small stacks of layers whose sites are known by construction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vllm_steer.selftest.find_sites import Kinds, LayerSites, Stream, find_sites

WIDTH, LAYERS = 16, 3


class Attention(nn.Module):
    """In vLLM's place: without metadata its output is whatever the memory holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, float("nan"))


class Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True) * WIDTH**0.5


class Mixer(nn.Module):
    def __init__(self, has_projection: bool = True) -> None:
        super().__init__()
        self.inner = Attention()
        self.out = nn.Linear(WIDTH, WIDTH, bias=False) if has_projection else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.inner(x)
        return attended * 2 if self.out is None else self.out(attended)


class Layer(nn.Module):
    """``form``: how the stream is returned, and what is odd about the layer."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.before, self.after = Norm(), Norm()
        self.mixer = Mixer(form != "no-projection")
        self.feed = nn.Linear(WIDTH, WIDTH, bias=False)
        if form == "two-attentions":
            self.second = Mixer()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        stream = x if residual is None else x + residual
        if self.form == "scaled":
            stream = stream * 0.5
        if self.form == "post-norm":
            stream = self.after(stream + self.mixer(stream))
            return self.after(stream + self.feed(stream))
        attended = self.mixer(stream if self.form == "no-norm" else self.before(stream))
        if self.form == "two-attentions":
            attended = attended + self.second(self.before(stream))
        middle = stream if self.form == "attention-unread" else stream + attended
        added = self.feed(self.after(middle))
        if self.form == "pair":
            return added, middle
        if self.form == "three":
            return middle + added, middle, added
        if self.form == "stale-second":
            return middle + added, torch.zeros_like(x)
        if self.form == "hyper":  # two streams, mixed by the next layer
            return torch.roll(middle + added, 1, dims=-1)
        if self.form == "deferred":  # another part of the sum is added by the next layer only
            return middle, added, middle
        if self.form == "partial-rows":
            return (middle + added)[:-1]
        return middle + added


class Stack(nn.Module):
    def __init__(self, forms: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(form) for form in forms)
        self.is_deaf_after: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: Any = x
        for number, layer in enumerate(self.layers):
            parts = output if isinstance(output, tuple) else (output,)
            takes_pair = isinstance(output, tuple) and self.layers[number - 1].form == "pair"
            inputs = parts if takes_pair else parts[:1]
            if self.is_deaf_after is not None and number == self.is_deaf_after + 1:
                inputs = tuple(torch.ones_like(part) for part in inputs)
            output = layer(*inputs)
        return output


def sites_of(
    *forms: str, change: Callable[[Stack], None] = lambda _: None, **options: Any
) -> dict[int, LayerSites]:
    stack = Stack(list(forms))
    change(stack)
    attention = [module for module in stack.modules() if isinstance(module, Attention)]
    return find_sites(
        stack.layers,
        range(len(forms)),
        WIDTH,
        lambda rows: stack(torch.randn(rows, WIDTH)),
        max_rows=options.pop("max_rows", 64),
        attention_layers=attention,
        kinds=Kinds(Attention, nn.Linear),
        **options,
    )


@pytest.mark.parametrize("max_rows", [64, 8], ids=["one run", "a run per layer"])
@pytest.mark.parametrize(("form", "output"), [("pair", "pair"), ("plain", "tensor")])
def test_names_and_stream_are_found(form: str, output: str, max_rows: int) -> None:
    for sites in sites_of(*[form] * LAYERS, max_rows=max_rows).values():
        assert (sites.output, dict(sites.reasons)) == (output, {})
        assert (sites.norm, sites.attention, sites.projection) == ("before", "mixer", "out")
        assert sites.factor == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("form", "output"), [("pair", "pair"), ("plain", "tensor")])
def test_a_layer_with_very_large_activations_passes_the_stream_on(
    form: str, output: str, layer: int
) -> None:
    """Some layers of pretrained models write numbers far larger than the stream that they read."""

    def enlarge(stack: Stack) -> None:
        stack.layers[layer].feed.weight.data *= 2e4

    for sites in sites_of(*[form] * LAYERS, change=enlarge).values():
        assert (sites.output, dict(sites.reasons)) == (output, {})
        assert sites.factor == pytest.approx(1, abs=0.02)


def test_a_second_tensor_that_nobody_reads_is_no_part_of_the_stream() -> None:
    assert {f.output for f in sites_of(*["stale-second"] * LAYERS).values()} == {"tensor"}


@pytest.mark.parametrize(
    ("form", "site", "reason"),
    [
        ("post-norm", "resid", "normalises its input instead of adding to it"),
        ("scaled", "resid", "multiplies what is added to its input by 0.5"),
        ("partial-rows", "resid", r"of 16 tokens: the ranks hold different tokens"),
        ("three", "resid", "the layer returns"),
        ("deferred", "resid", "the layer returns"),
        ("two-attentions", "attn_out", "more than one attention: mixer, second"),
        ("no-norm", "attn_in", "reads the residual stream without a norm before it"),
        ("attention-unread", "attn_out", "does not read what its attention returns"),
        ("attention-unread", "heads", "does not read what its attention returns"),
        ("no-projection", "heads", "is not that of a linear layer"),
    ],
)
def test_a_site_where_a_steer_would_be_wrong_is_refused(form: str, site: str, reason: str) -> None:
    for sites in sites_of(*[form] * LAYERS).values():
        assert reason in sites.reasons[site]


def test_layers_that_mix_several_streams_have_no_stream_to_steer() -> None:
    sites = sites_of(*["hyper"] * LAYERS)
    assert all("resid" in one.reasons for one in sites.values())
    assert "is not passed on as one stream" in sites[0].reasons["resid"]


def test_a_model_that_scales_its_stream_by_design_may_be_steered() -> None:
    for sites in sites_of(*["scaled"] * LAYERS, may_scale=True).values():
        assert "resid" not in sites.reasons and sites.factor == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_a_layer_whose_output_is_not_read_is_seen(layer: int) -> None:
    def deafen(stack: Stack) -> None:
        stack.is_deaf_after = layer

    sites = sites_of(*["plain"] * LAYERS, change=deafen)
    assert "does not read what the layer returns" in sites[layer].reasons["resid"]
    others = [number for number in range(LAYERS - 1) if number != layer]
    assert not any("does not read" in str(sites[number].reasons) for number in others)


def test_a_layer_of_another_kind_has_its_own_verdict() -> None:
    sites = sites_of("plain", "no-projection", "plain", "plain")
    assert "heads" in sites[1].reasons
    assert all("heads" not in sites[number].reasons for number in (0, 2, 3))


def test_what_differs_between_tensor_parallel_ranks_is_refused() -> None:
    def spread(rows: torch.Tensor) -> torch.Tensor:
        differing = torch.zeros_like(rows)
        differing[2::3] = 1.0  # of resid, attn_in and attn_out of each layer the last
        return differing

    for sites in sites_of(*["plain"] * LAYERS, spread=spread).values():
        assert sites.reasons == {"attn_out": "each tensor-parallel rank has a partial sum there"}


def test_nothing_of_the_test_stays_in_the_model() -> None:
    stacks: list[Stack] = []
    sites_of(*["plain"] * LAYERS, change=stacks.append)
    for module in stacks[0].modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_stream_that_the_first_pipeline_stage_scales_is_refused_on_all() -> None:
    for sites in sites_of(*["plain"] * LAYERS, of_first_stage=lambda _: 0.5).values():
        assert "the first layer multiplies" in sites.reasons["resid"]
        assert {"attn_out", "heads"} <= set(sites.reasons) and "attn_in" not in sites.reasons


def test_a_stage_without_layers_has_no_sites() -> None:
    assert sites_of() == {}


@pytest.mark.parametrize("form", ["pair", "plain"])
def test_the_only_layer_of_a_stage_is_not_taken_for_one_that_normalises(form: str) -> None:
    (sites,) = sites_of(form).values()
    assert set(sites.reasons) == {"resid"} and "cannot be tested" in sites.reasons["resid"]


@pytest.mark.parametrize("form", ["pair", "plain"])
def test_the_only_layer_of_a_stage_returns_what_its_class_returns_elsewhere(form: str) -> None:
    elsewhere = Stream("pair" if form == "pair" else "tensor", 1.0, None)
    (sites,) = sites_of(form, over_stages=lambda own: {**own, "Layer": elsewhere}).values()
    assert (sites.output, sites.factor, dict(sites.reasons)) == (elsewhere.output, 1.0, {})
    refused = Stream(None, None, "a reason")
    (sites,) = sites_of(form, over_stages=lambda own: {**own, "Layer": refused}).values()
    assert sites.reasons == {"resid": "a reason"}
    (sites,) = sites_of(form, expected=elsewhere.output).values()
    assert (sites.output, sites.factor, dict(sites.reasons)) == (elsewhere.output, None, {})
