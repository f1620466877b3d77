"""Saved files: the same bytes in every process, and only content that can be read back."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, load_steer, save_steer

PROGRAM = r"""
import hashlib, sys
from pathlib import Path
import torch
from vllm_steer import (ConditionSteer, DeltaSteer, LMSteer, LowRankSteer, SAESteer, VectorSteer,
                        save_steer)

def rows(*shape, dtype):
    count = torch.Size(shape).numel()
    return (torch.arange(1.0, count + 1).view(shape) / 64).to(dtype)

folder, digest = Path(sys.argv[1]), hashlib.sha256()
recipe = {"b": 1, "a": [1.5, {"z": None, "y": "\u00e9"}], "c": {"settings": True}}
common = {"recipe": recipe, "default_strength": 2.0, "base_model": "m"}
common["description"] = "d \u00e9\n"
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
              torch.float8_e5m2):
    for variant, shape in (("multiply", (2, 6, 3)), ("add", (2, 6)), ("offset", (2, 11))):
        names = ("projector1", "projector2") if variant == "multiply" else (variant,)
        tensors = {name: rows(*shape, dtype=dtype) for name in names}
        steer = LMSteer(variant=variant, epsilon=0.1, hidden_size=6, fixed_columns=(1,), **tensors,
                        **common)
        save_steer(steer, folder / f"{variant}-{dtype}")
    vector = VectorSteer(vectors=rows(2, 6, dtype=dtype), layers=(1, 3), layer_scores=(0.5, 1.0),
                         **common)
    save_steer(vector, folder / f"vector-{dtype}")
    save_steer(DeltaSteer(delta=rows(3, 2, 6, dtype=dtype), layers=(1, 3), **common),
               folder / f"delta-{dtype}")
    low_rank = LowRankSteer(a=rows(2, 3, 6, dtype=dtype), b=rows(2, 6, 3, dtype=dtype),
                            bias=rows(2, 3, dtype=dtype), layers=(1, 3), **common)
    save_steer(low_rank, folder / f"low_rank-{dtype}")
    sae = SAESteer(encoder=rows(2, 6, dtype=dtype), decoder=rows(2, 6, dtype=dtype),
                   bias=rows(2, dtype=dtype), threshold=rows(2, dtype=dtype), layers=(1, 3),
                   low=-float("inf"), high=0.1, **common)
    save_steer(sae, folder / f"sae-{dtype}")
    del common["default_strength"]
    condition = ConditionSteer(vector=rows(1, 6, dtype=dtype), layers=(3,), threshold=0.1, **common)
    save_steer(condition, folder / f"condition-{dtype}")
    common["default_strength"] = 2.0
for path in sorted(folder.iterdir()):
    digest.update(path.name.encode() + path.read_bytes())
