"""Reads control vectors of repeng and llama.cpp: GGUF with one ``direction.{L}`` per layer.

``L`` is a decoder block, counted from 0, and the direction is added to that block's output, the
residual stream. repeng extracts it at the same site (``hidden_states[L + 1]``) and by default
writes no ``direction.0`` (``extract.py``, ``control.py``). llama.cpp adds it to ``l_out`` of block
``L`` and rejects a file with a ``direction.0``, which is block 0 here (``common.cpp``,
``llama-adapter.cpp``). Its ``cvector-generator`` extracts ``direction.{L}`` from block ``L - 1``
but adds it after block ``L``; this reader follows where the vector is added.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.build import build_vector
from vllm_steer.files.layer_vectors import read_layer, stack_directions
from vllm_steer.files.size_limits import MAX_TENSORS, check_memory
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.untrusted_text import shown

NAME = "a GGUF control vector"
_ARCHITECTURE = "controlvector"
_MAX_READS = 20_000


def read(path: Path, overrides: SteerMetadata) -> VectorSteer:
    """A steer that is added to the blocks' outputs. Raises ``SteerError`` for other GGUF files."""
    try:
        reader = _open(path)
        architecture = _text(reader, "general.architecture")
        if architecture != _ARCHITECTURE:
            raise SteerError(
                f"a GGUF file of architecture {shown(architecture)}; expected {_ARCHITECTURE!r}, a "
                "control vector"
            )
        _check_size(reader.tensors, path.stat().st_size)
        _check_layout(reader, path.stat().st_size)
        directions = dict(_direction(tensor) for tensor in reader.tensors)
        file_metadata = SteerMetadata(base_model=_text(reader, "controlvector.model_hint"))
    except SteerError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise SteerError(f"not a readable GGUF file ({cause(error)})") from error
    vectors, layers = stack_directions(directions)
    return build_vector(vectors, layers, overrides.completed_by(file_metadata))


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Raises for reads past the end of the file, and for more reads than a vector needs."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
            self.reads += 1
            array = super()._get(offset, dtype, count, *args, **kwargs)
            if array.size != count:
                raise SteerError(
                    f"its header declares {count} values at byte {offset}, past the end of the file"
                )
            if self.reads > _MAX_READS:
                raise SteerError(
                    "it has more entries than a control vector; is it a model checkpoint?"
                )
            return array

    return Bounded(path)


def _check_size(tensors: Sequence[Any], file_size: int) -> None:
    """Raise ``SteerError`` for too many or too large tensors, before any value is copied."""
    if len(tensors) > MAX_TENSORS:
        raise SteerError(f"it has {len(tensors)} tensors; a steer has at most {MAX_TENSORS}")
    check_memory(sum(int(tensor.n_bytes) for tensor in tensors), file_size, "its content")


def _check_layout(reader: Any, file_size: int) -> None:
    """Raise ``SteerError`` for tensors that overlap, are unaligned or end past the file.

    An offset that is too large wraps around in the gguf library.
    """
    previous_end = int(reader.data_offset)
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        end = start + int(tensor.n_bytes)
        aligned = (start - int(reader.data_offset)) % int(reader.alignment) == 0
        if start < previous_end or end > file_size or not aligned:
            raise SteerError(
                f"its tensor {shown(tensor.name)} has an invalid offset: it overlaps another "
                "tensor, is unaligned or ends past the file"
            )
        previous_end = end


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    if field is None:
        return None
    text = field.contents()
    if not isinstance(text, str):
        raise SteerError(f"{key} is {shown(text)}; expected a text")
    return text


def _direction(tensor: Any) -> tuple[int, torch.Tensor]:
    match = re.fullmatch(r"direction\.(.+)", tensor.name)
    if match is None:
        raise SteerError(
            f"tensor {shown(tensor.name)} is unknown; expected direction.1, direction.2 ..."
        )
    if not np.issubdtype(tensor.data.dtype, np.floating):
        raise SteerError(f"{tensor.name} is {tensor.tensor_type.name}; expected F32")
    values = tensor.data.astype(tensor.data.dtype.newbyteorder("="))
    return read_layer(match[1]), torch.from_numpy(values)
