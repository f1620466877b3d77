"""The LM-Steer authors' checkpoints: ``torch.save([args, state, step])``, read without trust.

``args`` is an ``argparse.Namespace`` (or None after a transfer), ``state`` maps ``projector1`` and
``projector2`` (or ``add_vec``, or ``offset_vec``) to Parameters. A pickle can name any callable, so
every name in it is checked against a short list before PyTorch's own weights-only reader sees it.
"""

import argparse
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import Facts, read_facts
from vllm_steer.files.make import make_lm_steer
from vllm_steer.steers import LMSteer

_ALLOWED_GLOBALS = frozenset(
    {
        "argparse.Namespace",
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.BFloat16Storage",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
    }
)
_TENSOR_NAMES = {
    "projector1": "projector1",
    "projector2": "projector2",
    "add_vec": "add",
    "offset_vec": "offset",
}
_LARGEST_PICKLE = 1_000_000


def is_checkpoint(path: Path) -> bool:
    """Whether the file begins as a zip archive, which ``torch.save`` writes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_checkpoint(path: Path, facts: Facts) -> LMSteer:
    """Read an LM-Steer checkpoint; ``facts`` add what it lacks (a transferred one has no epsilon).

    Raises ``SteerError`` if it names anything but tensors, Parameters and a Namespace, or is not
    the list that the authors' trainer writes.
    """
    try:
        _check_archive(path)
        # As an open file: torch.load tells a path by its ending.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except SteerError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({error})") from error
    args, state = _split(loaded)
    tensors = _tensors(state, limit=path.stat().st_size)
    return make_lm_steer(tensors, facts.over(_facts_of(args)))


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise SteerError("its records are compressed; torch.save writes them as they are")
        pickles = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise SteerError(f"one pickle of at most {_LARGEST_PICKLE} bytes is wanted in it")
        names = set(_globals(archive.read(pickles[0])))
    forbidden = sorted(names - _ALLOWED_GLOBALS)
    if forbidden:
        raise SteerError(
            f"it names {', '.join(forbidden)}, which an LM-Steer checkpoint has no use for; "
            "nothing of it was loaded"
        )


def _globals(data: bytes) -> Iterator[str]:
    """Every ``module.name`` that the pickle would import; refuses what cannot be told."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
            raise SteerError(
                f"its pickle uses {opcode.name}, which torch.save does not write; "
                "nothing of it was loaded"
            )


def _split(loaded: Any) -> tuple[argparse.Namespace | None, Mapping[str, Any]]:
    if (
        not isinstance(loaded, list | tuple)
        or len(loaded) not in (2, 3)
        or not isinstance(loaded[0], argparse.Namespace | None)
        or not isinstance(loaded[1], Mapping)
    ):
        raise SteerError(
            "not an LM-Steer checkpoint: wanted a list of the training arguments (a Namespace or "
            f"None), a dict of projectors and the step; found {type(loaded).__name__}"
        )
    return loaded[0], loaded[1]


def _tensors(state: Mapping[str, Any], *, limit: int) -> dict[str, torch.Tensor]:
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
        if tensor.numel() * tensor.element_size() > limit:
            raise SteerError(f"{name} claims more values ({tensor.numel()}) than the file holds")
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
