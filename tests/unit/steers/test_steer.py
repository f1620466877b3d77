"""A steer is validated when it is created; errors name the found and the expected value."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

import vllm_steer
from vllm_steer import LMSteer, SteerError, SteerRequestError


def test_all_is_sorted_and_complete() -> None:
    assert vllm_steer.__all__ == sorted(vllm_steer.__all__)
    assert all(hasattr(vllm_steer, name) for name in vllm_steer.__all__)


def test_every_error_is_a_value_error() -> None:
    assert issubclass(SteerError, ValueError)
    assert issubclass(SteerRequestError, SteerError)


@pytest.mark.parametrize("module", ["vllm", "triton"])
def test_importing_the_package_imports_no_large_library(module: str) -> None:
    code = f"import sys, vllm_steer; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_hugging_face_reference_is_reachable_from_the_package() -> None:
    code = "import vllm_steer; vllm_steer.hf.steered"
    process = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_a_steer_knows_its_columns_and_ranks(make_steer: Any) -> None:
    steer = make_steer(columns=3, rank=4, fixed_columns=(1,))
    assert (steer.columns, steer.rank, steer.total_rank) == (3, 4, 12)
    assert steer.free_columns == (0, 2)
    assert (steer.kind, steer.site, steer.vocab_size) == ("lm_steer", "head", None)


@pytest.mark.parametrize("variant", ["add", "offset"])
def test_a_steer_without_factors_has_rank_zero(make_steer: Any, variant: str) -> None:
    assert make_steer(variant, columns=2).rank == 0


def test_an_offset_steer_knows_its_vocabulary(make_steer: Any) -> None:
    assert make_steer("offset", offset=torch.ones(1, 13)).vocab_size == 13


@pytest.mark.parametrize(
    "epsilon", [0.0, -1.0, math.inf, math.nan], ids=["zero", "negative", "infinite", "nan"]
)
def test_an_epsilon_that_is_not_positive_and_finite_is_refused(
    make_steer: Any, epsilon: float
) -> None:
    with pytest.raises(SteerError, match=rf"epsilon is {epsilon}; it must be a positive"):
        make_steer(epsilon=epsilon)


def test_an_unknown_variant_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match="variant is 'divide'; allowed: multiply, add, offset"):
        make_steer("divide")


def test_a_missing_projector_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match=r"takes the tensors projector1, projector2; given: proj"):
        make_steer(projector2=None)


def test_a_superfluous_tensor_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match="given: projector1, projector2, add"):
        make_steer(add=torch.ones(1, 6))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_refused(make_steer: Any, bad: float) -> None:
    vectors = torch.zeros(2, 6)
    vectors[1, 3] = bad
    with pytest.raises(SteerError, match="tensor add has 1 values that are NaN or infinite"):
        make_steer("add", add=vectors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"projector1": torch.ones(1, 6, 2)[0]}, r"projector1 is \[6, 2\]; expected 3 dimensions"),
        ({"projector1": torch.ones(1, 6, 0)}, r"projector1 is \[1, 6, 0\]; .*none of size 0"),
        ({"projector1": torch.ones(1, 6, 3)}, r"projector1 is \[1, 6, 3\] and projector2 is"),
        ({"projector1": torch.ones(2, 6, 2)}, r"projector1 is \[2, 6, 2\] and projector2 is"),
        ({"projector1": torch.ones(1, 6, 2).int()}, r"torch.int32; expected a floating dtype"),
    ],
    ids=["two-dimensions", "rank-zero", "ranks-differ", "columns-differ", "integers"],
)
def test_tensors_of_the_wrong_form_are_refused(
    make_steer: Any, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        make_steer(**tensors)


def test_a_tensor_of_another_width_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match="tensor width is 7 but hidden_size is 6"):
        make_steer("add", add=torch.ones(1, 7))


@pytest.mark.parametrize("column", [-1, 2])
def test_a_fixed_column_outside_the_steer_is_refused(make_steer: Any, column: int) -> None:
    with pytest.raises(SteerError, match=rf"fixed_columns \[{column}\].*columns 0 to 1"):
        make_steer(columns=2, fixed_columns=(column,))


def test_a_steer_with_every_column_fixed_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match="leave at least one column free"):
        make_steer(columns=2, fixed_columns=(0, 1))


def test_a_steer_cannot_be_changed(make_steer: Any) -> None:
    steer: LMSteer = make_steer()
    with pytest.raises(AttributeError):
        steer.epsilon = 2.0  # type: ignore[misc]


def test_a_default_strength_that_is_not_finite_is_refused(make_steer: Any) -> None:
    with pytest.raises(SteerError, match="default_strength"):
        make_steer(default_strength=math.nan)


@pytest.mark.parametrize("name", [*vllm_steer.__all__, "config", "files", "steers"])
def test_a_lazy_name_exists_after_import(name: str) -> None:
    """They are imported when they are used: each in a process of its own."""
    code = f"import vllm_steer; print(vllm_steer.{name} is not None)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.stdout == "True\n", process.stderr


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vllm_steer' has no attribute 'stear'"):
        _ = vllm_steer.stear
