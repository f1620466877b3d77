"""Reads checkpoints of the LM-Steer authors: ``torch.save([args, state, step])``.

``args`` is an ``argparse.Namespace`` (or None after a transfer), ``state`` maps ``projector1`` and
``projector2`` (or ``add_vec``, or ``offset_vec``) to Parameters.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_lm_steer
from vllm_steer.files.steer_metadata import SteerMetadata, read_metadata
from vllm_steer.steers import LMSteer
from vllm_steer.untrusted_text import listed, shown

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


def read(loaded: Sequence[Any], overrides: SteerMetadata) -> LMSteer:
    """Build the steer; ``overrides`` add missing metadata (a transferred one has no epsilon).

    Raises ``SteerError`` if the content is not the list that the authors' trainer writes.
    """
    args, state = _split(loaded)
    _reject_baselines(args, state)
    steer = build_lm_steer(_tensors(state), overrides.completed_by(_metadata_of(args)))
    if overrides.columns is None:
        _check_trained(args, steer)
    return steer


def _split(loaded: Sequence[Any]) -> tuple[argparse.Namespace | None, Mapping[str, Any]]:
    if (
        len(loaded) not in (2, 3)
        or not isinstance(loaded[0], argparse.Namespace | None)
        or not isinstance(loaded[1], Mapping)
    ):
        raise SteerError(
            "not an LM-Steer checkpoint: expected a list of the training arguments (a Namespace "
            f"or None), a dict of projectors and the step; found {type(loaded).__name__}"
        )
    return loaded[0], loaded[1]


def _reject_baselines(args: argparse.Namespace | None, state: Mapping[str, Any]) -> None:
    """Raise ``SteerError`` for checkpoints of the authors' baselines, which are no steers."""
    model = getattr(args, "model_name", None)
    for part, method in _BASELINES.items():
        baseline_key = next((key for key in state if isinstance(key, str) and part in key), None)
        if isinstance(model, str) and model.startswith(f"{part}-"):
            baseline_key = model
        if baseline_key is not None:
            raise SteerError(
                f"it contains {shown(baseline_key)}: a checkpoint of {method}, a baseline of the "
                "LM-Steer "
                "authors; expected an LM-Steer"
            )


def _check_trained(args: argparse.Namespace | None, steer: LMSteer) -> None:
    """Raise ``SteerError`` if some columns were never trained and still have their random values.

    The authors' trainer creates ``num_steers`` columns, 10 by default, and trains one of them and
    the dummy steer; the other columns would add noise.
    """
    every = range(steer.columns)
    trained_column, dummy = (
        getattr(args, name, None) for name in ("training_steer", "dummy_steer")
    )
    if trained_column is None:
        description = "and its training arguments do not say which of them were trained"
        untrained = {*steer.free_columns} - {0, 1}
        trained = sorted({0, *steer.fixed_columns})
    else:
        description = (
            f"of which training_steer {shown(trained_column)} and dummy_steer "
            f"{shown(dummy)} were trained"
        )
        trained = [
            c for c in every if any(type(t) is int and c == t for t in (trained_column, dummy))
        ]
        untrained = (
            {*every} - {*trained}
            if type(trained_column) is int and trained_column in every
            else {*every}
        )
    if untrained:
        example = f", such as columns: {trained}" if trained else ""
        raise SteerError(
            f"it has {steer.columns} columns, {description}; give the key columns, the columns "
            f"to keep{example}"
        )


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    unknown = set(state) - set(_TENSOR_NAMES)
    if unknown or not state:
        raise SteerError(
            f"its state has {listed(state, none='no keys')}; "
            "expected projector1 and projector2, or add_vec, or offset_vec"
        )
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SteerError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        tensors[_TENSOR_NAMES[name]] = tensor.detach().contiguous()
    return tensors


def _metadata_of(args: argparse.Namespace | None) -> SteerMetadata:
    """Epsilon, variant, dummy column and model from the authors' training arguments."""
    if args is None:
        return SteerMetadata()
    arguments = vars(args)
    dummy = arguments.get("dummy_steer")
    values = {
        "epsilon": arguments.get("epsilon"),
        "variant": arguments.get("adaptor_class"),
        "base_model": arguments.get("model_name"),
        "fixed_columns": None if dummy is None else [dummy],
    }
    return read_metadata(values, origin="training arguments")
