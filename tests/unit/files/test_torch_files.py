"""Vectors and deltas of ``torch.save``: missing metadata of a tensor is requested."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_tools import save, tensors
from untrusted_text_tools import BLOCKS, WIDTH, directions, steered, streams

from vllm_steer import DeltaSteer, SteerError, load_steer, save_steer


def test_a_4d_tensor_is_a_delta_with_its_heads_side_by_side(tmp_path: Path) -> None:
    delta = torch.randn(5, 3, 2, 4)  # steps, layers, heads, d_head
    steer = load_steer(save(tmp_path / "diff.pt", delta))
    assert isinstance(steer, DeltaSteer)
    assert (steer.site, steer.schedule, steer.layers) == ("heads", "fixed", (0, 1, 2))
    assert (steer.steps, steer.hidden_size) == (5, 8)
    assert steer.delta[4, 2, 6] == delta[4, 2, 1, 2]
    assert torch.equal(steer.delta[1, 0], torch.cat([delta[1, 0, 0], delta[1, 0, 1]]))


def test_overrides_select_and_replace_in_a_delta(tmp_path: Path) -> None:
    path = save(tmp_path / "diff.pt", torch.randn(5, 3, 2, 4))
    steer = load_steer(path, kind="delta", layers="1-2", site="attn_in", schedule="dim")
    assert (steer.layers, steer.site, steer.schedule) == ((1, 2), "attn_in", "dim")
    save_steer(steer, tmp_path / "own")
    assert torch.equal(load_steer(tmp_path / "own").delta, steer.delta)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "vector"}, "is delta and the key kind is vector"),
        ({"layers": "3"}, "layers 3 are not in this steer; it has 0-2"),
        ({"rows": "1"}, "rows does not apply to a delta of Dynamic"),
        ({"mode": "add"}, "mode does not apply to a steer of kind delta"),
        (
            {"hidden_size": 4},
            "tensor width is 8 but the key hidden_size, the width of its site, is 4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_overrides_that_do_not_fit_a_delta_are_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(save(tmp_path / "diff.pt", torch.randn(5, 3, 2, 4)), **overrides)


def test_one_vector_needs_the_key_layers(tmp_path: Path) -> None:
    path = save(tmp_path / "v.pt", torch.arange(6.0))
    with pytest.raises(SteerError, match=r"tensor \[6\] does not say .* such as layers: 16"):
        load_steer(path)
    steer = load_steer(path, layers="3,7")
    assert (steer.layers, steer.site, steer.mode) == ((3, 7), "resid", "add")
    assert torch.equal(steer.vectors, torch.arange(6.0).expand(2, 6))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({}, "does not say which layer each row is for"),
        ({"layers": "0-4"}, "has 6 rows and the key layers has 5"),
        ({"layers": "0-4", "rows": "1-4"}, "has 4 rows and the key layers has 5"),
        ({"rows": "1-5"}, "does not say which layer each row is for"),
    ],
    ids=["nothing", "too-few", "other-rows", "no-layers"],
)
def test_a_vector_per_row_needs_the_key_layers(
    tmp_path: Path, overrides: dict[str, Any], problem: str
) -> None:
    path = save(tmp_path / "v.pt", torch.randn(BLOCKS + 1, WIDTH))
    with pytest.raises(SteerError) as caught:
        load_steer(path, **overrides)
    message = str(caught.value)
    assert (
        f"a tensor [6, 6] {problem}; give the key layers, one 0-based decoder block per row"
        in message
    )
    assert "row i the output of block i-1; persona vectors" in message
    assert "give rows: 1-5, layers: 0-4" in message
    assert "If row i is the output of block i, give layers: 0-5" in message


def test_a_vector_per_block_goes_to_the_blocks_outputs(tmp_path: Path) -> None:
    by_block = tensors(range(BLOCKS))
    path = save(tmp_path / "v.pt", torch.stack(list(by_block.values())))
    steer = load_steer(path, layers="0-4")
    assert torch.equal(steered(steer), streams(out_of=directions(range(BLOCKS)))[-1])


@pytest.mark.parametrize("state", [1, 3, 5])
def test_hidden_states_with_the_embeddings_first_are_shifted_by_one(
    tmp_path: Path, state: int
) -> None:
    """A change of ``hidden_states[state]`` alone shows in that state first."""
    by_state = torch.stack(list(tensors(range(BLOCKS + 1)).values()))
    path = save(tmp_path / "persona.pt", by_state)
    steer = load_steer(path, rows="1-5", layers="0-4").keep_layers((state - 1,))
    assert torch.equal(steer.vectors[0], by_state[state])
    before, after = streams(), streams(out_of={steer.layers[0]: steer.vectors[0].numpy()})
    assert torch.equal(after[state], before[state] + by_state[state])
    assert all(torch.equal(after[i], before[i]) for i in range(state))


def test_rows_pick_single_rows(tmp_path: Path) -> None:
    tensor = torch.randn(BLOCKS + 1, WIDTH)
    steer = load_steer(save(tmp_path / "v.pt", tensor), rows=[2, 5], layers="1,4")
    assert torch.equal(steer.vectors, tensor[[2, 5]])
    with pytest.raises(SteerError, match="rows 6: this tensor has rows 0-5"):
        load_steer(tmp_path / "v.pt", rows=6, layers=5)


def test_the_keys_of_a_dict_are_the_blocks(tmp_path: Path) -> None:
    vectors = tensors([4, 1])
    steer = load_steer(save(tmp_path / "v.pt", vectors))
    assert steer.layers == (1, 4)
    assert torch.equal(steer.vectors, torch.stack([vectors[1], vectors[4]]))
    assert torch.equal(steered(steer), streams(out_of=directions([4, 1]))[-1])
    assert load_steer(tmp_path / "v.pt", layers=4).layers == (4,)


def test_a_trained_parameter_and_an_ordered_dict_are_read(tmp_path: Path) -> None:
    ordered = collections.OrderedDict((n, torch.nn.Parameter(v)) for n, v in tensors([1]).items())
    steer = load_steer(save(tmp_path / "v.pt", ordered))
    assert not steer.vectors.requires_grad
    path = save(tmp_path / "p.pt", torch.nn.Parameter(torch.ones(6)))
    assert not load_steer(path, layers=1).vectors.requires_grad


def test_a_3d_tensor_needs_a_kind(tmp_path: Path) -> None:
    delta = torch.randn(4, 2, 6)
    path = save(tmp_path / "d.pt", delta)
    for overrides in ({}, {"kind": "delta"}, {"layers": "8-9"}, {"kind": "delta", "layers": "8"}):
        with pytest.raises(
            SteerError,
            match=r"\[4, 2, 6\] may be a step delta of 4 steps and 2 layers; if so, " r"give ki",
        ):
            load_steer(path, **overrides)
    steer = load_steer(path, kind="delta", layers="8-9", site="resid")
    assert (steer.kind, steer.layers, steer.site) == ("delta", (8, 9), "resid")
    assert torch.equal(steer.delta, delta)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (torch.tensor(1.0), {"layers": 1}, r"a tensor \[\]; expected \[d\], \[L, d\]"),
        (torch.ones(0), {"layers": 1}, r"a tensor \[0\]; expected"),
        (torch.ones(1, 1, 1, 1, 6), {}, r"a tensor \[1, 1, 1, 1, 6\]; expected"),
        (torch.ones(6).int(), {"layers": 1}, "torch.int32; expected a floating dtype"),
        (torch.full((6,), torch.nan), {"layers": 1}, "6 values that are NaN"),
        (torch.ones(6), {"layers": 1, "rows": 0}, r"rows does not apply to a tensor \[6\]"),
        (
            torch.ones(6),
            {"layers": 1, "kind": "delta"},
            r"a tensor \[6\] cannot be a steer of " r"kind delta",
        ),
        (
            torch.ones(2, 6),
            {"kind": "lm_steer"},
            "a plain tensor is vector or delta or condition and the key kind is lm_steer",
        ),
        (torch.ones(6), {"layers": 1, "feature": 0}, "feature does not apply to a plain tensor"),
        ({}, {}, r"its content is a dict with the keys \(none\); expected a tensor"),
        ({"3": torch.ones(6)}, {}, "a dict with the keys 3; expected .* layer .integers"),
        ({"layers": torch.ones(6)}, {}, "a dict with the keys layers; expected"),
        ("vector", {}, "its content is a str; expected a tensor"),
        (7, {}, "its content is a int; expected a tensor"),
        (
            {1: torch.ones(6), "2": torch.ones(6)},
            {},
            "layer '2': expected a 0-based layer such as 16",
        ),
        ({True: torch.ones(6)}, {}, "layer True: expected a 0-based layer"),
        ({-1: torch.ones(6)}, {}, "layer -1: .* counted from the end must be given"),
        ({10**9: torch.ones(6)}, {}, "layer 1000000000"),
        ({1: [1.0, 2.0]}, {}, "layer 1 is a list; expected a tensor"),
        ({1: torch.ones(1, 6)}, {}, r"layer 1 is \[1, 6\] .*one dimension"),
        ({1: torch.ones(6), 2: torch.ones(7)}, {}, r"layer 2 is \[7\].* they must be equal"),
        ({1: torch.ones(6), 2: torch.ones(6).half()}, {}, "float16.* they must be equal"),
        ({1: torch.ones(6), 2: torch.full((6,), torch.inf)}, {}, "6 values that are NaN or inf"),
    ],
    ids=range(23),
)
def test_invalid_tensors_are_refused_and_described(
    tmp_path: Path, content: Any, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message) as caught:
        load_steer(save(tmp_path / "v.pt", content), **overrides)
    assert str(tmp_path / "v.pt") in str(caught.value)
