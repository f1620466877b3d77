"""SAE decoders: one feature's row, at the hook that the autoencoder reads."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from untrusted_text_tools import DECODER, WIDTH, steered, streams, write_npz, write_saelens

from vllm_steer import SteerError, load_steer


def write_npz_compressed(path: Path) -> Path:
    return write_npz(path, save=np.savez_compressed)


def write_npz_by_columns(path: Path) -> Path:
    return write_npz(path, np.asfortranarray(DECODER))


def write_npz_big_endian(path: Path) -> Path:
    return write_npz(path, DECODER.astype(">f4"))


SAES = [write_saelens, write_npz, write_npz_compressed, write_npz_by_columns, write_npz_big_endian]


@pytest.mark.parametrize("write", SAES)
@pytest.mark.parametrize("feature", [0, 3, 7])
def test_a_feature_is_a_row_of_the_decoder(
    tmp_path: Path, write: Callable[[Path], Path], feature: int
) -> None:
    path = write(tmp_path / "weights")
    steer = load_steer(path, feature=feature, layers="1,4", site="attn_out")
    assert (steer.layers, steer.site, steer.mode) == ((1, 4), "attn_out", "add")
    for vector in steer.vectors:
        assert torch.equal(vector, torch.from_numpy(DECODER[feature]))


@pytest.mark.parametrize(
    ("hook", "layer_index", "into"),
    [("blocks.2.hook_resid_post", 2, False), ("blocks.2.hook_resid_pre", 1, True)],
    ids=["post", "pre"],
)
def test_a_residual_hook_acts_at_the_position_of_transformer_lens(
    tmp_path: Path, hook: str, layer_index: int, into: bool
) -> None:
    steer = load_steer(write_saelens(tmp_path / "sae"), feature=5, hook=hook)
    assert steer.layers == (layer_index,)
    hooked = {2: DECODER[5]}
    expected = streams(into=hooked)[-1] if into else streams(out_of=hooked)[-1]
    assert torch.equal(steered(steer), expected)


def test_an_attention_hook_is_the_attention_output(tmp_path: Path) -> None:
    steer = load_steer(write_npz(tmp_path / "sae"), feature=0, hook="blocks.8.hook_attn_out")
    assert (steer.site, steer.layers) == ("attn_out", (8,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "the SAE has 8 features; give the key feature, a number from 0 to 7"),
        ({"feature": 8}, "feature 8: the SAE has 8 features"),
        (
            {"feature": 1},
            "do not contain the hook point; give the key hook, such as hook: blocks.8",
        ),
        ({"feature": 1, "layers": "8"}, "do not contain the hook point"),
        ({"feature": 1, "site": "resid"}, "do not contain the hook point"),
        (
            {"feature": 1, "hook": "blocks.0.hook_resid_pre"},
            "the input of block 0 cannot be steered",
        ),
        ({"feature": 1, "hook": "blocks.1.hook_mlp_out"}, "hook_mlp_out'; allowed: blocks.N.hook"),
        ({"feature": 1, "hook": "blocks.1.attn.hook_z"}, "hook_z'; allowed"),
        ({"feature": 1, "hook": "hook_embed"}, "hook_embed'; allowed"),
        (
            {"feature": 1, "hook": "blocks.1.hook_resid_post", "layers": "1"},
            "remove layers and site",
        ),
        ({"feature": 1, "rows": "1"}, "rows does not apply to the weights of an SAE"),
        (
            {"feature": 1, "kind": "delta"},
            "is vector or sae or condition and the key kind is delta",
        ),
        ({"feature": 1, "architecture": "gated"}, "architecture says how the encoder .* kind: sae"),
        ({"feature": 1, "layers": "1", "site": "heads"}, "site is 'heads'; allowed: resid"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("write", SAES[:2])
def test_missing_metadata_of_an_sae_is_requested(
    tmp_path: Path, write: Callable[[Path], Path], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write(tmp_path / "weights"), **overrides)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (torch.zeros(WIDTH, 8), r"W_dec is \[6, 8\] and b_dec \[6\].*transpose the decoder"),
        (torch.zeros(8), r"W_dec is \[8\]; expected \[features, hidden\]"),
        (torch.full((8, WIDTH), torch.nan), "6 values that are NaN"),
        (torch.ones(8, WIDTH).int(), "torch.int32; expected a floating dtype"),
    ],
    ids=["transposed", "one-dimension", "nan", "int"],
)
def test_invalid_saelens_weights_are_refused(
    tmp_path: Path, decoder: torch.Tensor, message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write_saelens(tmp_path / "sae", decoder), feature=1, layers="1", site="resid")


def write_npy(path: Path, header: bytes, data: bytes = b"") -> Path:
    """An archive with one array of any header."""

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_dec.npy", header + data)
    return path


def npy_header(shape: str, kind: str = "<f4", version: int = 1) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (npy_header("(8, 1000000000000)"), "W_dec declares more values than the file has"),
        (npy_header("(8, 6)"), "W_dec declares more values than the file has"),
        (npy_header("(-8, 6)"), r"W_dec is \[-8, 6\]"),
        (npy_header("(8, 6)", version=9), r"arrays of version \(9, 0\) are not read"),
        (npy_header("__import__('os').getpid()"), "W_dec cannot be read"),
        (b"\x93NUMPY\x01\x00\xff\xff", "W_dec cannot be read"),
        (b"", "W_dec cannot be read"),
        (npy_header("(8, 6)", "|O"), "W_dec"),
        (npy_header("(8, 6), u'descr': '<f8'"), "an array's header has a duplicate key"),
        (npy_header("(16, 5)") + bytes(256), "W_dec declares more values than the file has"),
        (npy_header("(8, 6), 'descr': '<f8'"), "an array's header has a duplicate key"),
        (npy_header("(8, 6), " + " " * 10_000), "header has more than 10000 bytes"),
        (npy_header("(8, 6)", "|V2"), "W_dec"),
    ],
    ids=[
        *("huge", "short", "negative", "version", "code", "cut", "empty", "object"),
        *("u-twice", "with-header", "twice", "long", "void"),
    ],
)
def test_invalid_npz_headers_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write_npy(tmp_path / "sae.npz", header)
    with pytest.raises(SteerError, match=message):
        load_steer(path, feature=1, layers="1", site="resid")


class TouchesAFile:
    """Pickles to a call that leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_damaged_row_of_an_npz_file_is_refused(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)
    np.savez(tmp_path / "sae.npz", W_dec=whole)
    data = bytearray((tmp_path / "sae.npz").read_bytes())
    at = data.index(whole[1].tobytes())
    data[at : at + 4] = struct.pack("<f", 999)
    (tmp_path / "sae.npz").write_bytes(data)
    with pytest.raises(SteerError, match="CRC"):
        load_steer(tmp_path / "sae.npz", feature=1, layers="1", site="resid")


