"""Interventions of pyreft: state dicts and folders as ``ReftModel.save`` writes them.

The layouts and the formulas are those of pyreft 0.1.0 with pyvene 0.1.8. They were compared with
the library itself once: interventions in two layers of a small Llama were trained for five steps,
saved with ``ReftModel.save`` and read here, for each of the six classes, and the outputs differed
by less than 3e-7.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vllm_steer import LowRankSteer, SteerError, load_steer

HIDDEN, RANK = 8, 3
NAME = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"


def trained_rotation(generator: torch.Generator) -> nn.Module:
    """A module whose ``weight [hidden, rank]`` PyTorch keeps orthogonal, after some steps."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(HIDDEN, RANK, generator=generator))
    nn.init.orthogonal_(module.weight, generator=generator)
    nn.utils.parametrizations.orthogonal(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    target = torch.randn(HIDDEN, RANK, generator=generator)
    for _ in range(3):
        optimizer.zero_grad()
        (module.weight - target).square().sum().backward()
        optimizer.step()
    return module


class Made:
    """The state dict of one intervention, and its output by the formula of its class."""

    def __init__(self, method: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.state: dict[str, torch.Tensor] = OrderedDict()
        self.output: Callable[[torch.Tensor], torch.Tensor]
        w, b, w2, b2 = random(RANK, HIDDEN), random(RANK), random(RANK, HIDDEN), random(RANK)
        module = trained_rotation(generator)
        r = module.weight.detach().double()  # [hidden, rank]
        assert torch.allclose(r.T @ r, torch.eye(RANK).double(), atol=1e-5)
        parametrized = {f"rotate_layer.{n}": t for n, t in module.state_dict().items()}
        sizes = {"embed_dim": torch.tensor(HIDDEN), "interchange_dim": torch.tensor(HIDDEN)}
        linear = {"learned_source.weight": w, "learned_source.bias": b}
        projection = {"proj_layer.weight": w2, "proj_layer.bias": b2}

        def source(h: torch.Tensor) -> torch.Tensor:
            return h @ w.double().T + b.double()

        def projected(h: torch.Tensor) -> torch.Tensor:
            return h @ w2.double().T + b2.double()

        if method == "Loreft":
            self.state |= {"weight": w, "bias": b, "rotate_layer": module.weight.detach()}
            self.output = lambda h: h + (source(h) - h @ r) @ r.T
        elif method == "Direft":
            self.state |= {**sizes, **parametrized, **linear}
            self.output = lambda h: h + source(h) @ r.T
        elif method == "Noreft":
            self.state |= {**sizes, **projection, **linear}
            self.output = lambda h: h + (source(h) - projected(h)) @ w2.double()
        elif method == "Nodireft":
            self.state |= {**sizes, **projection, **linear}
            self.output = lambda h: h + source(h) @ w2.double()
        elif method == "Consreft":
            self.state |= {"learned_source": b, **sizes, **parametrized}
            self.output = lambda h: h + (b.double() - h @ r) @ r.T
        else:
            self.state |= {"learned_source": b, **sizes, **parametrized}
            self.output = lambda h: h + b.double() @ r.T


METHODS = ("Loreft", "Direft", "Noreft", "Nodireft", "Consreft", "Lobireft")


def config(method: str, count: int = 1) -> str:
    type_name = f"<class 'pyreft.interventions.{method}Intervention'>"
    return json.dumps({"intervention_types": [type_name] * count, "mode": "parallel"})


def folder(path: Path, method: str, states: dict[str, dict[str, torch.Tensor]]) -> Path:
    path.mkdir(exist_ok=True)
    for name, state in states.items():
        torch.save(state, path / name)
    (path / "config.json").write_text(config(method, len(states)))
    return path


def output(steer: LowRankSteer, row: int, h: torch.Tensor) -> torch.Tensor:
    assert steer.bias is not None
    a, b, bias = (t[row].double() for t in (steer.a, steer.b, steer.bias))
    return h + (h @ a.T + bias) @ b.T


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_computes_what_its_interventions_compute(tmp_path: Path, method: str) -> None:
    made = {10: Made(method, 1), 2: Made(method, 2)}
    states = {NAME.format(layer): one.state for layer, one in made.items()}
    steer = load_steer(folder(tmp_path / "reft", method, states))
    assert (steer.kind, steer.layers, steer.site, steer.rank) == ("low_rank", (2, 10), "resid", 3)
    h = torch.randn(20, HIDDEN, dtype=torch.float64)
    for row, layer in enumerate(steer.layers):
        expected = made[layer].output(h)
        assert (expected - h).norm() > 1
        torch.testing.assert_close(output(steer, row, h), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["Loreft", "Direft"])
def test_one_file_is_the_map_of_the_layer_that_is_given(tmp_path: Path, method: str) -> None:
    made = Made(method, 1)
    torch.save(made.state, tmp_path / "x.bin")
    steer = load_steer(tmp_path / "x.bin", layers=15, site="attn_out", default_strength=1)
    h = torch.randn(20, HIDDEN, dtype=torch.float64)
    assert (steer.layers, steer.site, steer.default_strength) == ((15,), "attn_out", 1)
    torch.testing.assert_close(output(steer, 0, h), made.output(h), atol=1e-5, rtol=1e-5)
    for layers in ({}, {"layers": "1-2"}):
        with pytest.raises(SteerError, match="the map of one layer; give the key layers, the N"):
            load_steer(tmp_path / "x.bin", **layers)


def test_half_precision_weights_are_subtracted_in_float32(tmp_path: Path) -> None:
    state = Made("Loreft", 1).state
    state["weight"], state["bias"] = state["weight"].bfloat16(), state["bias"].bfloat16()
    torch.save(state, tmp_path / "x.bin")
    steer = load_steer(tmp_path / "x.bin", layers=1)
    assert torch.equal(steer.a[0], state["weight"].float() - state["rotate_layer"].T)


@pytest.mark.parametrize("method", ["Noreft", "Consreft"])
def test_a_file_that_two_interventions_would_write_needs_its_folder(
    tmp_path: Path, method: str
) -> None:
    torch.save(Made(method, 1).state, tmp_path / "x.bin")
    with pytest.raises(SteerError, match=r"save the same tensors; give the folder, whose config"):
        load_steer(tmp_path / "x.bin", layers=1)


@pytest.mark.parametrize(
    ("name", "site", "layer"),
    [
        ("intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin", "resid", 15),
        ("intkey_layer_15_comp_block_input_unit_pos_nunit_4#0.bin", "resid", 14),
        ("intkey_layer_3_comp_attention_output_unit_pos_nunit_1#0.bin", "attn_out", 3),
        ("intkey_layer_3_comp_attention_input_unit_pos_nunit_1#0.bin", "attn_in", 3),
        ("intkey_comp_model_layers[7]_output_unit_pos_nunit_1#0.bin", "resid", 7),
        ("intkey_comp.model.layers[7].input.unit.pos.nunit.1#0.bin", "resid", 6),
        ("intkey_comp_transformer_h[7]_output_unit_pos_nunit_1#0.bin", "resid", 7),
    ],
)
def test_the_name_of_a_file_says_its_place(
    tmp_path: Path, name: str, site: str, layer: int
) -> None:
    steer = load_steer(folder(tmp_path / "reft", "Loreft", {name: Made("Loreft", 1).state}))
    assert (steer.site, steer.layers) == (site, (layer,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("intkey_layer_3_comp_mlp_output_unit_pos_nunit_1#0.bin", "its place has no site; allowed"),
        ("intkey_layer_3_comp_block_output_unit_h_pos_nunit_1#0.bin", "unit is 'h_pos'; expected"),
        ("intkey_layer_0_comp_block_input_unit_pos_nunit_1#0.bin", "input of block 0 cannot be"),
        ("intkey_layer_99999_comp_block_output_unit_pos_nunit_1#0.bin", "its place has no site"),
        ("intkey_comp_lm_head_output_unit_pos_nunit_1#0.bin", "its place has no site"),
        ("intkey_x.bin", "its place has no site"),
    ],
)
def test_an_intervention_elsewhere_is_refused(tmp_path: Path, name: str, message: str) -> None:
    path = folder(tmp_path / "reft", "Loreft", {name: Made("Loreft", 1).state})
    with pytest.raises(SteerError, match=message):
        load_steer(path)


def test_two_interventions_of_a_layer_are_one_if_they_share_weights(tmp_path: Path) -> None:
    first, second = NAME.format(4), NAME.format(4).replace("#0", "#1")
    state = Made("Loreft", 1).state
    shared = folder(tmp_path / "shared", "Loreft", {first: state, second: state})
    assert load_steer(shared).layers == (4,)
    own = folder(tmp_path / "own", "Loreft", {first: state, second: Made("Loreft", 2).state})
    with pytest.raises(SteerError, match=r"#1\.bin: it has two interventions .* in layer 4"):
        load_steer(own)


def test_layers_of_a_folder_can_be_selected(tmp_path: Path) -> None:
    states = {NAME.format(layer): Made("Direft", layer).state for layer in (1, 2, 3)}
    path = folder(tmp_path / "reft", "Direft", states)
    whole, kept = load_steer(path), load_steer(path, layers="2-3", hidden_size=HIDDEN)
    assert kept.layers == (2, 3) and torch.equal(kept.a, whole.a[1:])
    for overrides, message in (
        ({"layers": 4}, "layers 4 are not in this steer; it has 1-3"),
        ({"kind": "vector"}, "the kind of a folder of pyreft is low_rank and the key kind is vec"),
        ({"mode": "add"}, "mode does not apply to a steer of kind low_rank"),
        ({"rows": 1}, "rows does not apply to a folder of pyreft"),
    ):
        with pytest.raises(SteerError, match=message):
            load_steer(path, **overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            config("Loreft").replace("Loreft", "Other"),
            "intervention_types has OtherIntervention; e",
        ),
        (config("Nodireft"), r"those of LoreftIntervention, and config\.json says Nodireft"),
        ("{}", "intervention_types is None; expected the types"),
        ('{"intervention_types": []}', r"intervention_types is \[\]"),
        ('{"intervention_types": [1]}', r"intervention_types is \[1\]"),
        ('{"intervention_types": ["aIntervention", "bIntervention"]}', "expected one of Loreft"),
        ("[1]", r"config\.json is \[1\]; expected a JSON object"),
        ("x", r"config\.json is not JSON"),
    ],
)
def test_a_config_that_does_not_say_the_type_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = folder(tmp_path / "reft", "Loreft", {NAME.format(1): Made("Loreft", 1).state})
    (path / "config.json").write_text(text)
    with pytest.raises(SteerError, match=message):
        load_steer(path)


