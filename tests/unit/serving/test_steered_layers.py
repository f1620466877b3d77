"""The op in the modules of a block: changed tensors, unchanged tensors, refusals."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guidance import WIDTH, delta, vector
from torch import nn

from vllm_steer import SteerError
from vllm_steer.doses import Dose
from vllm_steer.families import Family
from vllm_steer.kernels.guidance import torch_gather
from vllm_steer.selftest.changes import Place
from vllm_steer.serving import layers as serving_layers
from vllm_steer.serving import steer_op
from vllm_steer.serving.layers import SteeredLayers, steered_layers
from vllm_steer.serving.model_sites import ModelSites
from vllm_steer.serving.steering_check import check_steering
from vllm_steer.serving.step import SteeredRequest, Step

CPU = torch.device("cpu")
NO_HISTORY = torch.zeros(1)
TOKENS = 3
PAIR, TENSOR = Family(), Family(stream="tensor")


class Plain(nn.Module):
    """A module that returns its input in the given form."""

    def __init__(self, form: Any = lambda x: x) -> None:
        super().__init__()
        self.form = form

    def forward(self, *arguments: Any) -> Any:
        return self.form(*arguments)


class PPMissingLayer(Plain):
    """By its name: a layer that another stage has."""


def block_of(form: Any) -> nn.Module:
    block = Plain(form)
    block.input_layernorm = Plain(lambda h, r: (h + r, h + r))
    block.self_attn = Plain(lambda h: h * 2)
    block.self_attn.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
    return block


def pair(h: torch.Tensor, r: torch.Tensor) -> Any:
    return h.clone(), r.clone()


def model_of(form: Any = pair, missing: tuple[int, ...] = ()) -> Any:
    model = nn.Module()
    model.layers = nn.ModuleList(
        PPMissingLayer() if layer in missing else block_of(form) for layer in range(3)
    )
    return model


def attached(
    steers: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch, family: Family = PAIR
) -> SteeredLayers | None:
    """The sites of an engine in service, whose forward context holds their places."""
    here = [n for n, layer in enumerate(model.layers) if not isinstance(layer, PPMissingLayer)]
    known = ModelSites(model.layers, dict.fromkeys(here, family), {})
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=None),
            hf_text_config=SimpleNamespace(num_hidden_layers=3),
            dtype=torch.float32,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
    )
    layers = steered_layers(steers, config, CPU, torch_gather, max_doses=2, known=known)
    if layers is None:
        return None
    sites_by_name: dict[str, Any] = {}
    layers.attach(model, sites_by_name, 3)
    context = SimpleNamespace(no_compile_layers=sites_by_name)
    monkeypatch.setattr(steer_op, "get_forward_context", lambda: context)
    layers.start_serving()
    return layers


def prepare(layers: SteeredLayers, *doses: Dose) -> None:
    """One request, ``doses`` on all of its tokens."""
    ones = np.array([1], dtype=np.int64)
    step = Step(["a"], ones, ones * TOKENS, torch.tensor([0, TOKENS]), torch.arange(TOKENS))
    for site in layers.sites:
        site.prepare(step, {"a": SteeredRequest(doses, prompt_len=TOKENS)}, NO_HISTORY)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


H, R = rows(1), rows(2)
PUSH, SPIN = vector((0, 2)), vector((0, 2), mode="rotate", seed=1)


def test_an_addition_to_the_residual_stream_changes_the_first_tensor_of_the_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    layers = attached({"push": PUSH}, model, monkeypatch)
    assert layers is not None
    prepare(layers, Dose("push", 2.0))
    for layer, row in ((0, 0), (1, None), (2, 1)):
        hidden, residual = model.layers[layer](H, R)
        expected = H if row is None else H + 2 * PUSH.vectors[row]
        torch.testing.assert_close(hidden, expected)
        assert torch.equal(residual, R)


def test_a_rotation_of_the_residual_stream_keeps_the_norm_of_the_pairs_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    layers = attached({"spin": SPIN}, model, monkeypatch)
    assert layers is not None
    prepare(layers, Dose("spin", 3.0))
    hidden, residual = model.layers[2](H, R)
    moved = H + R + 3 * SPIN.vectors[1] / SPIN.vectors[1].norm()
    expected = moved * (H + R).norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(hidden + residual, expected)
    assert torch.equal(residual, R)


@pytest.mark.parametrize("steer", [PUSH, SPIN], ids=["add", "rotate"])
def test_a_block_that_returns_the_stream_itself_is_steered_there(
    steer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(lambda h: h.clone())
    layers = attached({"a": steer}, model, monkeypatch, TENSOR)
    assert layers is not None
    prepare(layers, Dose("a", 2.0))
    stream = model.layers[0](H)
    row = steer.vectors[0] / (steer.vectors[0].norm() if steer is SPIN else 1)
    moved = H + 2 * row
    if steer is SPIN:
        moved = moved * H.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(stream, moved)


@pytest.mark.parametrize(
    "form",
    [lambda h, r: h, lambda h, r: (h,), lambda h, r: (h, r, None), lambda h, r: [h, r]],
    ids=["tensor", "one", "three", "list"],
)
def test_a_block_without_the_expected_pair_is_an_error(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(form)
    assert attached({"push": PUSH}, model, monkeypatch) is not None
    with pytest.raises(RuntimeError, match=r"resid.0 returned no pair of hidden states and resid"):
        model.layers[0](H.clone(), R.clone())


def test_the_norms_output_is_steered_and_the_stream_beside_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    layers = attached({"spin": vector((1,), site="attn_in", mode="rotate")}, model, monkeypatch)
    assert layers is not None
    prepare(layers, Dose("spin", 4.0))
    hidden, residual = model.layers[1].input_layernorm(H, R)
    assert torch.equal(residual, H + R)
    torch.testing.assert_close(hidden.norm(dim=1), (H + R).norm(dim=1))
    assert not torch.allclose(hidden, H + R)
    assert torch.equal(model.layers[0].input_layernorm(H, R)[0], H + R)


def test_two_sites_of_one_module_act_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the heads, then at the attention's output, which rotates the changed activations."""
    model = model_of()
    steers = {"walk": delta(TOKENS, (1,)), "bend": vector((1,), site="attn_out", mode="rotate")}
    layers = attached(steers, model, monkeypatch)
    assert layers is not None
    ones = np.array([1], dtype=np.int64)
    step = Step(["a"], ones, ones * TOKENS, torch.tensor([0, TOKENS]), torch.arange(TOKENS))
    doses = (Dose("bend", 3.0), Dose("walk", 2.0, schedule="fixed"))
    for site in layers.sites:
        site.prepare(step, {"a": SteeredRequest(doses, prompt_len=1)}, NO_HISTORY)
    output = model.layers[1].self_attn(H)
    with torch.no_grad():
        inner = H * 2 + 2 * model.layers[1].self_attn.o_proj(steers["walk"].delta[:, 0])
    moved = inner + 3 * steers["bend"].vectors[0] / steers["bend"].vectors[0].norm()
    expected = moved * inner.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_every_site_must_be_reached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    steers = {"push": PUSH, "norm": vector((1,), site="attn_in")}
    layers = attached(steers, model, monkeypatch)
    assert layers is not None
    assert layers.unreached_sites() == [
        "attn_in of layer 1",
        "resid of layer 0",
        "resid of layer 2",
    ]
    model.layers[0](H, R)
    model.layers[1](H, R)
    assert layers.unreached_sites() == ["attn_in of layer 1", "resid of layer 2"]
    model.layers[2](H, R)
    model.layers[1].input_layernorm(H, R)
    assert layers.unreached_sites() == []


