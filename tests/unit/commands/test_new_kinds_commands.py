"""``convert``, ``inspect`` and ``evidence`` of low-rank maps, SAE features and conditions."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from untrusted_text_tools import directions, write_saelens, write_svec

from vllm_steer import (
    ConditionSteer,
    LowRankSteer,
    SAESteer,
    SteerError,
    VectorSteer,
    load_steer,
    save_steer,
)
from vllm_steer.cli import app
from vllm_steer.inspection import nearest_tokens, token_evidence
from vllm_steer.inspection.description import describe

WORDS = ("bad", "good", "so", "great")
EMBEDDING = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [2.0, -1.0]])
TOKENIZER: Any = SimpleNamespace(
    get_vocab=lambda: {word: number for number, word in enumerate(WORDS)},
    decode=lambda ids: WORDS[ids[0]],
)


def run(*arguments: Any) -> str:
    """The output of a command; raises its ``SteerError``."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def convert(*arguments: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run("convert", *arguments, "--json"))
    return data


def low_rank(**changes: Any) -> LowRankSteer:
    """Layer 1: ``B A = [[0, 6], [0, 0]]``, layer 4: ``[[0, 0], [8, 0]]``, each of rank 2."""
    a = torch.tensor([[[0.0, 2.0], [0.0, 1.0]], [[8.0, 0.0], [0.0, 0.0]]])
    b = torch.tensor([[[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 5.0]]])
    return LowRankSteer(**{"a": a, "b": b, "layers": (1, 4), **changes})


def sae() -> SAESteer:
    return SAESteer(
        encoder=torch.tensor([[6.0, 8.0]]),
        decoder=torch.tensor([[3.0, 4.0]]),
        bias=torch.tensor([-0.5]),
        threshold=torch.tensor([2.0]),
        layers=(20,),
        low=1.5,
        high=math.inf,
    )


def condition() -> ConditionSteer:
    return ConditionSteer(vector=torch.tensor([[3.0, 4.0]]), layers=(7,), threshold=0.5)


def test_convert_writes_an_sae_feature_and_shows_its_options(tmp_path: Path) -> None:
    arrays = {"W_enc": (2, 5), "W_dec": (5, 2), "b_enc": (5,), "threshold": (5,)}
    ones = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    np.savez(tmp_path / "params.npz", **ones)
    place = ("--layers", "3,4", "--site", "attn_out")
    bounds = ("--low", "-inf", "--high", "2.5")
    data = convert(
        *(tmp_path / "params.npz", tmp_path / "own", "--kind", "sae", "--feature", 3),
        *(*place, *bounds, "--mode", "clamp"),
    )
    assert data == {
        "format": "the weights of an SAE",
        "kind": "sae",
        "site": "attn_out",
        "hidden_size": 2,
        "default_strength": None,
        "base_model": "",
        "description": "",
        "mode": "clamp",
        "low": "-inf",
        "high": 2.5,
        "layers": "3-4",
        "norms": {"3": pytest.approx(math.sqrt(2)), "4": pytest.approx(math.sqrt(2))},
        "output": str(tmp_path / "own"),
    }
    assert load_steer(tmp_path / "own").low == -math.inf


def test_convert_takes_what_the_config_of_an_sae_would_say(tmp_path: Path) -> None:
    path = write_saelens(tmp_path / "sae", b_dec=torch.ones(6), W_enc=torch.ones(6, 8))
    options = ("--kind", "sae", "--feature", 1, "--hook", "blocks.1.hook_resid_post")
    for flag, bias in (("--apply-b-dec-to-input", -6), ("--no-apply-b-dec-to-input", 0)):
        convert(*(path, tmp_path / "own", *options, "--architecture", "standard", flag, "--force"))
        assert load_steer(tmp_path / "own").bias.tolist() == [bias]


def test_convert_writes_a_condition(tmp_path: Path) -> None:
    path = write_svec(tmp_path / "c.svec", directions([7]))
    data = convert(
        *(path, tmp_path / "own", "--kind", "condition", "--threshold", 0.025),
        *("--side", "below", "--tokens", "any", "--layers", 6),
    )
    expected = {"threshold": 0.025, "similarity": "cast", "side": "below", "tokens": "any"}
    assert {name: data[name] for name in expected} == expected
    assert data["norms"] == {"6": pytest.approx(float(np.linalg.norm(directions([7])[7])))}
    data = convert(tmp_path / "own", tmp_path / "other", "--similarity", "dot")
    assert (data["similarity"], load_steer(tmp_path / "other").similarity) == ("dot", "dot")