def test_the_identity_variant_is_read_as_loreft(tmp_path: Path) -> None:
    path = folder(tmp_path / "reft", "Loreft", {NAME.format(1): Made("Loreft", 1).state})
    text = config("Loreft").replace("Intervention'", "Intervention_IdentityInit'")
    (path / "config.json").write_text(text)
    assert load_steer(path).layers == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(RANK, HIDDEN + 1)}, r"tensor weight is \[3, 9\]; expected \[3, 8\]"),
        ({"bias": torch.ones(RANK + 1)}, r"tensor bias is \[4\]; expected \[3\]"),
        ({"bias": None}, "bias is None; expected a tensor"),
        ({"bias": [1.0]}, r"bias is \[1.0\]; expected a tensor"),
        ({"rotate_layer": torch.ones(HIDDEN)}, r"rotate_layer is \[8\]; expected 2 dimensions"),
        ({"weight": torch.full((RANK, HIDDEN), torch.nan)}, "weight has 24 values that are NaN"),
        ({"weight": torch.ones(RANK, HIDDEN).int()}, "weight is torch.int32; expected a floating"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    state = {n: t for n, t in {**Made("Loreft", 1).state, **changes}.items() if t is not None}
    path = folder(tmp_path / "reft", "Loreft", {NAME.format(1): state})
    with pytest.raises(SteerError, match=message) as error:
        load_steer(path)
    assert NAME.format(1) in str(error.value)
    with pytest.raises(SteerError, match=message):
        load_steer(path / NAME.format(1), layers=1)


@pytest.mark.parametrize("part", ["original", "0.base"])
def test_a_damaged_rotation_is_refused(tmp_path: Path, part: str) -> None:
    state = Made("Direft", 1).state
    name = f"rotate_layer.parametrizations.weight.{part}"
    for tensor in (torch.ones(HIDDEN, HIDDEN + 1), torch.ones(2), state[name] * torch.inf):
        torch.save({**state, name: tensor}, tmp_path / "x.bin")
        with pytest.raises(SteerError, match="rotat"):
            load_steer(tmp_path / "x.bin", layers=1)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "reft", "Loreft", {NAME.format(1): {"x": torch.ones(2)}})
    with pytest.raises(SteerError, match="its content is x; expected an intervention of pyreft"):
        load_steer(path)
    (path / NAME.format(1)).write_bytes(b"text")
    with pytest.raises(SteerError, match=r"#0\.bin: not a readable archive"):
        load_steer(path)
    (path / NAME.format(1)).unlink()
    with pytest.raises(SteerError, match="is a folder; give a file"):
        load_steer(path)


def test_maps_of_several_ranks_or_sites_are_refused(tmp_path: Path) -> None:
    state = Made("Loreft", 1).state
    other = {n: t[:, :2] if n == "rotate_layer" else t[:2] for n, t in state.items()}
    path = folder(tmp_path / "a", "Loreft", {NAME.format(1): state, NAME.format(2): other})
    with pytest.raises(SteerError, match=r"its maps are .*\[2, 8\].* by layer; expected one rank"):
        load_steer(path)
    elsewhere = NAME.format(2).replace("block_output", "attention_output")
    path = folder(tmp_path / "b", "Loreft", {NAME.format(1): state, elsewhere: state})
    with pytest.raises(SteerError, match="at the sites attn_out, resid and a steer has one"):
        load_steer(path)


class Calls:
    """Pickles to a call that leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_folder_of_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    state = {**Made("Loreft", 1).state, "extra": Calls(marker)}
    path = folder(tmp_path / "reft", "Loreft", {NAME.format(1): state})
    with pytest.raises(SteerError, match="refused: its pickle refers to"):
        load_steer(path)
    assert not marker.exists()
