"""The LM-Steer authors' checkpoints: read as they wrote them, refused if they carry anything else.

Every file here is written by ``torch.save`` or by hand, in the layouts of the authors' trainer
(``[args, state, step]``) and transfer script (``[None, state, step]``).
"""

import argparse
import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vllm_steer import LMSteer, SteerError, load_steer

COLUMNS, HIDDEN, RANK = 2, 6, 3


def training_arguments(**changed: Any) -> argparse.Namespace:
    said: dict[str, Any] = {
        "dataset_name": "toxicity",
        "data_dir": None,
        "ckpt_name": "logs/checkpoint.pt",
        "model_name": "gpt2",
        "cuda": True,
        "adaptor_class": "multiply",
        "adapted_component": "final_layer",
        "epsilon": 1e-3,
        "init_var": 1e-2,
        "rank": RANK,
        "num_steers": COLUMNS,
        "dummy_steer": 1,
        "training_steer": 0,
        "lr": 0.01,
        "n_steps": 1000,
    }
    return argparse.Namespace(**{**said, **changed})


def projectors() -> dict[str, Any]:
    torch.manual_seed(5)
    return {
        "projector1": nn.Parameter(torch.randn(COLUMNS, HIDDEN, RANK)),
        "projector2": nn.Parameter(torch.randn(COLUMNS, HIDDEN, RANK)),
    }


def save(path: Path, args: Any, state: Any, **options: Any) -> Path:
    torch.save([args, state, 1000], path, **options)
    return path


def test_a_trained_checkpoint_brings_its_facts(tmp_path: Path) -> None:
    state = projectors()
    steer = load_steer(save(tmp_path / "cheer.pt", training_arguments(), state))
    assert (steer.variant, steer.epsilon, steer.base_model) == ("multiply", 1e-3, "gpt2")
    assert (steer.hidden_size, steer.columns, steer.rank) == (HIDDEN, COLUMNS, RANK)
    assert steer.fixed_columns == (1,)
    for name, tensor in state.items():
        assert torch.equal(steer.tensors[name], tensor.detach())
        assert not steer.tensors[name].requires_grad


def test_a_checkpoint_without_a_dummy_column_fixes_none(tmp_path: Path) -> None:
    one = {name: tensor[:1] for name, tensor in projectors().items()}
    path = save(tmp_path / "cheer.pt", training_arguments(dummy_steer=None), one)
    assert load_steer(path).fixed_columns == ()


TEN = {"projector1": torch.ones(10, HIDDEN, RANK), "projector2": torch.ones(10, HIDDEN, RANK)}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "it has 10 columns, of which training_steer 0 and dummy_steer 1 were .*: [0, 1]"),
        ({"dummy_steer": None}, "training_steer 0 and dummy_steer None were .* columns: [0]"),
        ({"training_steer": 2}, "training_steer 2 and dummy_steer 1 were .* columns: [1, 2]"),
        ({"training_steer": 3.0}, "training_steer 3.0 and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": "3"}, "training_steer '3' and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": True}, "training_steer True and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": -1}, "training_steer -1 and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": 12, "dummy_steer": None}, "12 and .* were trained; give .* keep$"),
        (None, "10 columns, and does not say which of them were trained; .* columns: [0]"),
    ],
    ids=[
        *("with-dummy", "without", "another", "float", "text", "bool", "negative", "beyond"),
        "transferred",
    ],
)
def test_columns_that_were_not_trained_are_asked_about(
    tmp_path: Path, said: dict[str, Any] | None, message: str
) -> None:
    args = None if said is None else training_arguments(num_steers=10, **said)
    path = save(tmp_path / "ten.pt", args, TEN)
    with pytest.raises(SteerError, match=message.replace("[", r"\[")):
        load_steer(path, epsilon=0.001)
    steer = load_steer(path, epsilon=0.001, columns=[0, 1], fixed_columns=[1])
    assert (steer.columns, steer.free_columns) == (2, (0,))


@pytest.mark.parametrize(
    ("model", "state", "method"),
    [
        ("lora-gpt2-large", {"x": torch.ones(2)}, "LoRA"),
        ("embedding_tuning-gpt2", {"x": torch.ones(2)}, "embedding tuning"),
        ("gpt2", {"transformer.wte.weight": torch.ones(2, 2)}, "embedding tuning"),
        ("gpt2", {"h.0.lora_A": torch.ones(2, 2)}, "LoRA"),
        ("gpt2", {"prefix.control_trans.0.weight": torch.ones(2, 2)}, "prefix tuning"),
    ],
)
def test_checkpoints_of_the_authors_baselines_are_refused_by_name(
    tmp_path: Path, model: str, state: Any, method: str
) -> None:
    path = save(tmp_path / "base.pt", training_arguments(model_name=model), state)
    with pytest.raises(SteerError, match=f"a checkpoint of {method}, a baseline"):
        load_steer(path)


