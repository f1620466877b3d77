"""GGUF control vectors and activation-steering's JSON: which block's output a direction reaches.

Two runs through a stack of small blocks are compared: one as the tool's own code hooks it, one at
the outputs of the steer's layers.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from untrusted_text_tools import BLOCKS, directions, steered, streams, write_gguf, write_svec

from vllm_steer import SteerError, load_steer


def test_direction_l_of_a_gguf_file_is_added_to_the_output_of_block_l(tmp_path: Path) -> None:
    vectors = directions([3, 1, 2])
    steer = load_steer(write_gguf(tmp_path / "v.gguf", vectors))
    assert (steer.kind, steer.layers, steer.base_model) == ("vector", (1, 2, 3), "mistral")
    assert torch.equal(steered(steer), streams(out_of=vectors)[-1])


def test_direction_0_of_a_gguf_file_is_block_0(tmp_path: Path) -> None:
    assert load_steer(write_gguf(tmp_path / "v.gguf", directions([0, 1]))).layers == (0, 1)


def test_overrides_select_and_replace_in_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.bin", directions(range(1, 5)))
    steer = load_steer(path, layers="2-3", mode="rotate", base_model="mine")
    assert (steer.layers, steer.mode, steer.base_model) == ((2, 3), "rotate", "mine")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"x": np.ones(6, np.float32)}, "layer 'x': expected a 0-based layer such as '16'"),
        ({"01": np.ones(6, np.float32)}, "layer '01'"),
        ({"-1": np.ones(6, np.float32)}, "layer '-1'"),
        ({"99999": np.ones(6, np.float32)}, "layer '99999'"),
        ({1: np.ones((2, 3), np.float32)}, r"layer 1 is \[2, 3\] .*one dimension"),
        ({1: np.ones(6, np.int32)}, "direction.1 is I32; expected F32"),
        ({1: np.full(6, np.nan, np.float32)}, "6 values that are NaN or infinite"),
        ({1: np.ones(6, np.float32), 2: np.ones(5, np.float32)}, "layer 2 is .*they must be equal"),
        ({}, "the file has no vectors"),
    ],
    ids=["name", "leading-0", "negative", "large", "2d", "int", "nan", "ragged", "empty"],
)
def test_invalid_gguf_vectors_are_refused(
    tmp_path: Path, vectors: dict[Any, np.ndarray], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write_gguf(tmp_path / "v.gguf", vectors))


def test_a_gguf_model_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", directions([1]), architecture="llama")
    with pytest.raises(SteerError, match="of architecture 'llama'; expected 'controlvector'"):
        load_steer(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARRAY, UINT8 = 9, 0
ONE_KEY = struct.pack("<QQ", 0, 1) + text("a")
HUGE = {
    "array": (
        ONE_KEY + struct.pack("<IIQ", ARRAY, UINT8, 2**62),
        "1 values at byte 49, past",
    ),
    "text": (struct.pack("<QQQ", 0, 1, 2**62), "declares 4611686018427387904 values at byte 32"),
    "keys": (
        struct.pack("<QQ", 0, 2**62),
        "declares 1 values at byte 24, past the end of the file",
    ),
    "tensors": (
        struct.pack("<QQ", 2**62, 0),
        "declares 1 values at byte 24, past the end of the file",
    ),
    "dimensions": (
        struct.pack("<QQ", 1, 0) + text("direction.1") + struct.pack("<I", 2**31),
        "declares 2147483648 values at byte 47, past the end",
    ),
    "nested": (
        ONE_KEY + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000,
        "not a readable GGUF file",
    ),
    "many": (
        ONE_KEY + struct.pack("<IIQ", ARRAY, UINT8, 40_000) + bytes(40_000),
        "more entries than a control vector; is it a model",
    ),
}


def over_each_other(count: int, width: int) -> bytes:
    """A file of directions that all have the same offset."""
    tensors = [
        text(f"direction.{layer}") + struct.pack("<IQIQ", 1, width, 0, 0)
        for layer in range(1, count + 1)
    ]
    key = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 1) + key + b"".join(tensors)
    return head + bytes(-len(head) % 32) + struct.pack("<f", 1) * width


def placed(*offsets: int) -> bytes:
    """A file of directions of four values at these offsets."""
    tensors = [
        text(f"direction.{layer}") + struct.pack("<IQIQ", 1, 4, 0, offset)
        for layer, offset in enumerate(offsets, 1)
    ]
    key = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(offsets), 1) + key + b"".join(tensors)
    one, two = struct.pack("<4f", 1, 2, 3, 4), struct.pack("<4f", 5, 6, 7, 8)
    return head + bytes(-len(head) % 32) + one + bytes(16) + two + bytes(64)


@pytest.mark.parametrize(
    ("count", "width", "message"),
    [
        (2000, 8, "it has 2000 tensors; a steer has at most 1000"),
        (1000, 2**16, "needs 262144000 bytes of memory"),
    ],
)
def test_overlapping_directions_do_not_fill_the_memory(
    tmp_path: Path, count: int, width: int, message: str
) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(over_each_other(count, width))
    with pytest.raises(SteerError, match=message):
        load_steer(path)
    path.write_bytes(over_each_other(1, 8))
    assert torch.equal(load_steer(path).vectors, torch.ones(1, 8))


@pytest.mark.parametrize(
    "offsets", [(0, 0), (0, 32 + 4), (4, 64), (2**64 - 96, 32), (0, 2**40)], ids=str
)
@pytest.mark.filterwarnings("error")
def test_a_direction_lies_inside_the_data_of_a_gguf_file(
    tmp_path: Path, offsets: tuple[int, int]
) -> None:
    """Aligned, within the file, beside the others; one near 2^64 wraps around to the header."""
    path = tmp_path / "v.gguf"
    path.write_bytes(placed(*offsets))
    with pytest.raises(
        SteerError, match=r"has an invalid offset|not a readable GGUF|past the " r"end of the file"
    ):
        load_steer(path)
    path.write_bytes(placed(0, 32))
    assert load_steer(path).vectors.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("claim", HUGE)
@pytest.mark.timeout(20)
def test_a_gguf_file_with_huge_declared_sizes_is_refused_quickly(
    tmp_path: Path, claim: str
) -> None:
    header, message = HUGE[claim]
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + header)
    with pytest.raises(SteerError, match=message):
        load_steer(path)


def test_direction_l_of_an_svec_file_acts_on_the_input_of_block_l(tmp_path: Path) -> None:
    vectors = directions([2, 4])
    steer = load_steer(write_svec(tmp_path / "v.svec", vectors))
    assert (steer.layers, steer.base_model) == ((1, 3), "llama")
    assert torch.equal(steered(steer), streams(into=vectors)[-1])


def test_an_svec_file_with_direction_0_needs_the_key_layers(tmp_path: Path) -> None:
    vectors = directions(range(BLOCKS))
    path = write_svec(tmp_path / "v.svec", vectors)
    with pytest.raises(SteerError, match=r"direction 0 acts on .* give layers: 0-3; to steer"):
        load_steer(path)
    del vectors[0]
    steer = load_steer(path, layers="0-3")
    assert torch.equal(steered(steer), streams(into=vectors)[-1])
    chosen = load_steer(path, layers="1-2")  # behavior_layer_ids 2 and 3
    expected = streams(into={2: vectors[2], 3: vectors[3]})
    assert torch.equal(steered(chosen), expected[-1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"model_type": "llama"}', "directions is None; expected a JSON object"),
        ('{"model_type": 1, "directions": {}}', "model_type is 1.0; expected"),
        (
            '{"model_type": "l", "directions": []}',
            "directions is \\[\\]; expected",
        ),
        ('{"model_type": "l", "directions": {}}', "the file has no vectors"),
        ('{"model_type": "l", "directions": {"0": [1]}}', "the file has no vectors"),
        ('{"model_type": "l", "directions": {"a": [1]}}', "layer 'a': expected a 0-based layer"),
        ('{"model_type": "l", "directions": {"-1": [1]}}', "layer '-1'"),
        ('{"model_type": "l", "directions": {"1.5": [1]}}', "layer '1.5'"),
        ('{"model_type": "l", "directions": {"\u0661": [1]}}', "layer '\u0661'"),
        (
            '{"model_type": "l", "directions": {"1": [1, "2"]}}',
            "direction '1' is .*; expected",
        ),
        (
            '{"model_type": "l", "directions": {"1": [[1]]}}',
            "direction '1' is .*; expected",
        ),
        ('{"model_type": "l", "directions": {"1": []}}', r"layer 1 is \[0\]"),
        ('{"model_type": "l", "directions": {"1": [1], "2": [1, 2]}}', "they must be equal"),
        ('{"model_type": "l", "directions": {"1": [NaN]}}', "1 values that are NaN or infinite"),
        ('{"model_type": "l", "directions": {"1": [1e300]}}', "1 values that are NaN or infinite"),
        ('{"model_type": "l", "directions": {"1": [1' + "0" * 5000 + "]}}", r"v\.svec: "),
        ('{"model_type": "l", "directions": {"1": [1' + "0" * 400 + "]}}", r"v\.svec: "),
        ("{", "not readable as JSON"),
        ('{"a": ' + "[" * 90_000, "not readable as JSON"),
        ('{"steers": {}}', "model_type is None"),
    ],
    ids=lambda value: value[:60] if value.startswith("{") else "",
)
def test_json_that_is_no_svec_file_is_refused(tmp_path: Path, data: str, message: str) -> None:
    path = tmp_path / "v.svec"
    path.write_text(data)
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("small", ["[]", '{"":0}'])
def test_an_svec_file_of_very_many_small_values_is_refused(tmp_path: Path, small: str) -> None:
    path = tmp_path / "v.svec"
    values = ", ".join([small] * 100_001)
    path.write_text(f'{{"model_type": "x", "directions": {{"1": [1.0]}}, "z": [{values}]}}')
    with pytest.raises(SteerError, match="JSON file has more than 100000 lists, objects and keys"):
        load_steer(path)


def test_an_svec_file_is_utf_8(tmp_path: Path) -> None:
    text = '{"model_type": "x", "directions": {"1": [1.0]}}'
    (tmp_path / "v.svec").write_bytes(text.encode("utf-16-le"))
    with pytest.raises(SteerError):
        load_steer(tmp_path / "v.svec")


def test_a_duplicate_svec_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.svec"
    for twice in (
        '"directions": {"1": [1], "1": [2]}',
        '"directions": {}, "directions": {"1": [1]}',
    ):
        path.write_text('{"model_type": "llama", ' + twice + "}")
        with pytest.raises(SteerError, match=r"the key '(1|directions)' is given twice"):
            load_steer(path)


def test_an_svec_file_may_hold_nan_in_unused_fields(tmp_path: Path) -> None:
    path = tmp_path / "v.svec"
    more = '"explained_variances": {"1": NaN, "2": -Infinity}, "directions_shape": [1, 2]'
    path.write_text('{"model_type": "llama", "directions": {"1": [1, 2.5]}, ' + more + "}")
    assert load_steer(path).vectors.tolist() == [[1, 2.5]]
