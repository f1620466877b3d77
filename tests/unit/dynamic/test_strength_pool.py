"""The strength pool: ranges never overlap as requests start and end."""

import random

import pytest
import torch

from vllm_steer.serving.dynamic.requests import StrengthPool

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(8))
def test_new_ranges_are_zero_and_not_shared(seed: int) -> None:
    """Against a simple model: one list per range."""
    rng = random.Random(seed)
    pool = StrengthPool(CPU, size=rng.choice((1, 7, 64)))
    values: dict[int, list[float]] = {}
    for number in range(1, 300):
        if values and rng.random() < 0.45:
            start = rng.choice(list(values))
            pool.give_back(start, len(values.pop(start)))
        else:
            length = rng.choice((1, 2, 3, 5, 17, 40))
            start = pool.take(length)
            assert pool.values[start : start + length].tolist() == [0.0] * length
            values[start] = [float(number)] * length
            pool.values[start : start + length] = float(number)
        assert pool.num_taken == sum(map(len, values.values()))
        for start, numbers in values.items():
            assert pool.values[start : start + len(numbers)].tolist() == numbers
    for start, numbers in values.items():
        pool.give_back(start, len(numbers))
    assert pool.num_taken == 0
    size = pool.values.numel()
    assert (pool.take(size), pool.values.numel()) == (0, size)


def test_growth_keeps_content_and_offsets() -> None:
    pool = StrengthPool(CPU, size=4)
    before = pool.values
    first = pool.take(3)
    pool.values[first : first + 3] = torch.tensor([1.0, 2.0, 3.0])
    second = pool.take(100)
    assert pool.values is not before
    assert pool.values[first : first + 3].tolist() == [1.0, 2.0, 3.0]
    assert second >= 3
    assert pool.values.dtype == torch.float32
    assert pool.num_taken == 103


def test_a_range_that_fits_does_not_move_the_pool() -> None:
    pool = StrengthPool(CPU, size=8)
    before = pool.values
    starts = [pool.take(4), pool.take(4)]
    assert sorted(starts) == [0, 4]
    assert pool.values is before