def test_convert_reads_a_folder_of_pyreft(tmp_path: Path) -> None:
    folder = tmp_path / "reft"
    folder.mkdir()
    types = ["<class 'pyreft.interventions.LoreftIntervention'>"]
    (folder / "config.json").write_text(json.dumps({"intervention_types": types}))
    state = {
        "weight": torch.tensor([[1.0, 3.0]]),
        "bias": torch.zeros(1),
        "rotate_layer": torch.tensor([[1.0], [0.0]]),
    }
    for layer in (3, 12):
        name = f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        torch.save(state, folder / name)
    data = convert(folder, tmp_path / "own", "--default-strength", 1)
    assert (data["format"], data["kind"], data["rank"]) == ("a folder of pyreft", "low_rank", 1)
    assert (data["layers"], data["norms"]) == ("3,12", {"3": 3.0, "12": 3.0})
    assert load_steer(tmp_path / "own").a[0].tolist() == [[0, 3]]
    assert "a folder of pyreft" in run("inspect", folder)


def test_convert_shows_the_bounds_of_a_projection(tmp_path: Path) -> None:
    torch.save(torch.ones(4), tmp_path / "v.pt")
    options = ("--layers", 2, "--mode", "project", "--low", -1, "--high", "inf")
    data = convert(tmp_path / "v.pt", tmp_path / "own", *options)
    assert (data["mode"], data["low"], data["high"]) == ("project", -1, "inf")


def test_a_map_has_the_norm_of_its_product() -> None:
    """``|B A|`` by the full matrices, which are 2 by 2 here."""
    steer = low_rank(bias=torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    rows = describe(steer)["layers"]
    assert rows == [
        {"layer": 1, "norm": pytest.approx(6), "bias_norm": pytest.approx(6)},
        {"layer": 4, "norm": pytest.approx(8), "bias_norm": pytest.approx(5)},
    ]
    torch.manual_seed(0)
    a, b = torch.randn(1, 3, 20), torch.randn(1, 20, 3)
    (row,) = describe(LowRankSteer(a=a, b=b, layers=(0,)))["layers"]
    assert row == {"layer": 0, "norm": pytest.approx(float((b[0] @ a[0]).norm()), rel=1e-5)}


def test_a_feature_and_a_condition_are_described() -> None:
    feature = describe(sae())
    assert feature["layers"] == [
        {"layer": 20, "norm": 5, "encoder_norm": 10, "bias": -0.5, "threshold": 2}
    ]
    assert (feature["mode"], feature["low"], feature["high"]) == ("clamp", 1.5, "inf")
    test = describe(condition())
    assert test["layers"] == [{"layer": 7, "norm": 5}]
    assert (test["threshold"], test["similarity"], test["default_strength"]) == (
        0.5,
        "cosine",
        None,
    )


@pytest.mark.parametrize("steer", [low_rank(), sae(), condition()], ids=lambda s: s.kind)
def test_inspect_shows_the_table_and_plots_the_norms(tmp_path: Path, steer: Any) -> None:
    save_steer(steer, tmp_path / "own")
    output = run("inspect", tmp_path / "own", "--plot", tmp_path / "norms.png")
    assert steer.kind in output and "norm" in output
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    json.loads(run("inspect", tmp_path / "own", "--json"), parse_constant=pytest.fail)


def test_the_directions_of_a_map_are_what_it_can_add() -> None:
    nearest = nearest_tokens(low_rank(), EMBEDDING, TOKENIZER, top=2, count=4)
    assert [(n.label, round(n.weight, 6)) for n in nearest] == [
        ("layer 4, direction 0", 8),
        ("layer 1, direction 0", 6),
    ]
    # Layer 4 adds along (0, 1), layer 1 along (1, 0), each up to its sign.
    for near, column in zip(nearest, (1, 0), strict=True):
        scores = {token.text: abs(token.score) for token in near.highest}
        expected = {word: abs(float(EMBEDDING[i, column])) for i, word in enumerate(WORDS)}
        assert scores == pytest.approx(expected, abs=1e-6)


def test_the_direction_of_a_feature_is_its_decoder_row() -> None:
    (near,) = nearest_tokens(sae(), EMBEDDING, TOKENIZER, count=1)
    assert (near.label, near.weight, near.highest[0].text) == ("layer 20", 5, "so")
    assert near.highest[0].score == 12


def test_a_condition_has_no_nearest_tokens_and_no_evidence() -> None:
    with pytest.raises(SteerError, match="a condition adds nothing, so no token becomes"):
        nearest_tokens(condition(), EMBEDDING, TOKENIZER)
    with pytest.raises(SteerError, match="a condition changes no likelihood"):
        token_evidence(None, condition(), torch.tensor([1, 2]), strength=1.0)


def test_a_vector_is_described_as_before() -> None:
    facts = describe(VectorSteer(vectors=torch.ones(1, 4), layers=(3,)))
    assert (facts["mode"], facts["layer_range"], facts["layers"]) == (
        *("add", "3", [{"layer": 3, "norm": 2}]),
    )
    assert "low" not in facts
