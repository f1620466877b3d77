"""Files of other formats than ``torch.save``: NumPy, GGUF, .svec, safetensors."""

import io
import json
import random
import struct
import zipfile
from typing import Any

from kinds import Kinds
from pickles import FLOATS, archive

KINDS = Kinds()


@KINDS.slow
def bombs(rng: random.Random) -> bytes:
    """NumPy archives that unpack to far more than their size."""
    zeros = rng.choice([1 << 26, 1 << 28])
    order, rows = rng.random() < 0.5, zeros // 4 // 64
    text = f"{{'descr': '<f4', 'fortran_order': {order}, 'shape': ({rows}, 64), }}"
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("W_dec.npy"), header + bytes(zeros), zipfile.ZIP_DEFLATED)
    return file.getvalue()


@KINDS.add
def npz_headers(rng: random.Random) -> bytes:
    descr = rng.choice(
        [
            "'<f4'",
            "'|O'",
            "'<f16'",
            "'>c16'",
            "[('a', '<f4')]",
            "'|V999999999'",
            "'<M8[ns]'",
            "__import__('os')",
        ]
    )
    shape = rng.choice(
        [
            "(4, 4)",
            "(-4, 4)",
            "(4,)",
            "()",
            "(2**40, 4)",
            "(4, -1)",
            "(9999999999999, 9)",
            "(4, 4.0)",
            "[4, 4]",
            "(True, 4)",
            "((4,), 4)",
            "(" * 300,
        ]
    )
    order = rng.choice(["False", "True", "1", "None"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
    return archive(None, extra_records=[("W_dec.npy", header + FLOATS * 4)])


def gguf_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


@KINDS.slow
def overlapping_gguf(rng: random.Random) -> bytes:
    """Control vectors whose directions all lie over one another."""
    count, width = rng.choice([(1000, 1 << 19), (3000, 1 << 17), (50_000, 1 << 8)])
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 1)
    head += gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("controlvector")
    for layer in range(1, count + 1):
        head += gguf_text(f"direction.{layer}") + struct.pack("<IQIQ", 1, width, 0, 0)
    return head + bytes(-len(head) % 32) + struct.pack("<f", 1) * width


@KINDS.slow
def svec_of_small_values(rng: random.Random) -> bytes:
    """As many values as a .svec may have bytes for, each far larger in memory."""
    value = rng.choice(['{"":0}', '{"":{}}', "[]", "{}", '{"":[]}', "[{}]", "0", '"\U0001f600"'])
    count = (16 * 2**20 - 200) // (len(value.encode()) + 1)
    text = '{"model_type": "x", "directions": {"1": [1.0]}, "z": [' + ",".join([value] * count)
    return (text + "]}").encode()


def safetensors(tensors: dict[str, Any], metadata: dict[str, str], data: bytes) -> bytes:
    head = json.dumps({"__metadata__": metadata, **tensors}).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


@KINDS.slow
def one_byte_values(rng: random.Random) -> bytes:
    """Our own format with one-byte values, each of which takes eight bytes in float64."""
    rows, width = 32, 1 << 20
    kind, name = rng.choice([("vector", "vectors"), ("delta", "delta")])
    shape = [rows, width] if kind == "vector" else [1, rows, width]
    metadata = {
        **{"format": "vllm-steer", "format_version": "1", "kind": kind, "site": "resid"},
        **{"hidden_size": str(width), "layers": f"0-{rows - 1}"},
    }
    tensor_header = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, rows * width]}
    return safetensors(
        {name: tensor_header}, metadata, rng.choice([b"\x38", b"\0"]) * (rows * width)
    )


@KINDS.add
def signs_of_other_types(rng: random.Random) -> bytes:
    """Concept files whose ``a``, of which the signs are taken, is not of floats."""
    dtype, size = rng.choice(
        [("BOOL", 1), ("C64", 8), ("U16", 2), ("U64", 8), ("F8_E4M3", 1), ("F8_E8M0", 1), ("I8", 1)]
    )
    values = FLOATS + rng.choice([b"\x3c", b"\0", b"\x80", b"\xff"]) * (2 * size)
    headers = {
        "W": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "a": {"dtype": dtype, "shape": [2, 1], "data_offsets": [16, len(values)]},
    }
    return safetensors(headers, {}, values)
