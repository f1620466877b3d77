"""Files of ``torch.save``, read without trust.

A pickle can name any callable, so every name in it is checked against the short list of its format
before PyTorch's own weights-only reader sees it.
"""

import pickletools
import zipfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.source import cause

_TENSORS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.BFloat16Storage",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch.IntStorage",
        "torch.LongStorage",
    }
)
_LARGEST_PICKLE = 1_000_000


def named_in(path: Path) -> frozenset[str]:
    """Every ``module.name`` that the file's pickle would import; nothing is imported."""
    try:
        return _named_in(path)
    except SteerError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error


def load(path: Path, named: Collection[str], classes: Mapping[str, type]) -> Any:
    """What was saved. ``classes`` are those its format uses, or stand-ins, by their full names.

    Raises ``SteerError`` if the pickle names anything but these and tensors, if it is damaged, or
    if a tensor claims more values than the file holds.
    """
    forbidden = sorted(set(named) - _TENSORS - set(classes))
    if forbidden:
        raise SteerError(
            f"it names {', '.join(forbidden)[:300]}, which a steer file has no use for; nothing of "
            "it was loaded. Save tensors, in a dict if need be"
        )
    allowed: list[Any] = [(cls, name) for name, cls in classes.items()]
    try:
        # As an open file: torch.load tells a path by its ending.
        with torch.serialization.safe_globals(allowed), path.open("rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error
    size = path.stat().st_size
    for name, tensor in _tensors_in(loaded):
        if tensor.numel() * tensor.element_size() > size:
            raise SteerError(f"{name} claims more values ({tensor.numel()}) than the file holds")
    return loaded


def _tensors_in(loaded: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor and the key that it stands under, however deep."""
    waiting, seen = deque([("the tensor", loaded)]), set()
    while waiting:
        name, item = waiting.popleft()
        if id(item) in seen:  # a pickle may hold itself
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield name, item
        elif isinstance(item, Mapping):
            waiting.extend((str(key)[:100], value) for key, value in item.items())
        elif isinstance(item, list | tuple):
            waiting.extend((name, value) for value in item)
        elif hasattr(item, "__dict__"):
            waiting.append((name, vars(item)))


def _named_in(path: Path) -> frozenset[str]:
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise SteerError("its records are compressed; torch.save writes them as they are")
        pickles = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise SteerError(f"one pickle of at most {_LARGEST_PICKLE} bytes is wanted in it")
        return frozenset(_globals(archive.read(pickles[0])))


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
