"""Layer numbers: notation, printing and positions."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer import SteerError
from vllm_steer.steers.layers import check_layers, format_layers, parse_layers, positions_of


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("8-11", (8, 9, 10, 11)),
        ("3,7,9", (3, 7, 9)),
        ("0-3,8", (0, 1, 2, 3, 8)),
        ("8,0-3", (0, 1, 2, 3, 8)),
        (" 9 , 1 - 2 ", (1, 2, 9)),
        ("5-5", (5,)),
        ("0", (0,)),
        ("9999", (9999,)),
        (7, (7,)),
        (0, (0,)),
        ([3, 7], (3, 7)),
        ([7, 3], (3, 7)),
        ((4,), (4,)),
        (["3", " 7 "], (3, 7)),
        (range(2, 5), (2, 3, 4)),
    ],
    ids=repr,
)
def test_layers_are_read_in_ascending_order(value: Any, layers: tuple[int, ...]) -> None:
    layer_numbers = parse_layers(value)
    assert layer_numbers == layers
    assert {type(layer) for layer in layer_numbers} == {int}


@pytest.mark.parametrize(
    "value",
    [
        "", " ", ",", "3,", ",3", "3,,4", "-3", "3-", "-", "3-1", "1-2-3", "1--2", "+3", "3.0",
        "0x3", "1_0", "007", "010", "three", "\uff13", "\u00b2", "10000", "99999", "0-10000", "3,3",
        "0-3,2", "5-6,6-7", -1, 10_000, 3.0, 1e3, float("nan"), float("inf"), True, False,
        None, [], (), {}, {"0": 1}, set(), {3}, [3, 3], [3, -1], [True], [None], [3.0],
        [[3]], ["1-2"], [""], ["3,4"], [10_000], object(),
    ],
    ids=lambda value: "object" if type(value) is object else repr(value),
)  # fmt: skip
def test_other_values_are_refused_with_the_expected_form(value: Any) -> None:
    with pytest.raises(SteerError, match=r"^layers is .*; expected 0-based layers such as '8-31'"):
        parse_layers(value)


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), [10**5000], [[10**5000]], "9" * 5000, "0-" + "9" * 5000, [0] * 100_000],
    ids=["int", "negative", "in-list", "nested", "digits", "span", "long-list"],
)
def test_a_huge_value_gets_a_short_error(value: Any) -> None:
    with pytest.raises(SteerError, match="expected 0-based layers") as caught:
        parse_layers(value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("depth", range(700, 1000, 3))
def test_a_deep_value_gets_an_ordinary_error(depth: int) -> None:
    """At some depth JSON can still be read and cannot be written any more."""
    try:
        value = json.loads("[" * depth + "]" * depth)
    except RecursionError:
        return
    with pytest.raises(SteerError, match="expected 0-based layers"):
        parse_layers(value)


def test_repeated_spans_cost_no_more_than_the_largest_layer_number() -> None:
    begin = time.process_time()
    with pytest.raises(SteerError, match="expected 0-based layers"):
        parse_layers("0-9999," * 20_000 + "0")
    assert time.process_time() - begin < 1


@given(st.sets(st.integers(0, 9999), min_size=1, max_size=40))
def test_printed_layers_can_be_parsed(layers: set[int]) -> None:
    assert parse_layers(format_layers(layers)) == tuple(sorted(layers))
    assert parse_layers(sorted(layers, reverse=True)) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("layers", "printed"),
    [
        ((0, 1, 2, 7), "0-2,7"),
        ((7, 2, 0, 1), "0-2,7"),
        ((3,), "3"),
        ((3, 4), "3-4"),
        ((1, 3, 5), "1,3,5"),
        ((9, 10, 11, 99, 100), "9-11,99-100"),
        ((), ""),
    ],
    ids=repr,
)
def test_layers_are_printed_as_spans(layers: tuple[int, ...], printed: str) -> None:
    assert format_layers(layers) == printed


@pytest.mark.parametrize(
    ("layers", "count", "message"),
    [
        ((1, 0), 2, r"layers \[1, 0\]: expected ascending 0-based layers, each once"),
        ((0, 0), 2, r"layers \[0, 0\]: expected ascending"),
        ((-1, 0), 2, r"layers \[-1, 0\]: expected ascending"),
        ((0, 1, 2), 2, r"tensor t has 2 layers and layers names 3 \(0-2\); they must be equal"),
        ((), 1, "tensor t has 1 layers and layers names 0"),
    ],
    ids=str,
)
def test_layers_that_do_not_fit_their_tensor_are_refused(
    layers: tuple[int, ...], count: int, message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        check_layers(layers, count, "t")


def test_layers_that_fit_their_tensor_are_accepted() -> None:
    check_layers((0, 5, 9), 3, "t")
    check_layers((), 0, "t")


def test_kept_layers_have_their_indices() -> None:
    assert positions_of((9, 2), (2, 5, 9)) == [2, 0]
    assert positions_of((), (2, 5, 9)) == []
    with pytest.raises(SteerError, match="layers 1,3-4 are not in this steer; it has 2,5,9"):
        positions_of((4, 1, 5, 3), (2, 5, 9))
