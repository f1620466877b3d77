"""Triton kernels, on a card or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CARD = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; they need a GPU or the interpreter."""
    folder = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(folder):
            item.add_marker(pytest.mark.triton)
            if not (HAS_CARD or INTERPRETED):
                item.add_marker(pytest.mark.skip("no CUDA device; TRITON_INTERPRET=1 is not set"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")
