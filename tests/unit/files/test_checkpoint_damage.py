"""Checkpoints whose archives are damaged, cut or changed."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from authors_checkpoints import projectors, rewrite_archive, save, training_arguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_steer import LMSteer, SteerError, load_steer


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).as_strided((1, 2**20, 2**20), (0, 0, 0))
    path = save(tmp_path / "huge.pt", None, {"projector1": huge, "projector2": huge})
    with pytest.raises(SteerError, match=r"1048576\] declares 1099511627776 values"):
        load_steer(path, epsilon=1.0)


def test_two_pickles_in_one_archive_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "whole.pt", training_arguments(), projectors())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02N.")
    with pytest.raises(
        SteerError,
        match=r"whole.pt: expected one pickle, .*; found whole/data.pkl, other/",
    ):
        load_steer(path)


def test_a_large_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "large.pt", "x" * 1_000_001, projectors())
    with pytest.raises(SteerError, match="its pickle has more than 1000000 bytes"):
        load_steer(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = rewrite_archive(
        save(tmp_path / "whole.pt", training_arguments(), projectors()),
        tmp_path / "small.pt",
        {},
        compression=zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(SteerError, match=r"small.pt: its records are compressed"):
        load_steer(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99], ids=["start", "half", "almost-all"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "cut.pt", training_arguments(), projectors())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SteerError, match=r"cut.pt: "):
        load_steer(path)


def test_a_checkpoint_with_a_missing_tensor_record_is_refused(tmp_path: Path) -> None:
    path = rewrite_archive(
        save(tmp_path / "whole.pt", training_arguments(), projectors()),
        tmp_path / "part.pt",
        {"data/0": None},
    )
    with pytest.raises(SteerError, match=r"part.pt: its record 'whole/data/0' is missing"):
        load_steer(path)


def test_a_checkpoint_with_a_shortened_tensor_record_is_refused(tmp_path: Path) -> None:
    path = rewrite_archive(
        save(tmp_path / "whole.pt", training_arguments(), projectors()),
        tmp_path / "part.pt",
        {"data/0": lambda data: data[:8]},
    )
    with pytest.raises(SteerError, match=r"part.pt: "):
        load_steer(path)


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_a_scripted_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"\x80\x02N.")
        archive.writestr("script/constants.pkl", b"\x80\x02).")
        archive.writestr("script/version", b"3\n")
    with pytest.raises(SteerError, match=r"script.pt: "):
        load_steer(path)


def damaged_directory(data: bytes) -> bytes:
    return data.replace(b"PK\x01\x02", b"PK\x09\x09", 1)


def damaged_record_header(data: bytes) -> bytes:
    return data.replace(b"PK\x03\x04", b"PK\x09\x09", 1)


def encrypted_flag(data: bytes) -> bytes:
    at = data.index(b"PK\x01\x02") + 8
    return data[:at] + b"\x01" + data[at + 1 :]


def damaged_pickle(data: bytes) -> bytes:
    at = data.index(b"argparse")
    return data[:at] + b"Argparse" + data[at + 8 :]


@pytest.mark.parametrize(
    "damage", [damaged_directory, damaged_record_header, encrypted_flag, damaged_pickle]
)
def test_a_damaged_archive_is_refused_with_the_file_named(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = save(tmp_path / "damaged.pt", training_arguments(), projectors())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SteerError, match=r"damaged.pt: "):
        load_steer(path)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "whole.pt"
    return save(path, training_arguments(), projectors()).read_bytes()


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 100_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_steer_or_a_steer_error(
    tmp_path: Path, valid_file: bytes, position: int, value: int
) -> None:
    data = bytearray(valid_file)
    data[position % len(data)] = value
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    try:
        assert isinstance(load_steer(path), LMSteer)
    except SteerError as error:
        assert str(path) in str(error)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(position=st.integers(0, 2_000), value=st.binary(min_size=1, max_size=3))
def test_a_changed_pickle_gives_a_steer_or_a_steer_error(
    tmp_path: Path, valid_file: bytes, position: int, value: bytes
) -> None:
    source, path = tmp_path / "source.pt", tmp_path / "changed.pt"
    source.write_bytes(valid_file)

    def change(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + value + data[at + len(value) :]

    rewrite_archive(source, path, {"data.pkl": change})
    try:
        assert isinstance(load_steer(path), LMSteer)
    except SteerError as error:
        assert str(path) in str(error)
