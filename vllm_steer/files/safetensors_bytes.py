"""Safetensors files, written: the same bytes for the same tensors and metadata."""

import json
import struct
from collections.abc import Mapping
from typing import IO, Any, Final

import torch
from safetensors.torch import save

from vllm_steer.errors import SteerError
from vllm_steer.foreign import shown

LARGEST_METADATA: Final = 900_000
"""Bytes of a steer's metadata: with the tensors' names it stays below what readers allow."""
_ALIGNED: Final = 8


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata; nothing in the file depends on the process that writes it.

    The library orders tensors by itself but metadata by hashes that are other ones in each process:
    the header is written here with the keys sorted. Offsets in it count from its end.
    """
    # Each tensor in memory of its own: safetensors refuses to write shared memory.
    own = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    written = memoryview(save(own))
    (length,) = struct.unpack("<Q", written[:8])
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    header.update(json.loads(bytes(written[8 : 8 + length])))
    text = _json(header)
    text += b" " * (-len(text) % _ALIGNED)
    file.write(struct.pack("<Q", len(text)) + text)
    file.write(written[8 + length :])


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise ``SteerError`` for metadata that the file cannot hold, or no reader would take."""
    for name, text in metadata.items():
        check_text(name, text)
    size = len(_json(metadata))
    if size > LARGEST_METADATA:
        longest = max(metadata, key=lambda name: len(metadata[name]))
        raise SteerError(
            f"the metadata takes {size} bytes of at most {LARGEST_METADATA}, most of them the "
            f"{longest}; shorten it"
        )


def check_text(name: str, text: Any) -> None:
    """Raise ``SteerError`` for what is no text, or none that UTF-8 has."""
    if not isinstance(text, str):
        raise SteerError(f"{name} is {shown(text)}; expected a text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SteerError(f"{name} {shown(text)} has bytes that are not UTF-8; leave them out")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
