"""The recipe of a steer is part of its file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_steer import DeltaSteer, LMSteer, Steer, SteerError, VectorSteer, load_steer, save_steer
from vllm_steer.fit.recipe import recipe
from vllm_steer.steers.content import content_digest

RECIPE = {"method": "by hand", "figures": {"loss": 1.5, "accuracy": [0.5, 1.0]}, "name": "Größe"}

STEERS: dict[str, Steer] = {
    "lm_steer": LMSteer(
        variant="add", add=torch.ones(1, 4), epsilon=0.1, hidden_size=4, recipe=RECIPE
    ),
    "vector": VectorSteer(vectors=torch.ones(2, 4), layers=(0, 3), recipe=RECIPE),
    "delta": DeltaSteer(delta=torch.ones(3, 1, 4), layers=(1,), recipe=RECIPE),
}


@pytest.mark.parametrize("kind", STEERS)
def test_a_recipe_is_read_back_from_the_file(kind: str, tmp_path: Path) -> None:
    save_steer(STEERS[kind], tmp_path / "x")
    assert load_steer(tmp_path / "x").recipe == RECIPE


def test_a_recipe_is_kept_when_layers_are_left_out() -> None:
    vector = STEERS["vector"]
    assert isinstance(vector, VectorSteer)
    assert vector.keep_layers((3,)).recipe == RECIPE


def test_a_steer_without_a_recipe_has_none_in_its_file(tmp_path: Path) -> None:
    save_steer(VectorSteer(vectors=torch.ones(1, 4), layers=(0,)), tmp_path / "x")
    assert load_steer(tmp_path / "x").recipe is None
    with safe_open(tmp_path / "x", "pt") as file:
        assert "recipe" not in file.metadata()


def test_a_recipe_does_not_change_what_a_steer_is() -> None:
    plain = VectorSteer(vectors=torch.ones(2, 4), layers=(0, 3))
    assert content_digest(plain) == content_digest(STEERS["vector"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "recipe is not JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "recipe is not JSON"),
    ],
    ids=["broken", "list", "deep"],
)
def test_a_malformed_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    save_steer(STEERS["vector"], tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        metadata = {**file.metadata(), "recipe": text}
    save_file({"vectors": torch.ones(2, 4)}, tmp_path / "y", metadata=metadata)
    with pytest.raises(SteerError, match=f"y: .*{message}"):
        load_steer(tmp_path / "y")


def test_a_recipe_names_data_by_content_and_everything_in_plain_json(tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_bytes(b"good\n")
    result = recipe(
        "concept", model="embedded", data=[data], settings={"seed": 1}, figures={"loss": 2.0}
    )
    assert json.loads(json.dumps(result)) == result
    assert result["data"] == [
        {"file": "texts.txt", "sha256": hashlib.sha256(b"good\n").hexdigest()}
    ]
    assert result["versions"]["torch"] == torch.__version__


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"missing\.txt: cannot be read"):
        recipe("x", model="m", data=[tmp_path / "missing.txt"], settings={}, figures={})