print(digest.hexdigest())
"""


def test_every_process_writes_the_same_bytes_that_are_read_back(tmp_path: Path) -> None:
    digests = set()
    for seed in ("0", "1", "2", "random"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        line = [sys.executable, "-c", PROGRAM, str(folder)]
        process = subprocess.run(
            line, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        digests.add(process.stdout)
    assert len(digests) == 1
    paths = sorted((tmp_path / "0").iterdir())
    assert len(paths) == 6 * 8
    for path in paths:
        assert load_steer(path).recipe["a"] == [1.5, {"z": None, "y": "é"}]
        with safe_open(str(path), framework="pt") as file:
            assert list(file.metadata()["description"]) == list("d é\n")
            assert all(file.get_tensor(name).float().isfinite().all() for name in file.keys())  # noqa: SIM118


def test_the_header_is_aligned_and_sorted(tmp_path: Path) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,))
    for length in range(9):
        save_steer(replace(steer, description="x" * length), tmp_path / "x")
        data = (tmp_path / "x").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        assert size % 8 == 0 and list(header["__metadata__"]) == sorted(header["__metadata__"])
        assert (
            torch.frombuffer(bytearray(data[8 + size :]), dtype=torch.float32).tolist() == [1] * 4
        )


def shared(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        {1, 2},
        b"x",
        object(),
        torch.ones(2),
        np.float32(1),
        {1: "a"},
        {None: "a"},
        [{(1, 2): 3}],
        10**5000,
        -(10**30),
        "\ud800",
        {"\udcff": 1},
        shared(60),
        nested(40),
        nested(5000),
        cyclic(),
        ["x" * 1_000_000],
        list(range(200_000)),
        MappingProxyType({"a": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_recipe_that_is_no_json_is_refused_before_anything_is_written(
    tmp_path: Path, value: Any
) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,), recipe={"a": value})
    (tmp_path / "x").write_text("old")
    with pytest.raises(SteerError):
        save_steer(steer, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("depth", range(28, 36))
def test_a_recipe_has_the_same_depth_limit_when_saved_and_read(tmp_path: Path, depth: int) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,), recipe={"a": nested(depth)})
    try:
        save_steer(steer, tmp_path / "x")
    except SteerError as error:
        assert depth > 30 and "deep" in str(error)
    else:
        assert load_steer(tmp_path / "x").recipe == {"a": nested(depth)}


@pytest.mark.parametrize("name", ["description", "base_model"])
@pytest.mark.parametrize("value", ["\ud800", "a\udcffb", "x" * 1_000_000, None, 3, b"x"])
def test_a_text_that_cannot_be_saved_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,), **{name: value})
    with pytest.raises(SteerError, match=name):
        save_steer(steer, tmp_path / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("letter", ["x", "é", "\x00", '"', "\n", "😀"])
def test_metadata_is_measured_as_it_is_written(tmp_path: Path, letter: str) -> None:
    steer = VectorSteer(vectors=torch.ones(1, 4), layers=(0,))
    size = len(json.dumps(letter, ensure_ascii=False).encode()) - 2
    save_steer(replace(steer, description=letter * (890_000 // size)), tmp_path / "x")
    assert load_steer(tmp_path / "x").description == letter * (890_000 // size)
    with pytest.raises(
        SteerError, match=r"metadata has .* bytes; .*shorten the longest entry, " r"description"
    ):
        save_steer(replace(steer, description=letter * (901_000 // size)), tmp_path / "x")


def test_layers_that_cannot_be_read_back_are_refused(tmp_path: Path) -> None:
    layers = tuple(range(0, 2000, 2))
    steer = VectorSteer(vectors=torch.ones(len(layers), 4), layers=layers)
    with pytest.raises(SteerError, match="layers"):
        save_steer(steer, tmp_path / "x")
    assert os.listdir(tmp_path) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(recipe=st.dictionaries(st.text(), json_values), text=st.text())
def test_every_saved_steer_is_read_back(tmp_path: Path, recipe: dict[str, Any], text: str) -> None:
    steer = LMSteer(
        variant="add",
        epsilon=0.5,
        hidden_size=4,
        add=torch.ones(1, 4),
        recipe=recipe,
        description=text,
        base_model=text,
    )
    try:
        save_steer(steer, tmp_path / "x")
    except SteerError:
        assert any(map(_unsaveable, (recipe, text)))
        return
    digests = load_steer(tmp_path / "x")
    assert (digests.recipe, digests.description, digests.base_model) == (recipe, text, text)


def _unsaveable(value: Any) -> bool:
    if isinstance(value, float):
        return value != value or abs(value) == float("inf")
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(map(_unsaveable, [*value, *value.values()]))
    return isinstance(value, list) and any(map(_unsaveable, value))


def test_a_saved_delta_and_a_vector_are_read_back(tmp_path: Path) -> None:
    delta = DeltaSteer(delta=torch.ones(2, 1, 4), layers=(3,), site="attn_in", schedule="dim")
    save_steer(delta, tmp_path / "d")
    first = hashlib.sha256((tmp_path / "d").read_bytes()).digest()
    save_steer(load_steer(tmp_path / "d"), tmp_path / "e")
    assert hashlib.sha256((tmp_path / "e").read_bytes()).digest() == first
