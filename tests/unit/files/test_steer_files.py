"""Steer files: saved steers are read back, and errors are named."""

import gzip
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_steer import LMSteer, SteerError, load_steer, save_steer

METADATA = {
    "format": "vllm-steer",
    "format_version": "1",
    "kind": "lm_steer",
    "hidden_size": "6",
    "variant": "add",
    "epsilon": "0.5",
    "fixed_columns": "",
}


def write(
    path: Path, metadata: dict[str, str | None], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """A steer file written with safetensors alone; a metadata value None drops the key."""
    merged = {k: v for k, v in {**METADATA, **metadata}.items() if v is not None}
    save_file(tensors or {"add": torch.ones(1, 6)}, str(path), metadata=merged)
    return path


def same(first: LMSteer, second: LMSteer) -> bool:
    plain = ("variant", "epsilon", "hidden_size", "fixed_columns", "default_strength")
    return all(
        getattr(first, name) == getattr(second, name)
        for name in (*plain, "base_model", "description")
    ) and all(
        torch.equal(tensor, second.tensors[name]) and tensor.dtype == second.tensors[name].dtype
        for name, tensor in first.tensors.items()
    )


@pytest.mark.parametrize("variant", ["multiply", "add", "offset"])
@pytest.mark.parametrize("fixed", [(), (1,), (0, 2)], ids=["none-fixed", "one-fixed", "two-fixed"])
def test_a_saved_steer_loads_back_unchanged(
    make_steer: Any, tmp_path: Path, variant: str, fixed: tuple[int, ...]
) -> None:
    steer = make_steer(
        variant,
        columns=3,
        fixed_columns=fixed,
        epsilon=0.1 + 0.2,
        default_strength=-2.5,
        base_model="a/b",
        description='naïve, "quoted"\nlines',
    )
    save_steer(steer, tmp_path / "steer")
    assert same(steer, load_steer(tmp_path / "steer"))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn],
    ids=str,
)
def test_any_floating_dtype_loads_back_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"projector1": torch.ones(1, 6, 2), "projector2": torch.full((1, 6, 2), -0.5)}
    path = write(
        tmp_path / "steer",
        {"variant": "multiply"},
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
    )
    steer = load_steer(path)
    for name, tensor in tensors.items():
        assert steer.tensors[name].dtype == dtype
        assert torch.equal(steer.tensors[name].float(), tensor)


