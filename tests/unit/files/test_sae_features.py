"""``kind: sae``: a feature of an autoencoder with its encoder, as the library computes it."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vllm_steer import SAESteer, SteerError, load_steer

HIDDEN, FEATURES = 6, 8
HOOK = "blocks.3.hook_resid_post"
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": HIDDEN,
    "d_sae": FEATURES,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "hook_name": HOOK,
    "model_name": "gpt2-small",
    "finetuning_scaling_factor": False,
}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (HIDDEN, FEATURES),
        "W_dec": (FEATURES, HIDDEN),
        "b_enc": (FEATURES,),
        "b_dec": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saelens(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder as SAELens' ``save_model`` writes it."""
    save_file(tensors, folder / "sae_weights.safetensors")
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps(config))
    return folder / "sae_weights.safetensors"


def gemma_scope(folder: Path, save: Any = np.savez, **changes: Any) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in weights().items()}
    arrays |= {"threshold": np.linspace(0, 1.5, FEATURES, dtype=np.float32), **changes}
    save(folder / "params.npz", **{name: a for name, a in arrays.items() if a is not None})
    return folder / "params.npz"


def inputs() -> torch.Tensor:
    return torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def feature_of(steer: SAESteer, x: torch.Tensor) -> torch.Tensor:
    """The steer's feature by its own equation, in its first layer."""
    p = x @ steer.encoder[0].double() + steer.bias[0].double()
    return torch.where(p > steer.threshold[0].double(), p, 0)


