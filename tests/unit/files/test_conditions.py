"""Files that are read as conditions, and LM-Steers that are read as low-rank maps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from untrusted_text_tools import (
    DECODER,
    WIDTH,
    directions,
    write_concept,
    write_gguf,
    write_saelens,
    write_svec,
)

from vllm_steer import ConditionSteer, LMSteer, SteerError, VectorSteer, load_steer, save_steer

CAST: dict[str, Any] = {"kind": "condition", "layers": 6, "threshold": 0.025, "side": "below"}


def leash_similarity(condition: torch.Tensor, hidden: torch.Tensor) -> float:
    """As the library compares: through the projector ``c c^T / (c . c)`` and tanh."""
    projector = torch.outer(condition, condition) / torch.dot(condition, condition)
    projected = torch.tanh(projector @ hidden)
    return float(torch.dot(hidden, projected) / (hidden.norm() * projected.norm()))


def test_a_condition_of_activation_steering_reads_the_input_of_its_block(tmp_path: Path) -> None:
    vectors = directions([1, 7, 8])
    steer = load_steer(write_svec(tmp_path / "c.svec", vectors), **CAST)
    assert isinstance(steer, ConditionSteer)
    assert (steer.layers, steer.site, steer.base_model) == ((6,), "resid", "llama")
    assert steer.vector[0].tolist() == vectors[7].tolist()
    assert (steer.threshold, steer.similarity, steer.side, steer.tokens) == (
        *(0.025, "cast", "below", "last"),
    )
    # The equation of the steer's similarity is the library's.
    h, w = torch.randn(WIDTH), steer.vector[0]
    formula = torch.cosine_similarity(h, torch.tanh((h @ w) * w / (w @ w)), dim=0)
    assert float(formula) == pytest.approx(leash_similarity(w, h), abs=1e-6)


def test_the_keys_of_a_condition_replace_its_defaults(tmp_path: Path) -> None:
    path = write_svec(tmp_path / "c.svec", directions([0, 7]))
    keys = {**CAST, "similarity": "dot", "side": "above", "tokens": "any", "base_model": "m"}
    steer = load_steer(path, **keys)
    assert (steer.similarity, steer.side, steer.tokens) == ("dot", "above", "any")
    assert steer.base_model == "m"


def test_any_vector_can_be_a_condition(tmp_path: Path) -> None:
    keys = {"kind": "condition", "threshold": 1, "layers": 2}
    gguf = load_steer(write_gguf(tmp_path / "v.gguf", directions([1, 2])), **keys)
    assert (gguf.site, gguf.similarity, gguf.base_model) == ("resid", "cosine", "mistral")
    assert gguf.vector[0].tolist() == directions([1, 2])[2].tolist()
    concept = load_steer(write_concept(tmp_path / "w", W=torch.eye(4, WIDTH)), **keys)
    assert (concept.site, concept.vector[0, 2]) == ("attn_in", 1)
    torch.save(torch.ones(5, 3), tmp_path / "rows.pt")
    plain = load_steer(tmp_path / "rows.pt", rows=3, site="attn_out", **keys)
    assert (plain.site, plain.vector.tolist()) == ("attn_out", [[1, 1, 1]])
    sae = write_saelens(tmp_path / "sae")
    feature = load_steer(
        sae, feature=5, kind="condition", threshold=1, hook="blocks.2.hook_attn_out"
    )
    assert (feature.site, feature.vector[0].tolist()) == ("attn_out", DECODER[5].tolist())


def test_a_vector_of_vllm_steer_can_be_a_condition(tmp_path: Path) -> None:
    vector = VectorSteer(
        vectors=torch.eye(3, 5),
        layers=(2, 3, 4),
        mode="rotate",
        layer_scores=(1, 2, 3),
        default_strength=8,
        description="d",
        recipe={"a": 1},
    )
    save_steer(vector, tmp_path / "v")
    steer = load_steer(tmp_path / "v", kind="condition", layers=3, threshold=0.5)
    assert (steer.vector.tolist(), steer.layers) == ([[0, 1, 0, 0, 0]], (3,))
    assert (steer.description, steer.recipe, steer.similarity) == ("d", {"a": 1}, "cosine")
    assert load_steer(tmp_path / "v").mode == "rotate"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshold": None}, "threshold is not in the file; give it as a key, such as threshold"),
        ({"layers": None}, "has directions of layers 0,6-7 and a condition reads one layer; give"),
        ({"layers": "6-7"}, "directions of layers 6-7 and a condition reads one layer"),
        ({"layers": 5}, "layers 5 are not in this steer; it has 0,6-7"),
        ({"mode": "add"}, "mode does not apply to a steer of kind condition; remove the key"),
        ({"low": 1, "high": 2}, "low, high does not apply to a steer of kind condition"),
        ({"default_strength": 1}, "default_strength does not apply to a steer of kind condition"),
        ({"epsilon": 1}, "epsilon does not apply to a steer of kind condition"),
        ({"similarity": "tanh"}, "similarity is 'tanh': Input should be 'cosine', 'dot' or 'cast'"),
        ({"side": "larger"}, "side is 'larger': Input should be 'above' or 'below'"),
        ({"tokens": "mean"}, "tokens is 'mean': Input should be 'last' or 'any'"),
        ({"kind": None}, "threshold, side does not apply to a steer of kind vector"),
        ({"kind": "sae"}, "is vector or condition and the key kind is sae"),
        ({"site": "heads"}, "site is 'heads'"),
        ({"hidden_size": 7}, "tensor width is 6 but hidden_size is 7"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_condition_that_is_not_whole_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = write_svec(tmp_path / "c.svec", directions([1, 7, 8]))
    given = {name: value for name, value in {**CAST, **keys}.items() if value is not None}
    with pytest.raises(SteerError, match=message):
        load_steer(path, **given)


def test_a_zero_direction_is_no_condition(tmp_path: Path) -> None:
    data = {"model_type": "llama", "directions": {"7": [0, 0]}}
    (tmp_path / "c.svec").write_text(json.dumps(data))
    with pytest.raises(SteerError, match="tensor vector is zero and has no direction"):
        load_steer(tmp_path / "c.svec", **CAST)


def test_deltas_and_lm_steers_are_no_conditions(tmp_path: Path, make_steer: Any) -> None:
    torch.save(torch.ones(3, 2, 4), tmp_path / "delta.pt")
    torch.save(torch.ones(3, 2, 2, 2), tmp_path / "dac.pt")
    save_steer(make_steer(), tmp_path / "lm")
    for name in ("delta.pt", "dac.pt", "lm"):
        with pytest.raises(SteerError, match=r"kind: delta|kind is condition|kind is lm_steer"):
            load_steer(tmp_path / name, kind="condition", layers=1, threshold=1)


def lm_checkpoint(path: Path, columns: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("projector1", "projector2")
    state = {name: torch.randn(columns, 6, 3, generator=generator) for name in names}
    torch.save([None, state, 5], path)
    return state


@pytest.mark.parametrize("saved_first", [False, True], ids=["checkpoint", "vllm-steer"])
def test_an_lm_steer_inside_the_layers_is_its_own_transform(
    tmp_path: Path, saved_first: bool
) -> None:
    state = lm_checkpoint(tmp_path / "lm")
    keys: dict[str, Any] = {"epsilon": 0.25, "columns": [1]}
    if saved_first:
        save_steer(load_steer(tmp_path / "lm", **keys, default_strength=2), tmp_path / "lm")
        keys = {"default_strength": 2}
    steer = load_steer(
        tmp_path / "lm",
        kind="low_rank",
        layers="3,5",
        site="attn_out",
        **{"default_strength": 2} | keys,
    )
    assert (steer.layers, steer.site, steer.rank) == ((3, 5), "attn_out", 3)
    assert (steer.default_strength, steer.bias) == (2, None)
    h = torch.randn(20, 6)
    p1, p2 = state["projector1"][1], state["projector2"][1]
    expected = h + 0.25 * 4 * (h @ p1) @ p2.T  # LM-Steer's equation at strength 4
    for row in (0, 1):
        found = h + 4 * (h @ steer.a[row].T) @ steer.b[row].T
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": None}, "give the keys layers and site, such as layers: 8-15, site: resid"),
        ({"site": None}, "give the keys layers and site"),
        ({"epsilon": None}, "epsilon is not in the file"),
        ({"columns": None}, r"it has 2 columns and a low-rank map takes one; give the key columns"),
        ({"columns": [0, 1]}, r"it has 2 columns .* such as columns: \[0\]"),
        ({"site": "head"}, "site is 'head'; allowed: resid, attn_in, attn_out"),
        ({"mode": "add"}, "mode does not apply to a steer of kind lm_steer"),
        ({"threshold": 1}, "threshold does not apply to a steer of kind lm_steer"),
        ({"kind": "vector"}, "is lm_steer or low_rank and the key kind is vector"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_an_lm_steer_that_is_no_map_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    lm_checkpoint(tmp_path / "lm")
    whole = {"kind": "low_rank", "layers": 1, "site": "resid", "epsilon": 1, "columns": [0], **keys}
    with pytest.raises(SteerError, match=message):
        load_steer(tmp_path / "lm", **{n: v for n, v in whole.items() if v is not None})


@pytest.mark.parametrize("variant", ["add", "offset"])
def test_other_variants_are_no_maps(tmp_path: Path, variant: Any) -> None:
    steer = LMSteer(variant=variant, epsilon=1, hidden_size=6, **{variant: torch.ones(1, 6)})
    save_steer(steer, tmp_path / "lm")
    with pytest.raises(SteerError, match=f"variant {variant} is no low-rank map"):
        load_steer(tmp_path / "lm", kind="low_rank", layers=1, site="resid")


def test_one_free_and_one_fixed_column_are_no_map(tmp_path: Path) -> None:
    """The fixed column enters with 1 whatever the strength, which a map cannot do."""
    lm_checkpoint(tmp_path / "lm")
    keys = {"kind": "low_rank", "layers": 1, "site": "resid", "epsilon": 1, "fixed_columns": [0]}
    with pytest.raises(SteerError, match=r"it has 2 columns .* such as columns: \[1\]"):
        load_steer(tmp_path / "lm", **keys)
    assert load_steer(tmp_path / "lm", columns=[1], **keys).rank == 3
