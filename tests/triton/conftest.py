"""Triton kernels, on a card or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CARD = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, those in float16 for the longer matrix.

    Without a card and without the interpreter none of them can run.
    """
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.triton)
            # What float16 does beyond bfloat16 is its range, which the formula tests look at.
            if "torch.float16" in item.name and "overflow" not in item.name:
                item.add_marker(pytest.mark.matrix)
            if not (HAS_CARD or INTERPRETED):
                item.add_marker(pytest.mark.skip("no CUDA device; TRITON_INTERPRET=1 is not set"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")
