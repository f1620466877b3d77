"""Recognises files that are not steers, so that the error can name what they are."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.foreign import listed

_SAVE: Final = "save it with vllm_steer.save_steer"
_ENDINGS: Final = (".safetensors", ".pt", ".pth", ".bin", ".gguf", ".svec", ".npz")
_MOST_LISTED: Final = 1000

# Where a file begins with several of these, the first one tells.
_BEGINNINGS: Final = (
    (
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
        "torch.save's form before PyTorch 1.6, a pickle that has to be run; load it where you "
        "trust it and save it anew with torch.save",
    ),
    (
        b"\x80",
        "a Python pickle, which has to be run to be read; load it where you trust it and save its "
        "tensors with torch.save or safetensors",
    ),
    (b"\x1f\x8b", "a gzip file; unpack it first (gunzip)"),
    (b"BZh", "a bzip2 file; unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "an xz file; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x93NUMPY", "a single NumPy array (.npy); save it with torch.save or safetensors"),
    (b"\x89HDF", "an HDF5 file; save its tensors with torch.save or safetensors"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself; fetch it (git lfs pull)",
    ),
    (b"\xef\xbb\xbf", "a text with a byte-order mark; save it as UTF-8 without one"),
    (b"\xff\xfe", "a text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "a text in UTF-16; save it as UTF-8"),
    (b"<", "a web page or XML; was a page saved in place of the file?"),
)

_ADAPTERS: Final = (
    (
        ("lora_a", "lora_b", "lora_embedding"),
        "a LoRA adapter; vLLM serves it by itself (--enable-lora --lora-modules)",
    ),
    (("prompt_embeddings", "prefix"), "a prefix- or prompt-tuning adapter, which is no steer"),
    (("model.layers.", "transformer.h.", "lm_head"), "the weights of a model, not a steer"),
)


def refuse_unknown(head: bytes, size: int) -> SteerError:
    """The error for a file of no known format, by its first bytes."""
    if not size:
        return SteerError(f"the file is empty; {_SAVE}")
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return SteerError(what)
    return SteerError(
        "neither a safetensors file nor a PyTorch (.pt), NumPy (.npz), GGUF or JSON (.svec) file; "
        f"{_SAVE}"
    )


def refuse_adapters(names: Iterable[Any]) -> None:
    """Raise ``SteerError`` if tensors' names are those of an adapter or of a model."""
    lowered = [name.lower() for name in names if isinstance(name, str)]
    for parts, what in _ADAPTERS:
        found = [name for name in lowered if any(part in name for part in parts)]
        if found:
            raise SteerError(f"it holds {listed(found, 60)}: {what}")


def no_file(path: Path) -> SteerError:
    """The error for a path that is no plain file."""
    if os.path.isdir(path):
        found = _steers_in(path)
        way_out = f"give one: {listed(found)}" if found else "give a file"
        return SteerError(f"{path}: is a folder; {way_out}")
    if os.path.lexists(path) and not os.path.islink(path):
        return SteerError(f"{path}: is no plain file; give the path of a steer file")
    return SteerError(f"{path}: no such file; give the path of a steer file")


def _steers_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_LISTED), strict=False)]
    except OSError:
        return []
    return sorted(name for name in names if name.endswith(_ENDINGS))
