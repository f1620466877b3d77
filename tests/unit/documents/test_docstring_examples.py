"""Examples in docstrings run and give the documented result."""

import doctest
from importlib import import_module

import pytest

EXAMPLES = {
    "vllm_steer.dynamic.strength": 4,
    "vllm_steer.files": 7,
    "vllm_steer.files.steer_file": 4,
    "vllm_steer.fit.activations": 3,
    "vllm_steer.fit.vector": 3,
    "vllm_steer.hf": 8,
    "vllm_steer.steers.delta": 3,
    "vllm_steer.steers.lm_steer": 4,
    "vllm_steer.steers.vector": 3,
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_docstring_examples_of_a_module_hold(module: str) -> None:
    failed, attempted = doctest.testmod(import_module(module), raise_on_error=False)
    assert failed == 0
    assert attempted >= EXAMPLES[module]
