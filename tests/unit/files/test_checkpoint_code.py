"""Checkpoints that name code: refused, and not run."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_checkpoints import projectors, rewrite_archive, save, training_arguments

from vllm_steer import SteerError, load_steer


class Innocent:
    """A class of this module: nothing a checkpoint has a use for."""


class Calls:
    """Pickles to a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def shell(marker: Path) -> Any:
    return Calls(os.system, f"touch {marker}")


def python(marker: Path) -> Any:
    return Calls(eval, f"open({str(marker)!r}, 'w').close()")


def attribute(marker: Path) -> Any:
    return Calls(getattr, Calls(__import__, "pathlib"), "Path")


def class_of_ours(marker: Path) -> Any:
    return Innocent()


def tensor_from_code(marker: Path) -> Any:
    return Calls(torch.load, str(marker))


@pytest.mark.parametrize(
    ("payload", "callable_name"),
    [
        (shell, "posix.system"),
        (python, "__builtin__.eval"),
        (attribute, "__builtin__.getattr"),
        (class_of_ours, "Innocent"),
        (tensor_from_code, "torch.serialization.load"),
    ],
    ids=["os.system", "eval", "getattr", "class", "torch.load"],
)
@pytest.mark.parametrize("location", ["argument", "state", "step"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_names_code_is_refused_and_not_run(
    tmp_path: Path, payload: Callable[[Path], Any], callable_name: str, location: str
) -> None:
    marker = tmp_path / "executed"
    evil = payload(marker)
    saved: list[Any] = [training_arguments(), dict(projectors()), 1000]
    if location == "argument":
        saved[0].model_name = evil
    elif location == "state":
        saved[1]["projector1"] = evil
    else:
        saved[2] = evil
    path = tmp_path / "evil.pt"
    torch.save(saved, path)
    with pytest.raises(
        SteerError, match=r"evil.pt: refused: its pickle refers to .*nothing was " r"loaded"
    ) as caught:
        load_steer(path)
    assert callable_name in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_a_later_protocol_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    torch.save([None, {"projector1": shell(marker)}, 1], path, pickle_protocol=protocol)
    with pytest.raises(
        SteerError, match=rf"its pickle has protocol {protocol}; expected 2; save " r"it again"
    ):
        load_steer(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"(S'touch {marker}'\niposix\nsystem\n.",
        b"cposix\nsystem\n(S'touch {marker}'\ntR.",
        b"\x80\x02\x82\x01.",
        b"cos.path\nos.system\n(S'touch {marker}'\ntR.",
    ],
    ids=["INST", "GLOBAL-REDUCE", "EXT1", "dotted"],
)
def test_a_hand_written_pickle_is_refused_and_not_run(tmp_path: Path, pickled: bytes) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickled.replace(b"{marker}", str(marker).encode()))
        archive.writestr("evil/version", b"3\n")
    with pytest.raises(SteerError, match=r"evil.pt: (its pickle uses|refused: its pickle refers)"):
        load_steer(path)
    assert not marker.exists()


def test_a_second_pickle_after_the_first_is_refused_or_ignored(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    evil = pickle.dumps(shell(marker), protocol=2)
    path = rewrite_archive(
        save(tmp_path / "whole.pt", training_arguments(), projectors()),
        tmp_path / "evil.pt",
        {"data.pkl": lambda data: data + evil},
    )
    try:
        load_steer(path)
    except SteerError as error:
        assert str(path) in str(error)
    assert not marker.exists()


def test_an_old_style_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "old.pt"
    torch.save([None, shell(marker), 1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        SteerError, match=r"old.pt: a torch.save file of PyTorch before 1.6, a " r"pickle"
    ):
        load_steer(path)
    assert not marker.exists()
