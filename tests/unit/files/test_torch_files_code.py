"""Files of ``torch.save`` that name code, declare too much data or were changed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_tools import save, tensors

from vllm_steer import SteerError, load_steer


class Shell:
    """Pickles to a command."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return (os.system, (self.command,))


@pytest.mark.parametrize("location", ["bare", "value", "key", "field", "attribute"])
def test_a_file_that_names_code_is_refused_and_not_run(
    tmp_path: Path, steering_vectors: Any, location: str
) -> None:
    marker = tmp_path / "executed"
    evil: Any = Shell(marker)
    if location == "value":
        evil = {1: evil}
    elif location == "key":
        evil = {evil: torch.ones(6)}
    elif location == "field":
        evil = steering_vectors({1: evil})
    elif location == "attribute":
        evil = {"layer_activations": {1: torch.ones(6)}, "layer_type": evil}
    path = save(tmp_path / "evil.pt", evil)
    with pytest.raises(
        SteerError, match=r"evil\.pt: refused: its pickle refers to " r"posix\.system; nothing was"
    ):
        load_steer(path, layers=1)
    assert not marker.exists()


def test_numpy_arrays_in_a_pickle_are_refused_with_advice(tmp_path: Path) -> None:
    path = save(tmp_path / "v.pt", {1: np.ones(6)})
    with pytest.raises(SteerError, match=r"its pickle refers to .*numpy.*Save tensors only"):
        load_steer(path)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).as_strided((2**20, 2**20), (0, 0))
    for content in (huge, {3: huge}, {"layer_activations": {3: huge}}):
        with pytest.raises(
            SteerError,
            match=r"declares 1099511627776 values and its record has 1",
        ):
            load_steer(save(tmp_path / "huge.pt", content), layers="1-2")


def test_a_pickle_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content: dict[Any, Any] = {}
    content["self"] = content
    with pytest.raises(SteerError, match="its pickle is nested more than 32 deep"):
        load_steer(save(tmp_path / "loop.pt", content))


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "v.pt"
    return save(
        path, {"layer_activations": tensors([1, 2]), "layer_type": "self_attn"}
    ).read_bytes()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(position=st.integers(0, 100_000), value=st.binary(min_size=1, max_size=3))
def test_changed_bytes_give_a_steer_or_a_steer_error(
    tmp_path: Path, valid_file: bytes, position: int, value: bytes
) -> None:
    data = bytearray(valid_file)
    at = position % len(data)
    data[at : at + len(value)] = value
    path = tmp_path / "changed.pt"
    path.write_bytes(data)
    try:
        assert load_steer(path).kind == "vector"
    except SteerError as error:
        assert str(path) in str(error)