def test_two_records_for_one_array_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sae.npz", "w") as archive:
        for name in ("W_dec.npy", "W_dec"):
            archive.writestr(name, npy_header("(2, 3)") + bytes(24))
    with pytest.raises(
        SteerError, match=r"it has both W_dec and W_dec\.npy, which readers confuse"
    ):
        load_steer(tmp_path / "sae.npz", feature=1, layers="1", site="resid")


def test_a_file_of_two_decoders_is_refused(tmp_path: Path) -> None:
    two = {"W_dec": torch.ones(2, 3), "w_dec": torch.ones(2, 3)}
    save_file(two, tmp_path / "two")
    with pytest.raises(SteerError, match="it has both W_dec and w_dec; expected one decoder"):
        load_steer(tmp_path / "two", feature=0, hook="blocks.1.hook_resid_post")


def test_an_npz_file_of_pickled_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    objects = np.full((8, WIDTH), TouchesAFile(marker), dtype=object)
    path = write_npz(tmp_path / "sae.npz", objects)
    with pytest.raises(SteerError, match="W_dec"):
        load_steer(path, feature=1, layers="1", site="resid")
    assert not marker.exists()


def test_an_npz_file_without_a_decoder_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.savez(file, mean=np.zeros(3), std=np.ones(3))
    with pytest.raises(SteerError, match="a NumPy archive with mean, std; expected SAE weights"):
        load_steer(tmp_path / "x.npz")
