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
from vllm_steer.foreign import listed, shown
from vllm_steer.steers import LMSteer

NAME = "an LM-Steer checkpoint"
CLASSES: dict[str, type] = {"argparse.Namespace": argparse.Namespace}
_TENSOR_NAMES = {
    "projector1": "projector1",
    "projector2": "projector2",
    "add_vec": "add",
    "offset_vec": "offset",
}
_BASELINES = {
    "lora": "LoRA",
    "prefix": "prefix tuning",
    "embedding_tuning": "embedding tuning",
    "wte": "embedding tuning",
}


def read(loaded: Sequence[Any], facts: Facts) -> LMSteer:
    """Read what was saved; ``facts`` add what it lacks (a transferred one has no epsilon).

    Raises ``SteerError`` if it is not the list that the authors' trainer writes.
    """
    args, state = _split(loaded)
    _refuse_baselines(args, state)
    steer = make_lm_steer(_tensors(state), facts.over(_facts_of(args)))
    if facts.columns is None:
        _check_trained(args, steer)
    return steer


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


def _refuse_baselines(args: argparse.Namespace | None, state: Mapping[str, Any]) -> None:
    """Raise ``SteerError`` for what the authors' trainer saves of methods that are no steers."""
    model = getattr(args, "model_name", None)
    for part, method in _BASELINES.items():
        found = next((key for key in state if isinstance(key, str) and part in key), None)
        if isinstance(model, str) and model.startswith(f"{part}-"):
            found = model
        if found is not None:
            raise SteerError(
                f"it holds {shown(found)}: a checkpoint of {method}, a baseline of LM-Steer's "
                "authors and no steer"
            )


def _check_trained(args: argparse.Namespace | None, steer: LMSteer) -> None:
    """Raise ``SteerError`` if some columns hold the random values that they began with.

    The authors' trainer makes ``num_steers`` columns, 10 by default, and trains one of them and
    the dummy; the others would add noise, with a strength or as fixed ones.
    """
    every = range(steer.columns)
    one, dummy = (getattr(args, name, None) for name in ("training_steer", "dummy_steer"))
    if one is None:
        said = "and does not say which of them were trained"
        untrained = {*steer.free_columns} - {0, 1}
        trained = sorted({0, *steer.fixed_columns})
    else:
        said = f"of which training_steer {shown(one)} and dummy_steer {shown(dummy)} were trained"
        trained = [c for c in every if any(type(t) is int and c == t for t in (one, dummy))]
        untrained = {*every} - {*trained} if type(one) is int and one in every else {*every}
    if untrained:
        example = f", such as columns: {trained}" if trained else ""
        raise SteerError(
            f"it has {steer.columns} columns, {said}; give columns, those to keep{example}"
        )


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    unknown = set(state) - set(_TENSOR_NAMES)
    if unknown or not state:
        raise SteerError(
            f"its state holds {listed(state, none='nothing')}; "
            "expected projector1 and projector2, or add_vec, or offset_vec"
        )
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SteerError(f"{name} is a {type(tensor).__name__}; expected a tensor")
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
