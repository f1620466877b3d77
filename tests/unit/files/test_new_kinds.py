"""Files of low-rank maps, SAE features, conditions and bounded vectors."""

import json
import math
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_steer import (
    ConditionSteer,
    LowRankSteer,
    SAESteer,
    Steer,
    SteerConfig,
    SteerError,
    VectorSteer,
    load_steer,
    save_steer,
)
from vllm_steer.config import Limits
from vllm_steer.plan import SteerPlan
from vllm_steer.runtime.steer_file import store
from vllm_steer.steers.content import content_digest

INF = math.inf
TEXTS: dict[str, Any] = {"base_model": "m", "description": "d é", "recipe": {"a": [1, {"b": None}]}}


def rows(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).view(shape) / 64


def low_rank(**changes: Any) -> LowRankSteer:
    tensors = {"a": rows(2, 3, 6), "b": rows(2, 6, 3), "bias": rows(2, 3)}
    return LowRankSteer(**{**tensors, "layers": (1, 4), "site": "attn_out", **TEXTS, **changes})


def sae(**changes: Any) -> SAESteer:
    tensors = {"encoder": rows(2, 6), "decoder": -rows(2, 6)}
    numbers = {"bias": -rows(2), "threshold": rows(2)}
    return SAESteer(**{**tensors, **numbers, "layers": (1, 4), **TEXTS, **changes})


def condition(**changes: Any) -> ConditionSteer:
    options = {"threshold": -0.1, "similarity": "cast", "side": "below", "tokens": "any"}
    return ConditionSteer(**{"vector": rows(1, 6), "layers": (7,), **options, **TEXTS, **changes})


def projection(**changes: Any) -> VectorSteer:
    options: dict[str, Any] = {"mode": "project", "low": -INF, "high": 2.5}
    return VectorSteer(**{"vectors": rows(2, 6), "layers": (1, 4), **options, **TEXTS, **changes})


STEERS = {
    "low_rank": low_rank(),
    "low_rank without bias": low_rank(bias=None, default_strength=0.5),
    "low_rank in bfloat16": low_rank(a=rows(2, 3, 6).bfloat16(), site="attn_in"),
    "clamp": sae(low=1.5, high=INF),
    "scale": sae(mode="scale", default_strength=-1.0),
    "add": sae(mode="add", site="attn_out"),
    "condition": condition(),
    "condition of defaults": ConditionSteer(vector=rows(1, 6), layers=(0,), threshold=1e-30),
    "project": projection(),
    "project out": projection(low=0.0, high=0.0),
    "relative": projection(mode="relative", low=0.0, high=0.0),
}