def test_layers_are_to_be_reached_after_the_check_of_steers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an eager run reaches says nothing of the compiled model."""
    model = model_of()
    layers = attached({"push": PUSH}, model, monkeypatch)
    assert layers is not None

    def run(num_rows: int) -> None:
        hidden, residual = torch.ones(num_rows, WIDTH), torch.zeros(num_rows, WIDTH)
        for layer in model.layers:
            hidden, residual = layer(hidden, residual)

    check_steering(
        layers.sites,
        lambda site, index: Place(model.layers[site.table.layers[index]], is_pair=True),
        model.layers[0],
        WIDTH,
        run,
        max_rows=8,
        attention_layers=(),
        device=CPU,
    )
    assert layers.unreached_sites() == ["resid of layer 0", "resid of layer 2"]


def test_a_stage_hooks_its_own_layers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = attached({"push": PUSH}, model_of(missing=(0, 1)), monkeypatch)
    assert layers is not None
    assert layers.unreached_sites() == ["resid of layer 2"]
    assert attached({"push": PUSH}, model_of(missing=(0, 2)), monkeypatch) is None


def test_a_model_without_the_module_of_a_site_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    steers = {"norm": vector((1,), site="attn_in")}
    with pytest.raises(SteerError, match="Plain has no ln_1: the site attn_in does not exist"):
        attached(steers, model_of(), monkeypatch, Family(input_norm="ln_1"))


@pytest.mark.parametrize(
    ("batched", "captured", "max_tokens"),
    [(1, None, 512), (512, 0, 512), (513, None, 1024), (8, 600, 1024), (8192, 512, 8192)],
)
def test_the_map_holds_the_largest_batch_and_graph(
    batched: int, captured: int | None, max_tokens: int
) -> None:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batched),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=captured),
    )
    assert serving_layers._max_tokens(config) == max_tokens


def test_the_name_of_a_site_is_a_graph_input_like_vllms_layer_names() -> None:
    """Else each hooked layer would be a piece of its own for the compiler."""
    from vllm.utils.torch_utils import _USE_LAYERNAME

    hidden, _, site_name = steer_op._op._schema.arguments
    assert str(site_name.type) == ("PyObject" if _USE_LAYERNAME else "str")
    assert hidden.alias_info is not None and hidden.alias_info.is_write
