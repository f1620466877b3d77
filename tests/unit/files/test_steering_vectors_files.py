"""Files of the library steering-vectors."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_tools import save, tensors
from untrusted_text_tools import directions, steered, streams

from vllm_steer import SteerError, load_steer


def test_a_steering_vector_is_added_to_its_blocks_outputs(
    tmp_path: Path, steering_vectors: Any
) -> None:
    path = save(tmp_path / "v.pt", steering_vectors(tensors([0, 3])))
    steer = load_steer(path)
    assert torch.equal(steered(steer), streams(out_of=directions([0, 3]))[-1])
    assert load_steer(path, layers=3, mode="rotate").layers == (3,)


@pytest.mark.parametrize(
    ("layer_type", "site"),
    [("decoder_block", "resid"), ("self_attn", "attn_out"), ("input_layernorm", "attn_in")],
)
def test_a_layer_type_maps_to_a_site(
    tmp_path: Path, steering_vectors: Any, layer_type: str, site: str
) -> None:
    as_class = steering_vectors(tensors([1]), layer_type)
    as_dict = dataclasses.asdict(as_class)
    for content in (as_class, as_dict):
        steer = load_steer(save(tmp_path / "v.pt", content))
        assert (steer.site, steer.mode, steer.layers) == (site, "add", (1,))


def test_steering_vectors_of_one_row_are_flattened_as_the_library_does(
    tmp_path: Path, steering_vectors: Any
) -> None:
    path = save(tmp_path / "v.pt", steering_vectors({1: torch.ones(1, 6), 2: torch.ones(1, 1, 6)}))
    assert load_steer(path).vectors.shape == (2, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_type": "mlp"}, "layer_type is 'mlp'; allowed: decoder_block, self_attn, input_l"),
        ({"layer_type": ["mlp"]}, "layer_type is"),
        ({"layer_activations": {}}, "the file has no vectors"),
        ({"layer_activations": torch.ones(6)}, "layer_activations, a dict of tensors by layer"),
        ({"layer_activations": {-1: torch.ones(6)}}, "layer -1"),
        ({"layer_activations": {"1": torch.ones(6)}}, "layer '1'"),
        ({"layer_activations": {1: torch.ones(2, 6)}}, r"layer 1 is \[2, 6\]"),
        ({"layer_activations": {1: torch.tensor(2.0)}}, r"layer 1 is \[\]"),
        ({"layer_activations": {1: 5}}, "layer 1 is a int"),
        ({"multiplier": 2.0}, "it has layer_activations, layer_type, multiplier; expected"),
    ],
    ids=range(10),
)
def test_invalid_steering_vectors_are_refused(
    tmp_path: Path, steering_vectors: Any, fields: dict[str, Any], message: str
) -> None:
    content = steering_vectors(tensors([1]))
    vars(content).update(fields)
    for saved in (content, vars(content)):
        with pytest.raises(SteerError, match=message):
            load_steer(save(tmp_path / "v.pt", saved))


def test_an_empty_steering_vector_is_refused(tmp_path: Path, steering_vectors: Any) -> None:
    content = steering_vectors({})
    vars(content).clear()
    with pytest.raises(SteerError, match="it has no fields; expected layer_activations"):
        load_steer(save(tmp_path / "v.pt", content))


def test_each_format_may_name_only_its_own_classes(tmp_path: Path, steering_vectors: Any) -> None:
    content = steering_vectors({1: torch.ones(6)}, argparse.Namespace())
    with pytest.raises(
        SteerError, match=r"its pickle refers to " r"steering_vectors\..*SteeringVector;"
    ):
        load_steer(save(tmp_path / "v.pt", content))
