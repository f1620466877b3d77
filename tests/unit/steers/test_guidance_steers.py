"""Vector and delta steers: validation, kept layers, properties."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from guidance import delta, head, vector

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer
from vllm_steer.steers.content import content_digest
from vllm_steer.steers.sites import DELTA_SITES, VECTOR_SITES

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("site", VECTOR_SITES)
@pytest.mark.parametrize("mode", ["add", "rotate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_vector_has_its_properties(site: Any, mode: Any, dtype: torch.dtype) -> None:
    steer = VectorSteer(vectors=torch.ones(2, 7, dtype=dtype), layers=(1, 4), site=site, mode=mode)
    assert (steer.kind, steer.hidden_size, steer.schedule) == ("vector", 7, None)
    assert (steer.default_strength, steer.layer_scores) == (None, None)
    assert list(steer.tensors) == ["vectors"] and steer.tensors["vectors"] is steer.vectors


@pytest.mark.parametrize("site", DELTA_SITES)
@pytest.mark.parametrize("schedule", ["fixed", "start", "dim"])
def test_a_delta_has_its_properties(site: Any, schedule: Any) -> None:
    steer = DeltaSteer(delta=torch.zeros(3, 2, 7), layers=(1, 4), site=site, schedule=schedule)
    assert (steer.kind, steer.steps, steer.hidden_size) == ("delta", 3, 7)
    assert list(steer.tensors) == ["delta"] and steer.tensors["delta"] is steer.delta
    assert DeltaSteer(delta=torch.zeros(1, 1, 1), layers=(0,)).site == "heads"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "heads"}, "site is 'heads'; allowed: resid, attn_in, attn_out"),
        ({"site": "head"}, "site is 'head'; allowed: resid"),
        ({"mode": "Rotate"}, "mode is 'Rotate'; allowed: add, rotate"),
        ({"default_strength": NAN}, "default_strength is nan; it must be finite"),
        ({"default_strength": -INF}, "default_strength is -inf; it must be finite"),
        ({"vectors": torch.ones(2, 3, 1)}, r"vectors is \[2, 3, 1\]; expected 2 dimensions"),
        ({"vectors": torch.ones(3)}, r"vectors is \[3\]; expected 2 dimensions, none of size 0"),
        ({"vectors": torch.ones(0, 3), "layers": ()}, r"vectors is \[0, 3\]; expected 2 dim"),
        ({"vectors": torch.ones(2, 0)}, r"vectors is \[2, 0\]; expected 2 dimensions"),
        ({"vectors": torch.ones(2, 3).long()}, "vectors is torch.int64; expected a floating dtype"),
        ({"vectors": torch.tensor([[1, NAN], [INF, 1]])}, "vectors has 2 values that are NaN or"),
        ({"vectors": torch.tensor([[1e300], [1]]).double()}, "vectors has 1 values that are NaN"),
        ({"layers": (0,)}, r"vectors has 2 layers and layers names 1 \(0\); they must be equal"),
        ({"layers": (0, 1, 2)}, r"vectors has 2 layers and layers names 3 \(0-2\)"),
        ({"layers": (1, 0)}, r"layers \[1, 0\]: expected ascending 0-based layers, each once"),
        ({"layers": (1, 1)}, r"layers \[1, 1\]: expected ascending"),
        ({"layers": (-1, 1)}, r"layers \[-1, 1\]: expected ascending"),
        ({"layer_scores": (0.5,)}, "layer_scores has 1 numbers for 2 layers"),
        ({"layer_scores": ()}, "layer_scores has 0 numbers for 2 layers"),
        (
            {"vectors": torch.tensor([[1.0], [0]]), "mode": "rotate"},
            "the vector of layer 4 is zero and has no direction for mode rotate; remove the layer",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_vector_that_cannot_be_served_is_refused(fields: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"vectors": torch.ones(2, 3), "layers": (1, 4), **fields}
    with pytest.raises(SteerError, match=message):
        VectorSteer(**arguments)


def test_a_zero_vector_can_be_added_and_a_tiny_one_rotated_to() -> None:
    VectorSteer(vectors=torch.zeros(1, 3), layers=(0,))
    VectorSteer(vectors=torch.full((1, 3), 1e-40), layers=(0,), mode="rotate")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "head"}, "site is 'head'; allowed: heads, resid, attn_in, attn_out"),
        ({"schedule": "dyn"}, "schedule is 'dyn'; allowed: fixed, start, dim"),
        ({"schedule": None}, "schedule is None; allowed: fixed"),
        ({"default_strength": INF}, "default_strength is inf; it must be finite"),
        ({"delta": torch.ones(2, 3)}, r"delta is \[2, 3\]; expected 3 dimensions"),
        ({"delta": torch.ones(3, 2, 2, 2)}, r"delta is \[3, 2, 2, 2\]; expected 3 dimensions"),
        ({"delta": torch.ones(0, 2, 3)}, r"delta is \[0, 2, 3\]; expected 3 dimensions, none"),
        ({"delta": torch.ones(3, 2, 3).int()}, "delta is torch.int32; expected a floating dtype"),
        ({"delta": torch.full((1, 2, 1), NAN)}, "delta has 2 values that are NaN or infinite"),
        ({"layers": (1,)}, r"delta has 2 layers and layers names 1 \(1\); they must be equal"),
        ({"layers": (4, 1)}, r"layers \[4, 1\]: expected ascending"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_delta_that_cannot_be_served_is_refused(fields: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"delta": torch.ones(3, 2, 5), "layers": (1, 4), **fields}
    with pytest.raises(SteerError, match=message):
        DeltaSteer(**arguments)


@pytest.mark.parametrize("steer", [vector((0,)), delta(2, (0,))], ids=["vector", "delta"])
def test_a_steer_cannot_be_changed(steer: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        steer.site = "attn_in"


def test_kept_layers_keep_their_rows_and_scores() -> None:
    whole = vector((2, 5, 9), layer_scores=(0.25, 0.5, 0.75), mode="rotate", site="attn_in")
    reduced = whole.keep_layers((2, 9))
    assert (reduced.layers, reduced.layer_scores) == ((2, 9), (0.25, 0.75))
    assert torch.equal(reduced.vectors, whole.vectors[[0, 2]])
    assert (reduced.mode, reduced.site) == ("rotate", "attn_in")
    assert vector((2, 5)).keep_layers((5,)).layer_scores is None


def test_kept_layers_keep_their_part_of_every_step() -> None:
    whole = delta(4, (2, 5, 9), schedule="dim")
    reduced = whole.keep_layers((5, 9))
    assert (reduced.layers, reduced.steps, reduced.schedule) == ((5, 9), 4, "dim")
    assert torch.equal(reduced.delta, whole.delta[:, 1:])


@pytest.mark.parametrize("steer", [vector((2, 5)), delta(2, (2, 5))], ids=["vector", "delta"])
def test_layers_outside_a_steer_cannot_be_kept(steer: Any) -> None:
    assert content_digest(steer.keep_layers((2, 5))) == content_digest(steer)
    with pytest.raises(SteerError, match="layers 3-4 are not in this steer; it has 2,5"):
        steer.keep_layers((2, 3, 4))
    with pytest.raises(SteerError, match="none of size 0"):
        steer.keep_layers(())
    with pytest.raises(SteerError, match=r"layers \[5, 2\]: expected ascending"):
        steer.keep_layers((5, 2))


def changed(steer: Any, **fields: Any) -> Any:
    return dataclasses.replace(steer, **fields)


PUSH, WALK = vector((0, 3)), delta(2, (0, 3))
WORD = LMSteer(variant="add", add=torch.ones(2, 3), epsilon=0.5, hidden_size=3, fixed_columns=(1,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PUSH, changed(PUSH, vectors=PUSH.vectors.clone())),
        (PUSH, changed(PUSH, vectors=PUSH.vectors.double())),
        (PUSH, changed(PUSH, vectors=PUSH.vectors.T.contiguous().T)),
        (PUSH, changed(PUSH, default_strength=9.0, description="a", base_model="b")),
        (PUSH, changed(PUSH, layer_scores=(0.1, 0.2))),
        (changed(PUSH, vectors=PUSH.vectors.half()),
         changed(PUSH, vectors=PUSH.vectors.half().float())),
        (WALK, changed(WALK, schedule="dim", default_strength=-1.0)),
        (WALK, changed(WALK, delta=WALK.delta.double())),
        (WORD, changed(WORD, default_strength=2.0, description="x")),
    ],
    ids=["copy", "dtype", "strides", "words", "scores", "half", "schedule", "delta-dtype", "head"],
)  # fmt: skip
def test_request_options_and_file_names_do_not_change_the_digest(one: Any, other: Any) -> None:
    assert content_digest(one) == content_digest(other)


UNLIKE: dict[str, Any] = {
    "push": PUSH,
    "other-values": vector((0, 3), seed=1),
    "one-value": changed(PUSH, vectors=PUSH.vectors + torch.eye(2, 5) * 1e-6),
    "negative": changed(PUSH, vectors=-PUSH.vectors),
    "swapped-rows": changed(PUSH, vectors=PUSH.vectors.flip(0)),
    "other-layers": changed(PUSH, layers=(0, 4)),
    "fewer-layers": PUSH.keep_layers((0,)),
    "other-site": changed(PUSH, site="attn_in"),
    "third-site": changed(PUSH, site="attn_out"),
    "other-mode": changed(PUSH, mode="rotate"),
    "delta": WALK,
    "delta-site": changed(WALK, site="resid"),
    "delta-layers": changed(WALK, layers=(1, 3)),
    "delta-steps": changed(WALK, delta=WALK.delta[:1]),
    "delta-swapped": changed(WALK, delta=WALK.delta.flip(0)),
    "vector-as-delta": DeltaSteer(delta=PUSH.vectors[None], layers=(0, 3), site="resid"),
    "delta-in-another-shape": DeltaSteer(
        delta=PUSH.vectors.reshape(2, 1, 5), layers=(0,), site="resid"
    ),
    "head": head(),
    "epsilon": changed(head(), epsilon=2.0),
    "word": WORD,
    "free": changed(WORD, fixed_columns=()),
    "offset": LMSteer(variant="offset", offset=torch.ones(1, 5), epsilon=1.0, hidden_size=5),
}


def test_everything_that_changes_the_effect_changes_the_digest() -> None:
    digests = {name: content_digest(steer) for name, steer in UNLIKE.items()}
    assert len(set(digests.values())) == len(UNLIKE)
    assert all(len(digest) == 64 for digest in digests.values())
    assert digests == {name: content_digest(steer) for name, steer in UNLIKE.items()}