def test_a_models_path_may_contain_a_methods_name(tmp_path: Path) -> None:
    args = training_arguments(model_name="/home/flora/prefix-free/gpt2")
    assert load_steer(save(tmp_path / "a.pt", args, projectors())).columns == 2


def test_the_file_name_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "cheer.safetensors", training_arguments(), projectors())
    assert load_steer(path).rank == RANK


def test_a_transferred_checkpoint_needs_epsilon_as_a_fact(tmp_path: Path) -> None:
    path = save(tmp_path / "moved.pt", None, projectors())
    with pytest.raises(SteerError, match=r"moved.pt: epsilon is not in the file; give it as a key"):
        load_steer(path)
    steer = load_steer(path, epsilon=0.001, fixed_columns=[1])
    assert (steer.epsilon, steer.fixed_columns) == (0.001, (1,))


def test_plain_tensors_serve_as_well_as_parameters(tmp_path: Path) -> None:
    state = {name: tensor.detach() for name, tensor in projectors().items()}
    path = save(tmp_path / "moved.pt", None, collections.OrderedDict(state))
    assert torch.equal(load_steer(path, epsilon=1).tensors["projector1"], state["projector1"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_checkpoints_of_any_floating_dtype_load(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: nn.Parameter(tensor.detach().to(dtype)) for name, tensor in projectors().items()}
    steer = load_steer(save(tmp_path / "cheer.pt", training_arguments(), state))
    assert torch.equal(steer.tensors["projector2"], state["projector2"].detach())


@pytest.mark.parametrize(
    ("key", "variant", "field", "width", "facts"),
    [
        ("add_vec", "add", "add", HIDDEN, {}),
        ("offset_vec", "offset", "offset", 11, {"hidden_size": HIDDEN}),
    ],
    ids=["add", "offset"],
)
def test_the_other_adaptor_classes_load(
    tmp_path: Path, key: str, variant: str, field: str, width: int, facts: dict[str, Any]
) -> None:
    vectors = torch.randn(COLUMNS, width)
    path = save(
        tmp_path / "a.pt", training_arguments(adaptor_class=variant), {key: nn.Parameter(vectors)}
    )
    steer = load_steer(path, **facts)
    assert steer.variant == variant
    assert torch.equal(steer.tensors[field], vectors)


def test_an_offset_checkpoint_asks_for_the_hidden_size(tmp_path: Path) -> None:
    args = training_arguments(adaptor_class="offset")
    path = save(tmp_path / "a.pt", args, {"offset_vec": nn.Parameter(torch.ones(2, 11))})
    with pytest.raises(
        SteerError, match=r"a.pt: an offset steer does not tell .* give hidden_size"
    ):
        load_steer(path)


def test_facts_replace_the_training_arguments(tmp_path: Path) -> None:
    path = save(tmp_path / "cheer.pt", training_arguments(), projectors())
    steer = load_steer(path, epsilon=2.0, fixed_columns=[], columns=[1], kind="lm_steer")
    assert (steer.epsilon, steer.fixed_columns, steer.columns) == (2.0, (), 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"adaptor_class": "prefix"}, "variant is 'prefix'"),
        ({"adaptor_class": "add"}, "variant add takes the tensors add"),
        ({"dummy_steer": 7}, r"fixed_columns \[7\]: this steer has columns 0 to 1"),
        ({"dummy_steer": "x"}, "fixed_columns.* is 'x'"),
    ],
    ids=["negative-epsilon", "nan-epsilon", "unknown-class", "other-class", "dummy-7", "dummy-x"],
)
def test_training_arguments_that_cannot_be_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "bad.pt", training_arguments(**changed), projectors())
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": torch.ones(2)}, "a dict with the keys model; wanted: .* an LM-Steer checkpoint"),
        ([None], "not an LM-Steer checkpoint"),
        ([training_arguments(), [1], 2], "not an LM-Steer checkpoint"),
        ([3, {}, 2], "not an LM-Steer checkpoint"),
        ([None, {}, 2], "its state holds nothing"),
        ([None, {"weight": torch.ones(2)}, 2], "its state holds weight; wanted: projector1"),
        ([None, {"projector1": "x", "projector2": "y"}, 2], "projector1 is a str; a tensor"),
        ([None, {"projector1": torch.ones(2, 6, 2)}, 2], "given: projector1"),
        ([None, {"add_vec": torch.full((2, 6), torch.nan)}, 2], "add has 12 values that are NaN"),
        ([None, {"add_vec": torch.ones(6)}, 2], r"tensor add is \[6\]"),
        ([None, {"add_vec": torch.tensor(1.0)}, 2], r"tensor add is \[\]"),
    ],
    ids=[
        "state-dict",
        "short-list",
        "state-a-list",
        "args-a-number",
        "empty-state",
        "foreign-key",
        "no-tensor",
        "one-projector",
        "nan",
        "one-dimension",
        "scalar",
    ],
)
def test_other_contents_are_refused_with_what_was_found(
    tmp_path: Path, saved: Any, message: str
) -> None:
    path = tmp_path / "other.pt"
    torch.save(saved, path)
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path, epsilon=1.0)
    assert str(path) in str(caught.value)


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
    ("payload", "named"),
    [
        (shell, "posix.system"),
        (python, "__builtin__.eval"),
        (attribute, "__builtin__.getattr"),
        (class_of_ours, "Innocent"),
        (tensor_from_code, "torch.serialization.load"),
    ],
    ids=["os.system", "eval", "getattr", "class", "torch.load"],
)
@pytest.mark.parametrize("place", ["argument", "state", "step"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_names_code_is_refused_and_not_run(
    tmp_path: Path, payload: Callable[[Path], Any], named: str, place: str
) -> None:
    marker = tmp_path / "executed"
    evil = payload(marker)
    saved: list[Any] = [training_arguments(), dict(projectors()), 1000]
    if place == "argument":
        saved[0].model_name = evil
    elif place == "state":
        saved[1]["projector1"] = evil
    else:
        saved[2] = evil
    path = tmp_path / "evil.pt"
    torch.save(saved, path)
    with pytest.raises(SteerError, match=r"evil.pt: it names .*nothing of it was loaded") as caught:
        load_steer(path)
    assert named in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_a_later_protocol_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    torch.save([None, {"projector1": shell(marker)}, 1], path, pickle_protocol=protocol)
    with pytest.raises(SteerError, match=rf"its pickle has protocol {protocol}; save it anew"):
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
    with pytest.raises(SteerError, match=r"evil.pt: it(s pickle uses| names)"):
        load_steer(path)
    assert not marker.exists()


def test_a_pickle_behind_a_pickle_is_refused_or_ignored(tmp_path: Path) -> None:
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
    with pytest.raises(SteerError, match=r"old.pt: torch.save's form before PyTorch 1.6, a pickle"):
        load_steer(path)
    assert not marker.exists()


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).as_strided((1, 2**20, 2**20), (0, 0, 0))
    path = save(tmp_path / "huge.pt", None, {"projector1": huge, "projector2": huge})
    with pytest.raises(SteerError, match=r"1048576\] claims more values \(1099511627776\)"):
        load_steer(path, epsilon=1.0)


def test_two_pickles_in_one_archive_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "whole.pt", training_arguments(), projectors())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02N.")
    with pytest.raises(
        SteerError,
        match=r"whole.pt: one pickle .*; found whole/data.pkl, other/",
    ):
        load_steer(path)


def test_a_large_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "large.pt", "x" * 1_000_001, projectors())
    with pytest.raises(SteerError, match="a pickle of at most 1000000 bytes is wanted"):
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
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "whole.pt"
    return save(path, training_arguments(), projectors()).read_bytes()


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 100_000), value=st.integers(0, 255))
def test_a_flipped_byte_gives_a_steer_or_a_steer_error(
    tmp_path: Path, whole: bytes, position: int, value: int
) -> None:
    data = bytearray(whole)
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
    tmp_path: Path, whole: bytes, position: int, value: bytes
) -> None:
    source, path = tmp_path / "source.pt", tmp_path / "changed.pt"
    source.write_bytes(whole)

    def change(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + value + data[at + len(value) :]

    rewrite_archive(source, path, {"data.pkl": change})
    try:
        assert isinstance(load_steer(path), LMSteer)
    except SteerError as error:
        assert str(path) in str(error)


def rewrite_archive(
    source: Path,
    target: Path,
    changes: dict[str, Callable[[bytes], bytes] | None],
    *,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy a checkpoint with some records changed (or dropped, for None)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            record = info.filename.partition("/")[2]
            change = changes.get(record, bytes)
            if change is not None:
                new.writestr(info.filename, change(old.read(info)))
    return target