@pytest.mark.parametrize("name", STEERS)
def test_a_saved_steer_is_read_back_and_saved_as_the_same_bytes(tmp_path: Path, name: str) -> None:
    steer = STEERS[name]
    save_steer(steer, tmp_path / "a")
    loaded = load_steer(tmp_path / "a")
    assert type(loaded) is type(steer)
    for field in fields(steer):
        value, expected = getattr(loaded, field.name), getattr(steer, field.name)
        if isinstance(expected, torch.Tensor):
            assert value.dtype == expected.dtype and torch.equal(value, expected)
        else:
            assert value == expected, field.name
    assert content_digest(loaded) == content_digest(steer)
    save_steer(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_metadata_of_each_kind_are_its_keys(tmp_path: Path) -> None:
    expected = {
        "clamp": {"layers": "1,4", "site": "resid", "mode": "clamp", "low": "1.5", "high": "inf"},
        "scale": {"layers": "1,4", "site": "resid", "mode": "scale", "default_strength": "-1.0"},
        "project": {"layers": "1,4", "site": "resid", "mode": "project", "low": "-inf"}
        | {"high": "2.5"},
        "relative": {"layers": "1,4", "site": "resid", "mode": "relative"},
        "low_rank": {"layers": "1,4", "site": "attn_out"},
        "condition": {"layers": "7", "site": "resid", "threshold": "-0.1", "similarity": "cast"}
        | {"side": "below", "tokens": "any"},
    }
    common = {"format", "format_version", "kind", "hidden_size", "base_model", "description"}
    for name, metadata in expected.items():
        save_steer(STEERS[name], tmp_path / "a")
        with safe_open(str(tmp_path / "a"), framework="pt") as file:
            found = file.metadata()
        assert {k: v for k, v in found.items() if k not in common | {"recipe"}} == metadata


def edited(path: Path, steer: Steer, tensors: dict[str, Any], metadata: dict[str, Any]) -> Path:
    """The steer's file with other tensors and metadata; None removes one."""
    save_steer(steer, path)
    with safe_open(str(path), framework="pt") as file:
        merged = {**file.metadata(), **metadata}
    changed = {**load_file(path), **tensors}
    save_file(
        {name: tensor for name, tensor in changed.items() if tensor is not None},
        path,
        {name: text for name, text in merged.items() if text is not None},
    )
    return path


@pytest.mark.parametrize(
    ("steer", "tensors", "metadata", "message"),
    [
        (low_rank(), {"a": None}, {}, "it has no tensor a; a file of kind low_rank has a and b"),
        (low_rank(), {"vectors": rows(2, 6)}, {}, "unknown tensors vectors; a file of kind low_r"),
        (low_rank(), {"b": rows(2, 3, 6)}, {}, r"tensor b is \[2, 3, 6\] and a \[2, 3, 6\]; exp"),
        (low_rank(), {"bias": rows(2, 4)}, {}, r"tensor bias is \[2, 4\]"),
        (low_rank(), {"a": rows(2, 3, 6) * math.nan}, {}, "tensor a has 36 values that are NaN"),
        (low_rank(), {}, {"layers": None}, "the metadata has no layers"),
        (low_rank(), {}, {"layers": "1"}, "tensor a has 2 layers and layers names 1"),
        (low_rank(), {}, {"hidden_size": "7"}, "tensor width is 6 but hidden_size is 7"),
        (low_rank(), {}, {"mode": "add"}, "mode does not apply to a steer of kind low_rank"),
        (low_rank(), {}, {"site": "heads"}, "site is 'heads'; allowed: resid"),
        (sae(), {"bias": None}, {}, "it has no tensor bias; a file of kind sae has encoder"),
        (sae(), {"threshold": -rows(2)}, {}, "threshold has negative values"),
        (sae(), {"bias": rows(2, 1)}, {}, r"tensor bias is \[2, 1\]; expected 1 dimensions"),
        (sae(), {"encoder": rows(2, 5)}, {}, r"encoder is \[2, 5\] and decoder \[2, 6\]"),
        (sae(), {}, {"mode": "rotate"}, "mode is 'rotate'; allowed: add, clamp, scale"),
        (sae(), {}, {"mode": "add"}, "low, high does not apply to mode add"),
        (sae(), {}, {"low": "3", "high": "2"}, "low is 3.0 and high is 2.0; low must be at most"),
        (sae(), {}, {"low": "nan"}, "low is 'nan': Value error, expected a number"),
        (sae(), {}, {"high": "1_0"}, "high is '1_0': Value error, expected a number"),
        (condition(), {"vector": rows(2, 6)}, {}, "has 2 layers and layers names 1"),
        (condition(), {"vector": rows(1, 6) * 0}, {}, "tensor vector is zero"),
        (condition(), {}, {"threshold": None}, "threshold is not in the file; give it as a key"),
        (condition(), {}, {"threshold": "inf"}, "threshold is 'inf'"),
        (condition(), {}, {"similarity": "cos"}, "similarity is 'cos': Input should be 'cosine'"),
        (condition(), {}, {"tokens": "all"}, "tokens is 'all': Input should be 'last' or 'any'"),
        (condition(), {}, {"default_strength": "1"}, "default_strength does not apply to a steer"),
        (projection(), {}, {"mode": "relative"}, "low, high does not apply to mode relative"),
        (projection(), {}, {"mode": "clamp"}, "mode is 'clamp'; allowed: add, rotate, project"),
        (projection(), {}, {"threshold": "1"}, "threshold does not apply to a steer of kind vec"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_file_that_is_no_steer_is_refused(
    tmp_path: Path, steer: Steer, tensors: Any, metadata: Any, message: str
) -> None:
    with pytest.raises(SteerError, match=message) as error:
        load_steer(edited(tmp_path / "x", steer, tensors, metadata))
    assert str(tmp_path / "x") in str(error.value)


@pytest.mark.parametrize(
    ("steer", "overrides", "message"),
    [
        (low_rank(), {"mode": "add"}, "mode does not apply to a steer of kind low_rank; remove"),
        (low_rank(), {"low": 0}, "low does not apply to a steer of kind low_rank"),
        (low_rank(), {"epsilon": 1}, "epsilon does not apply to a steer of kind low_rank"),
        (low_rank(), {"feature": 1}, "feature does not apply to a vllm-steer file"),
        (low_rank(), {"kind": "sae"}, "kind is low_rank in the file and sae in the overrides"),
        (low_rank(), {"layers": "2"}, "layers 2 are not in this steer; it has 1,4"),
        (sae(), {"side": "above"}, "side does not apply to a steer of kind sae"),
        (sae(), {"schedule": "dim"}, "schedule does not apply to a steer of kind sae"),
        (sae(), {"mode": "add", "low": 0}, "low does not apply to mode add; remove the key, or g"),
        (sae(), {"low": INF}, "low is inf and high is 0.0; low must be at most high"),
        (condition(), {"default_strength": 1}, "default_strength does not apply to a steer of ki"),
        (condition(), {"mode": "add"}, "mode does not apply to a steer of kind condition"),
        (condition(), {"high": "inf"}, "high does not apply to a steer of kind condition"),
        (condition(), {"kind": "vector"}, "kind is condition in the file and vector in the over"),
        (projection(), {"tokens": "any"}, "tokens does not apply to a steer of kind vector"),
        (projection(), {"architecture": "gated"}, "architecture does not apply to a vllm-steer"),
        (projection(mode="add", low=0.0, high=0.0), {"high": 3}, "high does not apply to mode add"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_key_that_does_not_apply_is_refused(
    tmp_path: Path, steer: Steer, overrides: Any, message: str
) -> None:
    save_steer(steer, tmp_path / "x")
    with pytest.raises(SteerError, match=message):
        load_steer(tmp_path / "x", **overrides)


def test_keys_replace_what_the_file_says(tmp_path: Path) -> None:
    save_steer(projection(), tmp_path / "v")
    assert load_steer(tmp_path / "v", low="-1", high="inf").high == INF
    added = load_steer(tmp_path / "v", mode="add", layers=4)
    assert (added.mode, added.low, added.high, added.layers) == ("add", 0, 0, (4,))
    save_steer(sae(low=1, high=2), tmp_path / "s")
    assert load_steer(tmp_path / "s", mode="scale").mode == "scale"
    assert load_steer(tmp_path / "s", low="-inf").low == -INF
    save_steer(condition(), tmp_path / "c")
    changed = load_steer(tmp_path / "c", threshold="0.5", side="above", site="attn_in")
    assert (changed.threshold, changed.side, changed.tokens) == (0.5, "above", "any")
    save_steer(low_rank(), tmp_path / "l")
    kept = load_steer(tmp_path / "l", layers=4, default_strength=3)
    assert torch.equal(kept.a, rows(2, 3, 6)[1:]) and kept.default_strength == 3


def test_a_config_names_every_kind_and_its_plan_survives_json(tmp_path: Path) -> None:
    for name in ("project", "clamp", "condition", "low_rank"):
        save_steer(STEERS[name], tmp_path / name)
    (tmp_path / "steers.yaml").write_text(
        "steers:\n"
        "  out: {path: project, low: -.inf, high: .inf}\n"
        "  cap: {path: clamp, mode: clamp, low: '-inf', high: 4}\n"
        "  test: {path: condition, threshold: 0.5, tokens: last}\n"
        "  map: {path: low_rank, layers: 4}\n"
    )
    plan = SteerPlan.of(SteerConfig.load(tmp_path / "steers.yaml"))
    data = json.loads(json.dumps(plan.to_json()))
    restored = SteerPlan.from_json(data)
    assert (restored.steers["out"].low, restored.steers["out"].high) == (-INF, INF)
    assert {name: steer.load().kind for name, steer in restored.steers.items()} == {
        "out": "vector",
        "cap": "sae",
        "test": "condition",
        "map": "low_rank",
    }
    assert restored.steers["cap"].load().low == -INF


@pytest.mark.parametrize("name", STEERS)
def test_a_steer_that_is_loaded_while_serving_is_stored_as_it_is(tmp_path: Path, name: str) -> None:
    save_steer(STEERS[name], tmp_path / "x")
    options = {"low": "-inf"} if getattr(STEERS[name], "has_bounds", False) else {}
    (tmp_path / "stored").mkdir()
    data = (tmp_path / "x").read_bytes()
    planned = store("mine", data, options, Limits(), tmp_path / "stored")
    expected = load_steer(tmp_path / "x", **options)
    assert content_digest(planned.load()) == content_digest(expected) == planned.content


@pytest.mark.parametrize("name", ["low_rank", "clamp", "condition", "project"])
def test_a_damaged_file_gives_a_steer_or_a_steer_error(tmp_path: Path, name: str) -> None:
    save_steer(replace(STEERS[name], recipe=None), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (tmp_path / "x").write_bytes(data if position % 2 else data[:position])
        try:
            load_steer(tmp_path / "x")
        except SteerError as error:
            refused += 1
            assert str(tmp_path / "x") in str(error)
    assert refused > len(whole) / 6


def test_a_file_of_an_older_version_has_no_new_keys(tmp_path: Path) -> None:
    """The bytes of a vector in the layout that every version has written."""
    metadata = {"format": "vllm-steer", "format_version": "1", "kind": "vector"}
    metadata |= {"hidden_size": "2", "layers": "3", "site": "resid", "mode": "rotate"}
    header = {
        "__metadata__": metadata,
        "vectors": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "old").write_bytes(
        struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.0, 2.0)
    )
    steer = load_steer(tmp_path / "old")
    assert (steer.mode, steer.vectors.tolist(), steer.low) == ("rotate", [[1.0, 2.0]], 0.0)
