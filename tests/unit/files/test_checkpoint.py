"""The LM-Steer authors' checkpoints: read in their format; missing metadata is requested.

Every file here is written by ``torch.save``, in the layouts of the authors' trainer
(``[args, state, step]``) and transfer script (``[None, state, step]``).
"""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_checkpoints import COLUMNS, HIDDEN, RANK, projectors, save, training_arguments
from torch import nn

from vllm_steer import SteerError, load_steer


def test_a_trained_checkpoint_has_its_metadata(tmp_path: Path) -> None:
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
    ("arguments", "message"),
    [
        ({}, "it has 10 columns, of which training_steer 0 and dummy_steer 1 were .*: [0, 1]"),
        ({"dummy_steer": None}, "training_steer 0 and dummy_steer None were .* columns: [0]"),
        ({"training_steer": 2}, "training_steer 2 and dummy_steer 1 were .* columns: [1, 2]"),
        ({"training_steer": 3.0}, "training_steer 3.0 and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": "3"}, "training_steer '3' and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": True}, "training_steer True and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": -1}, "training_steer -1 and dummy_steer 1 were .* columns: [1]"),
        ({"training_steer": 12, "dummy_steer": None}, "12 and .* were trained; give .* keep$"),
        (
            None,
            "10 columns, and its training arguments do not say which of them were trained; .* "
            "columns: [0]",
        ),
    ],
    ids=[
        *("with-dummy", "without", "another", "float", "text", "bool", "negative", "beyond"),
        "transferred",
    ],
)
def test_untrained_columns_need_a_choice(
    tmp_path: Path, arguments: dict[str, Any] | None, message: str
) -> None:
    args = None if arguments is None else training_arguments(num_steers=10, **arguments)
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


def test_a_transferred_checkpoint_needs_the_key_epsilon(tmp_path: Path) -> None:
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
    ("key", "variant", "field", "width", "overrides"),
    [
        ("add_vec", "add", "add", HIDDEN, {}),
        ("offset_vec", "offset", "offset", 11, {"hidden_size": HIDDEN}),
    ],
    ids=["add", "offset"],
)
def test_the_other_adaptor_classes_load(
    tmp_path: Path, key: str, variant: str, field: str, width: int, overrides: dict[str, Any]
) -> None:
    vectors = torch.randn(COLUMNS, width)
    path = save(
        tmp_path / "a.pt", training_arguments(adaptor_class=variant), {key: nn.Parameter(vectors)}
    )
    steer = load_steer(path, **overrides)
    assert steer.variant == variant
    assert torch.equal(steer.tensors[field], vectors)


def test_an_offset_checkpoint_asks_for_the_hidden_size(tmp_path: Path) -> None:
    args = training_arguments(adaptor_class="offset")
    path = save(tmp_path / "a.pt", args, {"offset_vec": nn.Parameter(torch.ones(2, 11))})
    with pytest.raises(
        SteerError, match=r"a.pt: hidden_size cannot be read from an offset steer; give"
    ):
        load_steer(path)


def test_overrides_replace_the_training_arguments(tmp_path: Path) -> None:
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
def test_invalid_training_arguments_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "bad.pt", training_arguments(**changed), projectors())
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            {"model": torch.ones(2)},
            "a dict with the keys model; expected .* an LM-Steer checkpoint",
        ),
        ([None], "not an LM-Steer checkpoint"),
        ([training_arguments(), [1], 2], "not an LM-Steer checkpoint"),
        ([3, {}, 2], "not an LM-Steer checkpoint"),
        ([None, {}, 2], "its state has no keys"),
        ([None, {"weight": torch.ones(2)}, 2], "its state has weight; expected projector1"),
        (
            [None, {"projector1": "x", "projector2": "y"}, 2],
            "projector1 is a str; expected a tensor",
        ),
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
def test_other_contents_are_refused_and_described(tmp_path: Path, saved: Any, message: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(saved, path)
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(path, epsilon=1.0)
    assert str(path) in str(caught.value)