def test_the_file_is_safetensors_with_the_documented_metadata(
    make_steer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "steer"
    save_steer(make_steer(columns=2, rank=3, fixed_columns=(1,), epsilon=0.001), path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header.pop("__metadata__") == {
        "format": "vllm-steer",
        "format_version": "1",
        "kind": "lm_steer",
        "hidden_size": "6",
        "base_model": "",
        "description": "",
        "variant": "multiply",
        "epsilon": "0.001",
        "fixed_columns": "1",
    }
    assert {name: entry["shape"] for name, entry in header.items()} == {
        "projector1": [2, 6, 3],
        "projector2": [2, 6, 3],
    }


def test_the_file_name_does_not_matter(make_steer: Any, tmp_path: Path) -> None:
    steer = make_steer()
    save_steer(steer, tmp_path / "steer.pt")
    assert same(steer, load_steer(tmp_path / "steer.pt"))


def test_projectors_that_share_their_memory_can_be_saved(make_steer: Any, tmp_path: Path) -> None:
    both = torch.randn(1, 6, 2)
    save_steer(make_steer(projector1=both, projector2=both), tmp_path / "steer")
    loaded = load_steer(tmp_path / "steer")
    assert torch.equal(loaded.tensors["projector1"], both)
    assert torch.equal(loaded.tensors["projector2"], both)


def test_projectors_that_are_strided_views_can_be_saved(make_steer: Any, tmp_path: Path) -> None:
    whole = torch.randn(2, 2, 6)
    first, second = whole.transpose(1, 2).split(1)
    save_steer(make_steer(projector1=first, projector2=second), tmp_path / "steer")
    loaded = load_steer(tmp_path / "steer")
    assert torch.equal(loaded.tensors["projector1"], first)
    assert torch.equal(loaded.tensors["projector2"], second)


def test_numbers_from_numpy_can_be_saved(make_steer: Any, tmp_path: Path) -> None:
    steer = make_steer(
        columns=2,
        epsilon=np.float64(0.125),
        default_strength=np.float32(2.5),
        fixed_columns=(np.int64(1),),
    )
    save_steer(steer, tmp_path / "steer")
    loaded = load_steer(tmp_path / "steer")
    assert (loaded.epsilon, loaded.default_strength, loaded.fixed_columns) == (0.125, 2.5, (1,))


def test_a_trained_parameter_can_be_saved(make_steer: Any, tmp_path: Path) -> None:
    vectors = torch.nn.Parameter(torch.randn(1, 6))
    save_steer(make_steer("add", add=vectors), tmp_path / "steer")
    assert torch.equal(load_steer(tmp_path / "steer").tensors["add"], vectors.detach())


def test_overrides_replace_the_metadata_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {"fixed_columns": "1"}, {"add": torch.ones(2, 6)})
    steer = load_steer(path, epsilon=3.0, fixed_columns=[], default_strength=4, description="mine")
    assert (steer.epsilon, steer.fixed_columns) == (3.0, ())
    assert (steer.default_strength, steer.description) == (4.0, "mine")


def test_columns_keep_their_order_and_their_fixed_marks(tmp_path: Path) -> None:
    vectors = torch.arange(24.0).view(4, 6)
    path = write(tmp_path / "steer", {"fixed_columns": "1,3"}, {"add": vectors})
    steer = load_steer(path, columns=[3, 0])
    assert torch.equal(steer.tensors["add"], vectors[[3, 0]])
    assert steer.fixed_columns == (0,)


@pytest.mark.parametrize("columns", [[4], [-1], [], [0, 0]], ids=["4", "-1", "empty", "twice"])
def test_columns_that_the_steer_does_not_have_are_refused(
    tmp_path: Path, columns: list[int]
) -> None:
    path = write(tmp_path / "steer", {}, {"add": torch.ones(4, 6)})
    with pytest.raises(SteerError, match=r"steer: columns .*columns 0 to 3; list each column"):
        load_steer(path, columns=columns)


def test_a_fixed_column_named_twice_counts_once_or_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {"fixed_columns": "1,1"}, {"add": torch.ones(2, 6)})
    try:
        steer = load_steer(path)
    except SteerError as error:
        assert "fixed_columns" in str(error)
    else:
        assert steer.fixed_columns == (1,)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "metadata format is 'pt'; expected 'vllm-steer'"),
        ({"format": None}, "metadata format is None; expected 'vllm-steer'"),
        ({"format_version": "2"}, "format_version is '2'; expected '1'"),
        ({"kind": None}, "the metadata has no kind"),
        ({"hidden_size": None}, "the metadata has no hidden_size"),
        ({"kind": "magic"}, "kind is 'magic'; expected lm_steer, vector, delta"),
        ({"kind": "vector"}, "unknown tensors add; a file of kind vector has vectors"),
        ({"hidden_size": "seven"}, "hidden_size is 'seven'"),
        ({"hidden_size": "7"}, "tensor width is 6 but hidden_size is 7"),
        ({"epsilon": None}, "epsilon is not in the file"),
        ({"epsilon": "nan"}, "epsilon is 'nan'"),
        ({"epsilon": "0"}, "epsilon is '0'"),
        ({"variant": "divide"}, "variant is 'divide'"),
        ({"variant": "multiply"}, "takes the tensors projector1, projector2; given: add"),
        ({"fixed_columns": "a"}, "fixed_columns.* is 'a'"),
        ({"fixed_columns": "5"}, r"fixed_columns \[5\]: this steer has columns 0 to 0"),
        ({"default_strength": "inf"}, "default_strength is 'inf'"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_wrong_metadata_is_refused_with_file_and_value(
    tmp_path: Path, metadata: dict[str, str | None], message: str
) -> None:
    path = write(tmp_path / "steer", metadata)
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path)
    assert str(path) in str(caught.value)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {}, {"add": torch.ones(1, 6), "bias": torch.ones(6)})
    with pytest.raises(SteerError, match="unknown tensors bias"):
        load_steer(path)


def test_a_nan_in_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {}, {"add": torch.full((1, 6), torch.nan)})
    with pytest.raises(SteerError, match="tensor add has 6 values that are NaN or infinite"):
        load_steer(path)


@pytest.mark.parametrize("twice", ['"layers": "0", "layers": "1"', '"a": 1, "a": 1'])
def test_a_duplicate_key_of_the_header_is_refused(tmp_path: Path, twice: str) -> None:
    whole = write(tmp_path / "steer", {}).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(
        b'{"__metadata__":{', b'{"__metadata__":{%s,' % twice.encode()
    )
    (tmp_path / "twice").write_bytes(
        len(header).to_bytes(8, "little") + header + whole[8 + length :]
    )
    with pytest.raises(SteerError, match=r"its header: the key '(layers|a)' is given twice"):
        load_steer(tmp_path / "twice")


