"""The tiny Llama and the steers that most engine tests use."""

from pathlib import Path

import pytest
from engines import random_steers
from tiny_models import HIDDEN, VOCAB, save_tiny_model

from vllm_steer import LMSteer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def steers() -> dict[str, LMSteer]:
    return random_steers(HIDDEN, VOCAB)
