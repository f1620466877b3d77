"""``torch.save`` files read as data: the same values as from PyTorch's own reader."""

import argparse
import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickles import (
    FLOATS,
    Raw,
    archive,
    call,
    code,
    namespace,
    pickled,
    saved,
    storage,
    tensor,
)

from vllm_steer import SteerError, load_steer
from vllm_steer.files import torch_file
from vllm_steer.files.archive import open_archive

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
)
CLASSES = {"argparse.Namespace": argparse.Namespace}


def read(path: Path) -> Any:
    with open_archive(path) as archive:
        return torch_file.load(torch_file.read_names(archive), CLASSES)


def read_with_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.detach())
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(other, argparse.Namespace):
        return type(one) is argparse.Namespace and same(vars(one), vars(other))
    return type(one) is type(other) and one == other


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    return {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "row": base[1, 2],
        "strided": base[:, ::2, 1::2],
        "scalar": base[1, 1, 1],
        "none": base[:0],
        "nowhere": torch.empty(0, 5, dtype=dtype),
        "alone": base[0].clone(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_stride_are_views_of_their_records(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "t.pt"
    torch.save(tensors(dtype), path)
    result = read(path)
    assert same(result, read_with_torch(path))
    for name in ("transposed", "row", "strided"):  # as they were saved: one storage for all
        assert (
            result[name].untyped_storage().data_ptr()
            == result["whole"].untyped_storage().data_ptr()
        )


def test_a_modules_state_and_its_parameters_are_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    path = tmp_path / "m.pt"
    torch.save([module.state_dict(), dict(module.named_parameters())], path)
    result, expected = read(path), read_with_torch(path)
    assert same(result[0], dict(expected[0]))
    assert same(result[1], expected[1])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(-9, 300), inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(st.sampled_from("abc"), inner).map(lambda d: argparse.Namespace(**d))
    ),
    max_leaves=15,
)


@given(value=VALUES)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_plain_values_are_those_of_pytorchs_reader(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "v.pt"
    torch.save(value, path)
    result, expected = read(path), read_with_torch(path)
    assert same(result, expected) or same(result, _plain(expected))


def _plain(value: Any) -> Any:
    """The same with dicts for OrderedDicts."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain(vars(value)))
    return value


def test_more_values_than_a_byte_can_number_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    words = [f"word {i}" for i in range(400)]
    torch.save([words, words[::-1], {word: [word] for word in words}], path)
    assert same(read(path), read_with_torch(path))


def test_a_tensor_under_many_layers_is_bounded_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    one = torch.ones(4096)
    torch.save({layer: one for layer in range(80)}, path)
    assert load_steer(path).layers == tuple(range(80))
    torch.save({layer: torch.ones(2**20) if not layer else one for layer in range(2)}, path)
    with pytest.raises(SteerError, match="they must be equal"):
        load_steer(path)
    large = torch.ones(2**20)
    torch.save({layer: large for layer in range(80)}, path)
    with pytest.raises(SteerError, match=r"its content needs 335544320 bytes of memory"):
        load_steer(path)


def hand_made(path: Path, *, storage_size: int, declared_size: int, offset: int, size: int) -> Path:
    """A tensor of a storage of ``declared_size`` floats, whose record has ``storage_size``."""
    path.write_bytes(
        saved(
            tensor((size,), (1,), offset, of=storage("0", declared_size)),
            records={"0": torch.arange(float(storage_size)).numpy().tobytes()},
        )
    )
    return path


def test_a_tensor_lies_within_its_storage_and_a_storage_within_its_record(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    assert read(hand_made(path, storage_size=4, declared_size=4, offset=1, size=3)).tolist() == [
        1,
        2,
        3,
    ]
    with pytest.raises(SteerError, match=r"declares 3 values and its record has"):
        read(hand_made(path, storage_size=4, declared_size=4, offset=2, size=3))
    for payload in (3, 5):  # PyTorch reads neither
        with pytest.raises(
            SteerError, match=rf"declares {payload} values in torch.float32; .* 16 byte"
        ):
            read(hand_made(path, storage_size=4, declared_size=payload, offset=0, size=3))


def test_a_negative_view_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    imaginary = torch.tensor([1 + 2j, 3 - 4j, 5 + 6j]).conj().imag
    assert imaginary.is_neg()
    torch.save({1: imaginary, 2: torch._neg_view(torch.arange(3.0))}, tmp_path / "f")
    assert same(read(tmp_path / "f"), read_with_torch(tmp_path / "f"))
    assert load_steer(tmp_path / "f").vectors.tolist() == [[-2, 4, -6], [0, -1, -2]]


@pytest.mark.parametrize(
    "metadata",
    [{"neg": False}, {"neg": 1}, {"neg": True, "conj": False}, {"x": 1}, 5, "neg"],
    ids=str,
)
def test_other_metadata_is_refused(tmp_path: Path, metadata: Any) -> None:
    """PyTorch acts on any such key, or fails."""
    arguments = (storage(), 0, (4,), (1,), False, call("collections.OrderedDict"), metadata)
    (tmp_path / "f").write_bytes(saved({1: call("torch._utils._rebuild_tensor_v2", *arguments)}))
    with pytest.raises(SteerError, match=r"its pickle has a tensor with .*; save a clone of it"):
        load_steer(tmp_path / "f")


def test_one_storage_has_one_type_and_one_size(tmp_path: Path) -> None:
    """PyTorch reads all tensors by the first one's."""
    for other in (storage("0", 8, "torch.HalfStorage"), storage("0", 3)):
        (tmp_path / "f").write_bytes(saved({1: tensor(), 2: tensor((2,), (1,), of=other)}))
        with pytest.raises(SteerError, match="its record '0' is declared as two kinds of storage"):
            load_steer(tmp_path / "f")


@pytest.mark.parametrize("name", ["archive/byteorder", "archive/BYTEORDER", "Archive/byteorder"])
def test_numbers_of_the_other_byte_order_are_refused(tmp_path: Path, name: str) -> None:
    """PyTorch looks names up without regard to case."""
    (tmp_path / "f").write_bytes(saved(tensor(), extra_records=[(name, b"big")]))
    with pytest.raises(SteerError, match="its tensors are not little-endian"):
        load_steer(tmp_path / "f", layers=1)


@pytest.mark.parametrize("keys", [(0, 0), (1, True), ("a", "a"), (1, 1.0)], ids=str)
def test_a_dict_with_a_duplicate_key_is_refused(tmp_path: Path, keys: tuple[Any, Any]) -> None:
    pairs = b"".join(code(key) + tensor() for key in keys)
    (tmp_path / "f").write_bytes(saved(Raw(b"}(" + pairs + b"u")))
    with pytest.raises(SteerError, match=r"a dict has the duplicate key"):
        load_steer(tmp_path / "f")


def test_a_state_that_is_set_twice_is_refused(tmp_path: Path) -> None:
    payload = Raw(namespace(epsilon=0.1) + code({"epsilon": 0.5}) + b"b")
    (tmp_path / "f").write_bytes(saved([payload, {"add_vec": tensor((1, 4), (4, 1))}, 1]))
    with pytest.raises(SteerError, match=r"sets the state of .* twice"):
        load_steer(tmp_path / "f")


def test_an_archive_with_another_first_record_is_refused(tmp_path: Path) -> None:
    """PyTorch looks for all others beside it."""
    extra_records = [
        ("zzz/x", b""),
        ("archive/data.pkl", pickled(tensor())),
        ("archive/data/0", FLOATS),
    ]
    (tmp_path / "f").write_bytes(archive(None, records={}, extra_records=extra_records))
    with pytest.raises(SteerError, match="its first record is not in archive/"):
        load_steer(tmp_path / "f", layers=1)


@pytest.mark.parametrize("hooks", [[1], {"a": 1}, "x", 5, (1,)], ids=str)
def test_a_tensor_with_hooks_is_refused(tmp_path: Path, hooks: Any) -> None:
    parameter = call("torch._utils._rebuild_parameter", tensor(), False, hooks)
    for value in (tensor(hooks=hooks), parameter):
        (tmp_path / "f").write_bytes(saved({1: value}))
        with pytest.raises(SteerError, match="a tensor with hooks"):
            load_steer(tmp_path / "f")
