"""Writes safetensors files reproducibly: equal tensors and metadata give equal bytes."""

import json
import struct
from collections.abc import Mapping
from typing import IO, Any, Final

import torch
from safetensors.torch import save

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import shown

MAX_METADATA_BYTES: Final = 900_000
"""Bytes of a steer's metadata; together with the tensor names it stays below the readers' limit."""
_ALIGNED: Final = 8


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata; the bytes do not depend on the process.

    The safetensors library writes metadata in an order that differs between processes, so the
    header is written here with sorted keys. Its offsets count from the end of the header.
    """
    # Copies: safetensors rejects tensors that share memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    written = memoryview(save(copies))
    (length,) = struct.unpack("<Q", written[:8])
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    header.update(json.loads(bytes(written[8 : 8 + length])))
    text = _json(header)
    text += b" " * (-len(text) % _ALIGNED)
    file.write(struct.pack("<Q", len(text)) + text)
    file.write(written[8 + length :])


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise ``SteerError`` for metadata that is too long for readers or not UTF-8."""
    for name, text in metadata.items():
        check_text(name, text)
    size = len(_json(metadata))
    if size > MAX_METADATA_BYTES:
        longest = max(metadata, key=lambda name: len(metadata[name]))
        raise SteerError(
            f"the metadata has {size} bytes; at most {MAX_METADATA_BYTES} are allowed; shorten the "
            f"longest entry, {longest}"
        )


def check_text(name: str, text: Any) -> None:
    """Raise ``SteerError`` for a value that is not a string of valid Unicode."""
    if not isinstance(text, str):
        raise SteerError(f"{name} is {shown(text)}; expected a text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SteerError(
            f"{name} {shown(text)} has characters that are not valid Unicode; remove them"
        )


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
