"""The bank stores steers for the operation: the result equals the steer's formula."""

from typing import Any

import numpy as np
import pytest
import torch

from vllm_steer import LMSteer
from vllm_steer.bank import HeadTable, fill_head_bank
from vllm_steer.kernels.lm_steer import SteeredRows, torch_grouped

CPU = torch.device("cpu")


def fill(steers: dict[str, LMSteer], dtype: torch.dtype = torch.float32) -> Any:
    return fill_head_bank(steers, dtype=dtype, device=CPU)


def apply(table: HeadTable, x: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    """Every row of ``x`` under one steer of the table."""
    steered = SteeredRows(
        rows=np.arange(x.shape[0]),
        scales=np.full(x.shape[0], strength * table.epsilon(name), dtype=np.float32),
        groups=((table.slots[name], 0, x.shape[0]),),
    )
    return torch_grouped.steer_rows(
        x, table.weights, torch_grouped.prepare(steered, table.weights, CPU)
    )


def formula(steer: LMSteer, x: torch.Tensor, strength: float) -> torch.Tensor:
    """The class's equation in float64, one column at a time."""
    y = x.double().clone()
    for column in range(steer.columns):
        a = 1.0 if column in steer.fixed_columns else strength
        if steer.projector1 is not None and steer.projector2 is not None:
            first, second = (p[column].double() for p in (steer.projector1, steer.projector2))
            y += steer.epsilon * a * (x.double() @ first) @ second.T
        else:
            (vectors,) = steer.tensors.values()
            y += steer.epsilon * a * vectors[column].double()
    return y


CASES = {
    "multiply": ("multiply", {"columns": 1, "rank": 3}),
    "multiply-first-fixed": ("multiply", {"columns": 2, "rank": 3, "fixed_columns": (0,)}),
    "multiply-last-fixed": ("multiply", {"columns": 2, "rank": 3, "fixed_columns": (1,)}),
    "multiply-middle-free": ("multiply", {"columns": 3, "rank": 1, "fixed_columns": (2, 0)}),
    "multiply-above-full-rank": ("multiply", {"columns": 1, "rank": 9}),
    "add": ("add", {"columns": 1}),
    "add-columns": ("add", {"columns": 3}),
    "add-fixed": ("add", {"columns": 3, "fixed_columns": (0, 2)}),
    "offset": ("offset", {"columns": 1}),
    "offset-fixed": ("offset", {"columns": 3, "fixed_columns": (1,)}),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("strength", [3.0, -0.5, 1.0])
def test_a_steer_in_the_bank_follows_its_equation(
    make_steer: Any, case: str, strength: float
) -> None:
    variant, options = CASES[case]
    steers = {
        "other": make_steer("multiply", rank=4),
        "steer": make_steer(variant, **options),
        "third": make_steer("offset", columns=2),
        "vector": make_steer("add", columns=2),
    }
    bank = fill(steers)
    table = bank.logits if variant == "offset" else bank.hidden
    x = torch.randn(5, 11 if variant == "offset" else 6)
    result = apply(table, x, "steer", strength)
    torch.testing.assert_close(
        result.double(), formula(steers["steer"], x, strength), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("variant", ["multiply", "add", "offset"])
def test_a_column_fixed_twice_is_fixed_once(make_steer: Any, variant: str) -> None:
    """Refusing such a steer is as good as counting the column once."""
    try:
        steer = make_steer(variant, columns=2, fixed_columns=(1, 1))
    except ValueError:
        return
    bank = fill({"steer": steer})
    x = torch.randn(3, 11 if variant == "offset" else 6)
    result = apply(bank.logits if variant == "offset" else bank.hidden, x, "steer", 2.0)
    torch.testing.assert_close(result.double(), formula(steer, x, 2.0), rtol=1e-5, atol=1e-5)


def test_slots_follow_the_names_and_not_the_order_of_the_config(make_steer: Any) -> None:
    first, second = make_steer(rank=1), make_steer(rank=2)
    forward, backward = fill({"a": first, "b": second}), fill({"b": second, "a": first})
    assert forward.hidden.slots == backward.hidden.slots
    assert forward.hidden.weights.slots == backward.hidden.weights.slots
    assert torch.equal(forward.hidden.weights.expand, backward.hidden.weights.expand)


def test_a_bank_without_offset_steers_has_no_table_for_them(make_steer: Any) -> None:
    assert fill({"a": make_steer()}).logits is None
    assert fill({"a": make_steer("offset")}).hidden is None


def test_a_bank_of_vectors_allocates_no_factors(make_steer: Any) -> None:
    bank = fill({"a": make_steer("add"), "b": make_steer("add", columns=2, fixed_columns=(0,))})
    assert bank.num_bytes == 3 * 6 * 4


def test_the_bank_reports_its_size(make_steer: Any) -> None:
    steers = {"a": make_steer(columns=2, rank=1), "b": make_steer("offset", columns=2)}
    assert fill(steers).num_bytes == 2 * (2 * 1 * 6 * 4) + 1 * 11 * 4
    assert fill(steers, torch.bfloat16).num_bytes == 2 * (2 * 1 * 6 * 2) + 1 * 11 * 2


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({"rank": 3}, 0),
        ({"rank": 4}, 1),
        ({"columns": 2, "rank": 3, "fixed_columns": (1,)}, 0),
        ({"columns": 2, "rank": 4, "fixed_columns": (1,)}, 2),
    ],
    ids=["as-few-bytes", "fewer-bytes", "fixed-as-few-bytes", "fixed-fewer-bytes"],
)
def test_a_steer_is_stored_as_full_matrices_if_that_takes_fewer_bytes(
    make_steer: Any, options: dict[str, Any], matrices: int
) -> None:
    tables = fill({"a": make_steer(**options)}).hidden.weights
    assert tables.dense.shape == (matrices, 6, 6)
    assert (tables.shrink.shape[0] == 0) == bool(matrices)


def test_the_widest_steers_are_those_with_the_largest_ranks(make_steer: Any) -> None:
    steers = {"a": make_steer(rank=1), "b": make_steer(rank=3), "c": make_steer("add")}
    table = fill(steers).hidden
    assert table.widest(1) == ["b"]
    assert table.widest(2) == ["b", "a"]
    assert table.widest(9) == ["b", "a", "c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tables_are_the_steer_rounded_once_to_the_models_dtype(
    make_steer: Any, dtype: torch.dtype
) -> None:
    steer = make_steer(columns=1, rank=3)
    tables = fill({"a": steer}, dtype).hidden.weights
    assert tables.shrink.dtype == tables.expand.dtype == dtype
    assert torch.equal(tables.shrink, steer.projector1[0].T.to(dtype))
    assert torch.equal(tables.expand, steer.projector2[0].T.to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_steers_of_any_floating_dtype_fill_the_bank(make_steer: Any, dtype: torch.dtype) -> None:
    first, second = (torch.full((1, 6, 2), value).to(dtype) for value in (0.5, -2.0))
    tables = fill({"a": make_steer(projector1=first, projector2=second)}).hidden.weights
    assert tables.shrink.unique().tolist() == [0.5]
    assert tables.expand.unique().tolist() == [-2.0]


def test_a_steer_too_large_for_the_models_dtype_is_refused(make_steer: Any) -> None:
    """1e5 is finite in the file and infinite in float16: no request could be served with it."""
    steer = make_steer("add", add=torch.full((1, 6), 1e5))
    with pytest.raises(ValueError, match="float16"):
        fill({"a": steer}, torch.float16)
