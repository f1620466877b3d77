"""Steps at the heads through projections that are linear, and through quantised ones."""

from collections.abc import Callable

import pytest
import torch

from vllm_steer import SteerError
from vllm_steer.serving.projection import project_linearly

WIDTH = 256
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5


def rows_of(*sizes: float, outlier: float = 1.0) -> torch.Tensor:
    rows = torch.randn(len(sizes), WIDTH, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = outlier
    return rows * torch.tensor(sizes)[:, None]


def static_int8(largest: float, steps: int = 127) -> Callable[[torch.Tensor], torch.Tensor]:
    """Inputs are rounded to 127 steps up to the largest activation of a calibration."""
    step = largest / steps
    return lambda rows: ((rows / step).round().clamp(-steps, steps) * step) @ WEIGHT.T


def static_fp8(largest: float) -> Callable[[torch.Tensor], torch.Tensor]:
    step = largest / 448
    return lambda rows: (
        ((rows / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step) @ WEIGHT.T
    )


def dynamic_int8(rows: torch.Tensor) -> torch.Tensor:
    step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return ((rows / step).round() * step) @ WEIGHT.T


def error(projected: torch.Tensor, rows: torch.Tensor) -> float:
    expected = rows @ WEIGHT.T
    return float(((projected - expected).norm(dim=1) / expected.norm(dim=1)).max())


def test_a_plain_projection_is_applied_as_it_is() -> None:
    rows = rows_of(1e-3, 1.0, 300.0)
    assert torch.equal(project_linearly(lambda x: x @ WEIGHT.T, rows, "layer 0"), rows @ WEIGHT.T)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("quantised", [static_int8(3.0), static_fp8(3.0), dynamic_int8])
def test_a_quantised_projection_is_applied_where_it_is_linear(
    quantised: Callable[[torch.Tensor], torch.Tensor], size: float
) -> None:
    rows = rows_of(size, size / 50)
    projected = project_linearly(quantised, rows, "layer 0")
    assert error(projected, rows) < 0.05


def test_what_a_calibrated_scale_would_lose_is_lost_without_the_search() -> None:
    rows = rows_of(1e-3)
    assert error(static_int8(3.0)(rows), rows) == 1.0


def test_rows_whose_largest_value_alone_survives_are_refused() -> None:
    """One value of 20 sets the scale; 7 steps then leave little of the others, of size 1."""
    with pytest.raises(SteerError, match="projection of layer 3 is quantised in such a way"):
        project_linearly(static_int8(3.0, steps=7), rows_of(1.0, outlier=20.0), "layer 3")


def test_zero_rows_and_a_projection_of_zeros_are_linear() -> None:
    rows = rows_of(1.0, 0.0)
    projected = project_linearly(static_int8(100.0), rows, "layer 0")
    assert not projected[1].any() and error(projected[:1], rows[:1]) < 0.05
    assert not project_linearly(torch.zeros_like, rows, "layer 0").any()


def test_values_beyond_the_dtype_are_left_to_the_caller() -> None:
    projected = project_linearly(lambda x: x.half().float() @ WEIGHT.T, rows_of(1e6), "layer 0")
    assert not torch.isfinite(projected).all()
