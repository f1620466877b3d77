"""The LM-Steer authors' checkpoints: ``torch.save([args, state, step])``.

``args`` is an ``argparse.Namespace`` (or None after a transfer), ``state`` maps ``projector1`` and
``projector2`` (or ``add_vec``, or ``offset_vec``) to Parameters.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import Facts, read_facts
from vllm_steer.files.make import make_lm_steer
from vllm_steer.steers import LMSteer

NAME = "an LM-Steer checkpoint"
CLASSES: dict[str, type] = {"argparse.Namespace": argparse.Namespace}
_TENSOR_NAMES = {
    "projector1": "projector1",
    "projector2": "projector2",
    "add_vec": "add",
    "offset_vec": "offset",
}


def read(loaded: Sequence[Any], facts: Facts) -> LMSteer:
    """Read what was saved; ``facts`` add what it lacks (a transferred one has no epsilon).

    Raises ``SteerError`` if it is not the list that the authors' trainer writes.
    """
    args, state = _split(loaded)
    return make_lm_steer(_tensors(state), facts.over(_facts_of(args)))


def _split(loaded: Sequence[Any]) -> tuple[argparse.Namespace | None, Mapping[str, Any]]:
    if (
        len(loaded) not in (2, 3)
        or not isinstance(loaded[0], argparse.Namespace | None)
        or not isinstance(loaded[1], Mapping)
    ):
        raise SteerError(
            "not an LM-Steer checkpoint: wanted a list of the training arguments (a Namespace or "
            f"None), a dict of projectors and the step; found {type(loaded).__name__}"
        )
    return loaded[0], loaded[1]


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    unknown = sorted(set(map(str, state)) - set(_TENSOR_NAMES))
    if unknown or not state:
        raise SteerError(
            f"its state holds {', '.join(map(str, state)) or 'nothing'}; "
            "wanted: projector1 and projector2, or add_vec, or offset_vec"
        )
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SteerError(f"{name} is a {type(tensor).__name__}; a tensor is wanted")
        tensors[_TENSOR_NAMES[name]] = tensor.detach().contiguous()
    return tensors


def _facts_of(args: argparse.Namespace | None) -> Facts:
    """Epsilon, variant, dummy column and model out of the authors' command line."""
    if args is None:
        return Facts()
    said = vars(args)
    dummy = said.get("dummy_steer")
    found = {
        "epsilon": said.get("epsilon"),
        "variant": said.get("adaptor_class"),
        "base_model": said.get("model_name"),
        "fixed_columns": None if dummy is None else [dummy],
    }
    return read_facts(found, origin="training arguments")