def activations(tensors: dict[str, torch.Tensor], x: torch.Tensor, centred: bool) -> torch.Tensor:
    """The pre-activations of all features: ``(x - b_dec) W_enc + b_enc``."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return (x - wide["b_dec"] * centred) @ wide["W_enc"] + wide["b_enc"]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("feature", [0, 5, 7])
def test_a_standard_feature_is_the_relu_of_its_pre_activation(
    tmp_path: Path, feature: int, centred: bool
) -> None:
    path = saelens(tmp_path, {**CONFIG, "apply_b_dec_to_input": centred}, weights())
    steer = load_steer(path, kind="sae", feature=feature)
    assert (steer.layers, steer.site, steer.mode) == ((3,), "resid", "clamp")
    assert steer.base_model == "gpt2-small"
    assert torch.equal(steer.decoder[0], weights()["W_dec"][feature])
    expected = activations(weights(), inputs(), centred)[:, feature].relu()
    assert 10 < (expected > 0).sum() < 490
    torch.testing.assert_close(feature_of(steer, inputs()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", ["threshold", "log_threshold"])
def test_a_jumprelu_feature_is_zero_up_to_its_threshold(tmp_path: Path, stored: str) -> None:
    threshold = torch.linspace(0.1, 1.5, FEATURES)
    tensors = {**weights(), stored: threshold if stored == "threshold" else threshold.log()}
    path = saelens(tmp_path, {**CONFIG, "architecture": "jumprelu"}, tensors)
    steer = load_steer(path, kind="sae", feature=4, mode="scale")
    p = activations(weights(), inputs(), centred=True)[:, 4]
    expected = p.relu() * (p > threshold[4].double())
    assert ((p > 0) & (expected == 0)).sum() > 10
    torch.testing.assert_close(feature_of(steer, inputs()), expected, atol=1e-5, rtol=1e-5)


def test_a_gated_feature_is_the_magnitude_where_the_gate_is_open(tmp_path: Path) -> None:
    """Both paths by their own formulas: the gate is a threshold on the magnitude."""
    tensors = weights()
    generator = torch.Generator().manual_seed(3)
    for name in ("b_gate", "b_mag", "r_mag"):
        tensors[name] = torch.randn(FEATURES, generator=generator) / 2
    del tensors["b_enc"]
    path = saelens(tmp_path, {**CONFIG, "architecture": "gated"}, tensors)
    x, w = inputs(), {name: tensor.double() for name, tensor in tensors.items()}
    centred = (x - w["b_dec"]) @ w["W_enc"]
    expected = (centred + w["b_gate"] > 0) * (centred * w["r_mag"].exp() + w["b_mag"]).relu()
    for feature in range(FEATURES):
        steer = load_steer(path, kind="sae", feature=feature)
        torch.testing.assert_close(feature_of(steer, x), expected[:, feature], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "save",
    [
        np.savez,
        np.savez_compressed,
        lambda p, **a: np.savez(p, **{n: np.asfortranarray(v) for n, v in a.items()}),
    ],
    ids=["stored", "compressed", "by columns"],
)
def test_a_feature_of_gemma_scope_does_not_subtract_the_decoder_bias(
    tmp_path: Path, save: Any
) -> None:
    path = gemma_scope(tmp_path, save)
    steer = load_steer(path, kind="sae", feature=3, hook="blocks.5.hook_resid_pre", low=2, high=2)
    p = activations(weights(), inputs(), centred=False)[:, 3]
    expected = p.relu() * (p > float(np.linspace(0, 1.5, FEATURES, dtype=np.float32)[3]))
    assert (steer.layers, steer.low, steer.high) == ((4,), 2, 2)
    torch.testing.assert_close(feature_of(steer, inputs()), expected, atol=1e-5, rtol=1e-5)


def test_gemma_scope_may_write_small_letters(tmp_path: Path) -> None:
    plain = load_steer(gemma_scope(tmp_path), kind="sae", feature=2, layers="1,3", site="attn_out")
    arrays = {"W_enc": None, "W_dec": None}
    arrays |= {f"w_{part}": weights()[f"W_{part}"].numpy() for part in ("enc", "dec")}
    small = load_steer(
        gemma_scope(tmp_path, **arrays), kind="sae", feature=2, layers="1,3", site="attn_out"
    )
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, small.tensors[name]) and torch.equal(tensor[0], tensor[1])


def test_without_its_kind_the_file_stays_a_vector(tmp_path: Path) -> None:
    path = saelens(tmp_path, CONFIG, weights())
    steer = load_steer(path, feature=1, hook=HOOK)
    assert (steer.kind, steer.mode) == ("vector", "add")
    with pytest.raises(SteerError, match="do not contain the hook point"):
        load_steer(path, feature=1)


def test_keys_say_what_a_missing_config_would(tmp_path: Path) -> None:
    keys = {"architecture": "standard", "apply_b_dec_to_input": True, "hook": HOOK}
    with_config, without = tmp_path / "a", tmp_path / "b"
    for folder in (with_config, without):
        folder.mkdir()
    first = load_steer(saelens(with_config, CONFIG, weights()), kind="sae", feature=1)
    second = load_steer(saelens(without, None, weights()), kind="sae", feature=1, **keys)
    assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())
    assert first.layers == second.layers


@pytest.mark.parametrize(
    "config",
    [
        {"hook_point": HOOK, "normalize_activations": False},
        {"architecture": "standard", "metadata": {"hook_name": HOOK, "model_name": "m"}},
        {"architecture": "standard", "meta": {"hook_name": HOOK}, "apply_b_dec_to_input": True},
    ],
    ids=["oldest", "metadata", "meta"],
)
def test_configs_of_all_versions_say_the_hook(tmp_path: Path, config: dict[str, Any]) -> None:
    steer = load_steer(saelens(tmp_path, config, weights()), kind="sae", feature=1)
    expected = activations(weights(), inputs(), centred=True)[:, 1].relu()
    assert steer.layers == (3,)
    torch.testing.assert_close(feature_of(steer, inputs()), expected, atol=1e-5, rtol=1e-5)


def test_the_keys_of_a_place_replace_the_hook_of_the_config(tmp_path: Path) -> None:
    path = saelens(tmp_path, {**CONFIG, "hook_name": "blocks.1.attn.hook_z"}, weights())
    with pytest.raises(SteerError, match=r"hook is 'blocks\.1\.attn\.hook_z'; allowed: blocks"):
        load_steer(path, kind="sae", feature=1)
    assert load_steer(path, kind="sae", feature=1, layers=2, site="attn_in").layers == (2,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "topk"}, "architecture is 'topk': a top-k feature depends on all other"),
        ({"architecture": "matryoshka_batchtopk"}, "'matryoshka_batchtopk': a top-k feature dep"),
        ({"architecture": "jumprelu_transcoder"}, "a transcoder reads one place and writes anoth"),
        ({"architecture": "temporal"}, "architecture is 'temporal'; allowed: standard, jumprelu, "),
        ({"architecture": 3}, "cfg.json: architecture is 3; expected a str"),
        ({"architecture": "jumprelu"}, "it has no tensor threshold, which a JumpReLU autoencoder"),
        ({"architecture": "gated"}, "it has no tensor r_mag, which kind: sae needs"),
        ({"activation_fn_str": "topk"}, "activation_fn is topk: a top-k feature depends"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'; expected relu"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations is 'layer_norm'; expected",
        ),
        ({"normalize_activations": True}, "normalize_activations is True; expected none"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'; expected none"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'; expected a bool"),
        ({"hook_name": ["x"]}, r"hook_name is \['x'\]; expected a str"),
        ({"hook_name": None}, "do not contain the hook point; give the key hook"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_an_autoencoder_that_cannot_be_served_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = saelens(tmp_path, {**CONFIG, **config}, weights())
    with pytest.raises(SteerError, match=message):
        load_steer(path, kind="sae", feature=1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"threshold": torch.ones(FEATURES)}, "standard and the file has threshold, which such an"),
        ({"r_mag": torch.ones(FEATURES)}, "architecture is standard and the file has r_mag"),
        (
            {"scaling_factor": 2 * torch.ones(FEATURES)},
            "scaling_factor of feature 1 is 2; expected",
        ),
        (
            {"W_enc": torch.ones(FEATURES, HIDDEN)},
            r"W_enc is \[8, 6\]; expected \[6, 8\], as W_dec",
        ),
        ({"W_enc": None}, "it has no tensor W_enc, which kind: sae needs"),
        ({"b_enc": None}, "it has no tensor b_enc, which kind: sae needs"),
        ({"b_enc": torch.ones(1)}, r"tensor b_enc is \[1\]; expected \[8\]"),
        ({"b_dec": None}, "it has no tensor b_dec"),
        ({"W_enc": torch.full((HIDDEN, FEATURES), math.nan)}, "W_enc has 6 values that are NaN"),
        ({"b_enc": torch.full((FEATURES,), math.inf)}, "b_enc has 1 values that are NaN or inf"),
        (
            {"W_enc": torch.ones(HIDDEN, FEATURES).int()},
            "W_enc is torch.int32; expected a floating",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    changed = {n: t for n, t in {**weights(), **tensors}.items() if t is not None}
    with pytest.raises(SteerError, match=message):
        load_steer(saelens(tmp_path, CONFIG, changed), kind="sae", feature=1)


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({}, {}, "do not contain the hook point"),
        ({}, {"feature": 8}, "feature 8: the SAE has 8 features"),
        ({"threshold": None}, {"hook": HOOK}, "it has no tensor threshold"),
        ({"threshold": np.full(FEATURES, -1.0)}, {"hook": HOOK}, "threshold has negative values"),
        ({"W_enc": np.ones((HIDDEN, FEATURES), int)}, {"hook": HOOK}, "W_enc is int64; expected a"),
        ({}, {"hook": HOOK, "mode": "rotate"}, "mode is 'rotate'; allowed: add, clamp, scale"),
        ({}, {"hook": HOOK, "threshold": 1}, "threshold does not apply to a steer of kind sae"),
        ({}, {"hook": HOOK, "rows": 1}, "rows does not apply to the weights of an SAE"),
        ({}, {"hook": HOOK, "hidden_size": 7}, "tensor width is 6 but hidden_size is 7"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_gemma_scope_weights_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(gemma_scope(tmp_path, **changes), **{"kind": "sae", "feature": 1, **keys})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"cfg\.json is \[1\]; expected a JSON object"),
        ("{", r"cfg\.json is not JSON"),
        ('{"a": 1, "a": 2}', r"cfg\.json: the key 'a' is given twice"),
        (" " * 1_000_001, r"cfg\.json has more than 1000000 bytes, the limit"),
        ("[" * 100_000, r"cfg\.json"),
    ],
    ids=["list", "cut", "twice", "long", "nested"],
)
def test_a_config_that_is_no_json_object_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = saelens(tmp_path, None, weights())
    with pytest.raises(SteerError, match=r"cfg\.json is not beside the file"):
        load_steer(path, kind="sae", feature=1)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(SteerError, match=message):
        load_steer(path, kind="sae", feature=1)


def test_a_config_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = saelens(tmp_path, None, weights())
    (tmp_path / "cfg.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(SteerError, match=r"cfg\.json is not JSON"):
        load_steer(path, kind="sae", feature=1)


def test_a_column_of_a_large_encoder_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    """Gemma Scope's largest encoders have gigabytes. Seeking reads 16 MiB at a time."""
    features, hidden = 200_000, 64
    encoder = np.zeros((hidden, features), np.float32)
    encoder[:, 123_456] = np.arange(hidden)
    ones = {"b_enc": np.ones(features, np.float32), "threshold": np.ones(features, np.float32)}
    np.savez(tmp_path / "p.npz", W_enc=encoder, W_dec=encoder.T.copy(), **ones)
    load_steer(tmp_path / "p.npz", kind="sae", feature=1, hook=HOOK)  # imports are not counted
    tracemalloc.start()
    steer = load_steer(tmp_path / "p.npz", kind="sae", feature=123_456, hook=HOOK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert steer.encoder[0].tolist() == list(range(hidden))
    assert peak < 40 * 2**20 < encoder.nbytes
