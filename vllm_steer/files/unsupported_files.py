"""Recognizes files that are not steers, so that the error message can say what they are."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import listed

_SAVE: Final = "save it with vllm_steer.save_steer"
_ENDINGS: Final = (".safetensors", ".pt", ".pth", ".bin", ".gguf", ".svec", ".npz")
_MOST_LISTED: Final = 1000

# The first match counts.
_MAGIC_BYTES: Final = (
    (
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
        "a torch.save file of PyTorch before 1.6, a pickle that executes code when loaded; load it "
        "where you trust it and save it again with torch.save",
    ),
    (
        b"\x80",
        "a Python pickle, which executes code when loaded; load it where you trust it and save its "
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
        "a Git LFS pointer, not the file itself; fetch the file (git lfs pull)",
    ),
    (b"\xef\xbb\xbf", "a text file with a byte-order mark; save it as UTF-8 without one"),
    (b"\xff\xfe", "a text file in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "a text file in UTF-16; save it as UTF-8"),
    (b"<", "a web page or XML; was a web page saved instead of the file?"),
)

_ADAPTERS: Final = (
    (
        ("lora_a", "lora_b", "lora_embedding"),
        "a LoRA adapter, not a steer; serve it with vLLM (--enable-lora --lora-modules)",
    ),
    (("prompt_embeddings", "prefix"), "a prefix-tuning or prompt-tuning adapter, not a steer"),
    (("model.layers.", "transformer.h.", "lm_head"), "the weights of a model, not a steer"),
)


def unknown_format_error(head: bytes, size: int) -> SteerError:
    """The error for a file of unknown format, chosen by its first bytes."""
    if not size:
        return SteerError(f"the file is empty; {_SAVE}")
    for beginning, description in _MAGIC_BYTES:
        if head.startswith(beginning):
            return SteerError(description)
    return SteerError(
        "neither a safetensors file nor a PyTorch (.pt), NumPy (.npz), GGUF or JSON (.svec) file; "
        f"{_SAVE}"
    )


def reject_adapters(names: Iterable[Any]) -> None:
    """Raise ``SteerError`` if the tensor names are those of an adapter or a model."""
    lowered = [name.lower() for name in names if isinstance(name, str)]
    for parts, description in _ADAPTERS:
        matches = [name for name in lowered if any(part in name for part in parts)]
        if matches:
            raise SteerError(f"it contains {listed(matches, 60)}: {description}")


def missing_file_error(path: Path) -> SteerError:
    """The error for a path that is not a regular file."""
    if os.path.isdir(path):
        steer_files = _steer_files_in(path)
        advice = f"give one: {listed(steer_files)}" if steer_files else "give a file"
        return SteerError(f"{path}: is a folder; {advice}")
    if os.path.lexists(path) and not os.path.islink(path):
        return SteerError(f"{path}: is not a regular file; give the path of a steer file")
    return SteerError(f"{path}: does not exist; give the path of a steer file")


def _steer_files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_LISTED), strict=False)]
    except OSError:
        return []
    return sorted(name for name in names if name.endswith(_ENDINGS))
