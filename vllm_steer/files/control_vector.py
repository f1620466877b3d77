"""Control vectors of repeng and of llama.cpp: a GGUF file with a ``direction.{L}`` per layer.

``L`` is a decoder block, counted from 0, and the direction is added to that block's output, the
residual stream. repeng takes it from the same place (``hidden_states[L + 1]``) and writes no
``direction.0`` unless told to (``extract.py``, ``control.py``). llama.cpp adds it to ``l_out`` of
block ``L`` and refuses a file with a ``direction.0``, which is block 0 here (``common.cpp``,
``llama-adapter.cpp``). Its ``cvector-generator`` takes ``direction.{L}`` from block ``L - 1`` but
adds it, as all others, after block ``L``: the place of use is what counts here.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.bounds import MOST_TENSORS, check_memory
from vllm_steer.files.directions import read_layer, stack_directions
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_vector
from vllm_steer.foreign import shown
from vllm_steer.steers import VectorSteer

NAME = "a GGUF control vector"
_ARCHITECTURE = "controlvector"
_MOST_READS = 20_000


def read(path: Path, facts: Facts) -> VectorSteer:
    """Add at the blocks' outputs. Raises ``SteerError`` for a GGUF file of anything else."""
    try:
        reader = _open(path)
        architecture = _text(reader, "general.architecture")
        if architecture != _ARCHITECTURE:
            raise SteerError(
                f"a GGUF file of architecture {shown(architecture)}; expected {_ARCHITECTURE!r}, a "
                "control vector"
            )
        _check_size(reader.tensors, path.stat().st_size)
        _check_apart(reader, path.stat().st_size)
        directions = dict(_direction(tensor) for tensor in reader.tensors)
        found = Facts(base_model=_text(reader, "controlvector.model_hint"))
    except SteerError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise SteerError(f"not a readable GGUF file ({cause(error)})") from error
    vectors, layers = stack_directions(directions)
    return make_vector(vectors, layers, facts.over(found))


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Reads past the end of the file raise, and so do more of them than any vector needs."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            self.reads += 1
            array = super()._get(offset, dtype, count, *rest, **named)
            if array.size != count:
                raise SteerError(f"it claims {count} values at byte {offset}, past its end")
            if self.reads > _MOST_READS:
                raise SteerError("it has more entries than a control vector; is it a model?")
            return array

    return Bounded(path)


def _check_size(tensors: Sequence[Any], file_size: int) -> None:
    """Raise ``SteerError`` before values are copied: a file's tensors may lie over each other."""
    if len(tensors) > MOST_TENSORS:
        raise SteerError(f"it holds {len(tensors)} tensors; a steer at most {MOST_TENSORS}")
    check_memory(sum(int(tensor.n_bytes) for tensor in tensors), file_size, "what it holds")


def _check_apart(reader: Any, file_size: int) -> None:
    """Raise ``SteerError`` for tensors that lie over each other, or elsewhere than they may.

    An offset that is too large wraps around in the library.
    """
    before = int(reader.data_offset)
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        end = start + int(tensor.n_bytes)
        aligned = (start - int(reader.data_offset)) % int(reader.alignment) == 0
        if start < before or end > file_size or not aligned:
            raise SteerError(f"its tensor {shown(tensor.name)} is where none can be")
        before = end


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    if field is None:
        return None
    text = field.contents()
    if not isinstance(text, str):
        raise SteerError(f"{key} is {shown(text)}; expected a text")
    return text


def _direction(tensor: Any) -> tuple[int, torch.Tensor]:
    named = re.fullmatch(r"direction\.(.+)", tensor.name)
    if named is None:
        raise SteerError(f"tensor {shown(tensor.name)}; only direction.1, direction.2 ... may be")
    if not np.issubdtype(tensor.data.dtype, np.floating):
        raise SteerError(f"{tensor.name} is {tensor.tensor_type.name}; expected F32")
    values = tensor.data.astype(tensor.data.dtype.newbyteorder("="))
    return read_layer(named[1]), torch.from_numpy(values)