def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {})
    with pytest.raises(SteerError, match="unknown key 'epsilom'"):
        load_steer(path, epsilom=1.0)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"gone: does not exist"):
        load_steer(tmp_path / "gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\x08", "neither a safetensors file nor"),
        (b"hello, this is no steer", "neither a safetensors file nor"),
        (b"\x80\x02]q\x00.", "a Python pickle, which executes code when loaded"),
        (b"\x80\x04\x95", "a Python pickle"),
        (
            b"PK\x05\x06" + bytes(18),
            "a zip archive with none; expected an archive of torch.save or numpy",
        ),
        (gzip.compress(b"x"), "a gzip file; unpack it first"),
        ('{"a": 1}'.encode("utf-16"), "a text file in UTF-16; save it as UTF-8"),
        (b"\xef\xbb\xbf{}", "a text file with a byte-order mark"),
        (b"\x93NUMPY\x01\x00", "a single NumPy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html>", "a web page or XML"),
        ((1 << 26).to_bytes(8, "little") + b"{", "its header has 67108864 bytes; a steer's has at"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_named_by_its_kind(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "steer.safetensors"
    path.write_bytes(data)
    with pytest.raises(SteerError, match=f"{path.name}: {message}"):
        load_steer(path)


@pytest.mark.parametrize("size", [9, 40, -1], ids=["header-cut", "header-half", "last-byte-cut"])
def test_a_truncated_file_is_refused(make_steer: Any, tmp_path: Path, size: int) -> None:
    path = tmp_path / "steer"
    save_steer(make_steer(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SteerError, match="steer: not a readable safetensors file"):
        load_steer(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_steer_or_a_steer_error(
    tmp_path: Path, position: int, value: int
) -> None:
    path = write(tmp_path / "whole", {})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    (tmp_path / "flipped").write_bytes(data)
    try:
        assert isinstance(load_steer(tmp_path / "flipped"), LMSteer)
    except SteerError as error:
        assert str(tmp_path / "flipped") in str(error)


@pytest.mark.parametrize("change", ["overwritten", "truncated", "removed"])
def test_a_loaded_steer_does_not_change_with_its_file(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "steer", {}, {"add": torch.ones(1, 6)})
    steer = load_steer(path)
    with path.open("r+b") as file:
        if change == "overwritten":
            file.seek(-4, 2)
            file.write(struct.pack("<f", math.nan))
        elif change == "truncated":
            file.truncate(8)
        else:
            path.unlink()
    assert torch.equal(steer.tensors["add"], torch.ones(1, 6))


@pytest.mark.parametrize("form", ["1 2", "1,,2", ",", "1;2", "1-2", "1_0", "01", "\u0661"])
@pytest.mark.parametrize("fact", ["columns", "fixed_columns"])
def test_an_ambiguous_list_of_columns_is_refused(tmp_path: Path, fact: str, form: str) -> None:
    path = write(tmp_path / "steer", {}, {"add": torch.ones(13, 6)})
    with pytest.raises(SteerError, match=f"{fact}.* is '"):
        load_steer(path, **{fact: form})


def test_spaces_around_columns_mean_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "steer", {"fixed_columns": " 1 , 3"}, {"add": torch.ones(4, 6)})
    assert load_steer(path).fixed_columns == (1, 3)
    assert load_steer(path, fixed_columns=" ").fixed_columns == ()


@pytest.mark.parametrize(
    "recipe",
    ['{"a": 1e999}', '{"a": [-1e999]}', '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}'],
)
def test_a_recipe_that_is_no_json_is_refused(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(SteerError, match="recipe"):
        load_steer(write(tmp_path / "steer", {"recipe": recipe}))


@pytest.mark.skipif(sys.platform == "darwin", reason="its files' names are UTF-8")
def test_a_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors"))
    path.write_bytes(write(tmp_path / "steer", {}).read_bytes())
    assert load_steer(path).hidden_size == 6


def test_exhausted_memory_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no class of its own for it."""
    path = write(tmp_path / "steer", {})

    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(2**55)

    monkeypatch.setattr("vllm_steer.files.read_metadata", allocate)
    with pytest.raises(SteerError, match=r"steer: cannot be read \(.*memory"):
        load_steer(path)
