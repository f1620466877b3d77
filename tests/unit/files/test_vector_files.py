"""Files of kind ``vector`` and ``delta``: saved steers are read back, and errors are named."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_steer import DeltaSteer, SteerError, VectorSteer, load_steer, save_steer

VECTOR = {
    "format": "vllm-steer",
    "format_version": "1",
    "kind": "vector",
    "hidden_size": "6",
    "layers": "1,4,5",
    "site": "resid",
    "mode": "add",
}
DELTA = {**VECTOR, "kind": "delta", "site": "heads", "schedule": "dim"}
DELTA.pop("mode")


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def write(
    path: Path, metadata: dict[str, str | None], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """A vector file written with safetensors alone; a metadata value None drops the key."""
    merged = {k: v for k, v in {**VECTOR, **metadata}.items() if v is not None}
    save_file(tensors or {"vectors": ramp(3, 6)}, str(path), metadata=merged)
    return path


def write_delta(path: Path, metadata: dict[str, str | None]) -> Path:
    merged = {k: v for k, v in {**DELTA, **metadata}.items() if v is not None}
    save_file({"delta": ramp(2, 3, 6)}, str(path), metadata=merged)
    return path


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


@pytest.mark.parametrize("site", ["resid", "attn_in", "attn_out"])
@pytest.mark.parametrize("mode", ["add", "rotate"])
@pytest.mark.parametrize("scores", [None, (0.5, 1.0, 0.25)], ids=["no-scores", "scores"])
def test_a_saved_vector_loads_back_unchanged(
    tmp_path: Path, site: Any, mode: Any, scores: Any
) -> None:
    steer = VectorSteer(
        vectors=torch.randn(3, 6),
        layers=(0, 7, 31),
        site=site,
        mode=mode,
        layer_scores=scores,
        default_strength=0.1 + 0.2,
        base_model="a/b",
        description='naïve, "quoted"\nlines',
    )
    save_steer(steer, tmp_path / "steer")
    loaded = load_steer(tmp_path / "steer")
    for field in ("kind", "layers", "site", "mode", "layer_scores", "default_strength"):
        assert getattr(loaded, field) == getattr(steer, field)
    assert (loaded.base_model, loaded.description) == (steer.base_model, steer.description)
    assert torch.equal(loaded.vectors, steer.vectors)


@pytest.mark.parametrize("site", ["heads", "resid", "attn_in", "attn_out"])
@pytest.mark.parametrize("schedule", ["fixed", "start", "dim"])
def test_a_saved_delta_loads_back_unchanged(tmp_path: Path, site: Any, schedule: Any) -> None:
    steer = DeltaSteer(
        delta=torch.randn(4, 2, 6),
        layers=(3, 9),
        site=site,
        schedule=schedule,
        default_strength=-2.0,
    )
    save_steer(steer, tmp_path / "steer")
    loaded = load_steer(tmp_path / "steer")
    for field in ("kind", "layers", "site", "schedule", "steps", "default_strength"):
        assert getattr(loaded, field) == getattr(steer, field)
    assert torch.equal(loaded.delta, steer.delta)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_any_floating_dtype_loads_back_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    vectors = ramp(3, 6).to(dtype)
    loaded = load_steer(write(tmp_path / "steer", {}, {"vectors": vectors}))
    assert loaded.vectors.dtype == dtype
    assert torch.equal(loaded.vectors.float(), vectors.float())


def test_a_vector_file_has_the_documented_metadata_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "steer"
    vectors = ramp(4, 2)
    save_steer(
        VectorSteer(vectors=vectors, layers=(8, 9, 10, 12), mode="rotate", site="attn_in"), path
    )
    header = header_of(path)
    assert header.pop("__metadata__") == {
        "format": "vllm-steer",
        "format_version": "1",
        "kind": "vector",
        "hidden_size": "2",
        "base_model": "",
        "description": "",
        "layers": "8-10,12",
        "site": "attn_in",
        "mode": "rotate",
    }
    assert header == {"vectors": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}
    assert path.read_bytes()[-32:] == struct.pack("<8f", *range(1, 9))


def test_a_delta_file_has_the_documented_metadata(tmp_path: Path) -> None:
    path = tmp_path / "steer"
    steer = DeltaSteer(delta=ramp(5, 2, 6), layers=(0, 1), schedule="start", default_strength=1.5)
    save_steer(steer, path)
    header = header_of(path)
    assert header.pop("__metadata__") == {
        "format": "vllm-steer",
        "format_version": "1",
        "kind": "delta",
        "width": "6",
        "base_model": "",
        "description": "",
        "layers": "0-1",
        "site": "heads",
        "schedule": "start",
        "default_strength": "1.5",
    }
    assert header["delta"]["shape"] == [5, 2, 6]


@pytest.mark.parametrize(
    "sizes",
    [{"width": "6"}, {"hidden_size": "6"}, {"width": "6", "hidden_size": "6"}],
    ids=["now", "older", "both"],
)
def test_a_delta_file_has_its_width_or_an_older_ones_hidden_size(
    tmp_path: Path, sizes: dict[str, str]
) -> None:
    metadata = {"format": "vllm-steer", "format_version": "1", "kind": "delta", "layers": "0-1"}
    save_file({"delta": ramp(5, 2, 6)}, tmp_path / "steer", metadata | sizes)
    steer = load_steer(tmp_path / "steer")
    assert isinstance(steer, DeltaSteer)
    assert steer.hidden_size == 6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "the metadata has no width"),
        ({"width": "7"}, "tensor width is 6 but the key hidden_size, the width of its site, is 7"),
        ({"width": "abc"}, "metadata: width is 'abc'; expected a number"),
        ({"width": "6", "hidden_size": "8"}, "width is '6' and hidden_size '8'; a delta has one"),
    ],
    ids=["none", "wrong", "no-number", "two"],
)
def test_a_delta_file_with_a_wrong_width_is_refused(
    tmp_path: Path, sizes: dict[str, str], message: str
) -> None:
    metadata = {"format": "vllm-steer", "format_version": "1", "kind": "delta", "layers": "0-1"}
    save_file({"delta": ramp(5, 2, 6)}, tmp_path / "steer", metadata | sizes)
    with pytest.raises(SteerError, match=message):
        load_steer(tmp_path / "steer")


def test_layers_keep_some_of_the_files_layers_with_their_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {"layer_scores": "[0.1, 0.4, 0.5]"})
    steer = load_steer(path, layers="5,1")
    assert steer.layers == (1, 5)
    assert steer.layer_scores == (0.1, 0.5)
    assert torch.equal(steer.vectors, ramp(3, 6)[[0, 2]])


def test_layers_keep_some_of_a_deltas_layers(tmp_path: Path) -> None:
    steer = load_steer(write_delta(tmp_path / "steer", {}), layers=[4])
    assert steer.layers == (4,)
    assert torch.equal(steer.delta, ramp(2, 3, 6)[:, 1:2])


def test_overrides_replace_the_metadata_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {"default_strength": "2"})
    steer = load_steer(path, site="attn_out", mode="rotate", default_strength=4, base_model="m")
    assert (steer.site, steer.mode) == ("attn_out", "rotate")
    assert (steer.default_strength, steer.base_model) == (4.0, "m")
    assert load_steer(write_delta(tmp_path / "delta", {}), schedule="fixed").schedule == "fixed"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"layers": None}, "the metadata has no layers"),
        ({"layers": "1,4"}, r"vectors has 3 layers and layers names 2 \(1,4\); they must be equal"),
        ({"layers": "a-b"}, "layers is 'a-b'"),
        ({"layers": "4-1"}, "layers is '4-1'"),
        ({"layers": "1,1,4"}, "layers is '1,1,4'"),
        ({"layers": ""}, "layers is ''"),
        ({"layers": "0-9999," * 10_000}, "layers is '0-9999,0"),
        ({"site": "heads"}, "site is 'heads'; allowed: resid, attn_in, attn_out"),
        ({"site": "mlp"}, "site is 'mlp'"),
        ({"mode": "multiply"}, "mode is 'multiply'"),
        ({"hidden_size": "7"}, "tensor width is 6 but hidden_size is 7"),
        ({"schedule": "dim"}, "schedule does not apply to a steer of kind vector; remove the key"),
        ({"epsilon": "1"}, "epsilon does not apply to a steer of kind vector; remove the key"),
        ({"layer_scores": "[1, 2]"}, "layer_scores has 2 numbers for 3 layers"),
        ({"layer_scores": "[1, 2, NaN]"}, "metadata: layer_scores: NaN is not a JSON number"),
        ({"layer_scores": '"123"'}, "layer_scores is .* a JSON list of finite numbers"),
        ({"layer_scores": "[" * 100_000}, "metadata: layer_scores is not JSON"),
        ({"kind": "delta"}, "unknown tensors vectors; a file of kind delta has delta"),
        ({"kind": "lm_steer"}, "unknown tensors vectors; a file of kind lm_steer has proj"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}"[:30] for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_wrong_metadata_is_refused_with_file_and_value(
    tmp_path: Path, metadata: dict[str, str | None], message: str
) -> None:
    path = write(tmp_path / "steer", metadata)
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"site": "mlp"}, "site is 'mlp'"),
        ({"schedule": "never"}, "schedule is 'never'"),
        ({"mode": "add"}, "mode does not apply to a steer of kind delta; remove the key"),
        ({"layers": "1-4"}, r"delta has 3 layers and layers names 4"),
    ],
    ids=["site", "schedule", "mode", "layers"],
)
def test_wrong_metadata_of_a_delta_is_refused(
    tmp_path: Path, metadata: dict[str, str | None], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write_delta(tmp_path / "steer", metadata))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (ramp(3, 6).int(), "tensor vectors is torch.int32; expected a floating dtype"),
        (ramp(18), r"tensor vectors is \[18\]; expected 2 dimensions"),
        (torch.full((3, 6), torch.nan), "tensor vectors has 18 values that are NaN or infinite"),
        (torch.full((3, 6), torch.inf), "tensor vectors has 18 values that are NaN or infinite"),
        (torch.ones(3, 0), r"tensor vectors is \[3, 0\]"),
    ],
    ids=["int", "one-dimension", "nan", "inf", "empty"],
)
def test_wrong_tensors_are_refused(tmp_path: Path, vectors: torch.Tensor, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write(tmp_path / "steer", {}, {"vectors": vectors}))


def test_a_zero_vector_can_be_added_but_not_rotated_to(tmp_path: Path) -> None:
    vectors = ramp(3, 6)
    vectors[1] = 0
    path = write(tmp_path / "steer", {}, {"vectors": vectors})
    assert load_steer(path).mode == "add"
    with pytest.raises(SteerError, match="the vector of layer 4 is zero and has no direction"):
        load_steer(path, mode="rotate")
    assert load_steer(path, mode="add", layers="1,5").layers == (1, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": "1-3"}, "layers 2-3 are not in this steer; it has 1,4-5"),
        (
            {"kind": "delta"},
            "kind is vector in the file and delta in the overrides; remove the key",
        ),
        ({"epsilon": 1.0}, "epsilon does not apply to a steer of kind vector; remove the key"),
        ({"columns": [0]}, "columns does not apply to"),
        ({"schedule": "fixed"}, "schedule does not apply to"),
        ({"orient": True}, "orient does not apply to a vllm-steer file; remove the key"),
        ({"rows": "1-2"}, "rows does not apply to a vllm-steer file; remove the key"),
        (
            {"feature": 0, "hook": "x"},
            "feature, hook does not apply to a vllm-steer file; remove the key",
        ),
        ({"site": "head"}, "site is 'head'; allowed: resid, attn_in, attn_out"),
        ({"hidden_size": 4096}, "tensor width is 6 but hidden_size is 4096"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_overrides_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write(tmp_path / "steer", {}), **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"orient": "yes"}, "orient is 'yes'"),
        ({"rows": "x"}, "rows is 'x'.*0-based rows such as '1-32'"),
        ({"rows": True}, "rows is True"),
        ({"feature": -1}, "feature is -1"),
        ({"feature": True}, "feature is True"),
        ({"feature": 1.5}, "feature is 1.5"),
        ({"hook": 8}, "hook is 8"),
        ({"layers": "-1"}, "layers is '-1'"),
        ({"layers": True}, "layers is True"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_malformed_overrides_are_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write(tmp_path / "steer", {}), **overrides)
