"""Identifies the format of a file by its content, never by its name."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files import (
    concept_guidance,
    control_vector,
    dac,
    lm_steer_checkpoint,
    npz_file,
    plain_tensors,
    sae,
    safetensors_file,
    steering_vectors,
    strange,
    svec,
    torch_file,
)
from vllm_steer.files.archive import Archive, open_archive
from vllm_steer.files.source import Source
from vllm_steer.files.steer_file import FORMAT, read_steer_file
from vllm_steer.foreign import listed

_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
_GGUF = b"GGUF"
_PICKLES = (lm_steer_checkpoint.CLASSES, steering_vectors.CLASSES)


def identify(path: Path) -> Source:
    """What a file is and how to read it. Raises ``SteerError`` for one that holds no steer."""
    if safetensors_file.is_safetensors(path):
        return _of_safetensors(path)
    with path.open("rb") as file:
        head, size = file.read(64), file.seek(0, 2)
    if head.startswith(_ZIPS):
        return _of_archive(path)
    if head.startswith(_GGUF):
        return Source(control_vector.NAME, "vector", partial(control_vector.read, path))
    if head.lstrip().startswith(b"{"):
        return Source(svec.NAME, "vector", partial(svec.read, path))
    raise strange.refuse_unknown(head, size)


def _of_safetensors(path: Path) -> Source:
    metadata, shapes = safetensors_file.read_header(path)
    if metadata.get("format") != FORMAT:
        if concept_guidance.fits(shapes):
            read = partial(concept_guidance.read, path)
            return Source(concept_guidance.NAME, "vector", read, uses=("orient",))
        if (decoder := sae.decoder_in(shapes)) is not None:
            return _of_sae(sae.Decoder(path, decoder, shapes, safetensors_file.read_row))
        strange.refuse_adapters(shapes)
    return Source("a vllm-steer file", None, partial(read_steer_file, path, metadata))


def _of_archive(path: Path) -> Source:
    with open_archive(path) as archive:
        if torch_file.is_torch(archive.records):
            return _of_torch(archive)
        return _of_npz(path, archive)


def _of_npz(path: Path, archive: Archive) -> Source:
    names = npz_file.arrays_in(archive.records)
    if not names:
        raise SteerError(
            f"a zip archive of {listed(archive.records)}; expected what torch.save or NumPy's "
            "savez writes; unpack it, and give the steer file in it"
        )
    decoder = sae.decoder_in(names)
    if decoder is None:
        raise SteerError(
            f"a NumPy archive of {listed(sorted(names))}; expected the weights of an SAE, with a "
            "tensor W_dec"
        )
    wanted = {decoder, sae.BIAS} & set(names)
    shapes = {name: npz_file.read_shape(archive, name) for name in wanted}
    return _of_sae(sae.Decoder(path, decoder, shapes, npz_file.read_row))


def _of_sae(decoder: sae.Decoder) -> Source:
    return Source(sae.NAME, "vector", partial(sae.read, decoder), uses=("feature", "hook"))


def _of_torch(archive: Archive) -> Source:
    pickle = torch_file.read_names(archive)
    classes = next((c for c in _PICKLES if pickle.names & set(c)), {})
    loaded = torch_file.load(pickle, classes)
    if isinstance(loaded, torch.Tensor):
        return _of_tensor(loaded)
    if isinstance(loaded, list | tuple):
        name, read = lm_steer_checkpoint.NAME, lm_steer_checkpoint.read
        return Source(name, "lm_steer", partial(read, loaded))
    if steering_vectors.fits(loaded):
        return Source(steering_vectors.NAME, "vector", partial(steering_vectors.read, loaded))
    if isinstance(loaded, dict) and any(isinstance(key, int) for key in loaded):
        return Source(
            plain_tensors.BY_LAYER, "vector", partial(plain_tensors.read_by_layer, loaded)
        )
    if isinstance(loaded, dict):
        strange.refuse_adapters(loaded)
    raise SteerError(_unknown(loaded))


def _of_tensor(tensor: torch.Tensor) -> Source:
    if tensor.ndim == dac.DIMENSIONS:
        return Source(dac.NAME, "delta", partial(dac.read, tensor))
    return Source(plain_tensors.NAME, None, partial(plain_tensors.read_tensor, tensor), ("rows",))


def _unknown(loaded: Any) -> str:
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        found = f"a dict with the keys {listed(loaded, none='(none)')}"
    return (
        f"it holds {found}; expected a tensor, a dict of tensors by 0-based layer (integers), a "
        "vector of the steering-vectors library, or an LM-Steer checkpoint, a list of the training "
        "arguments, a dict of projectors and the step"
    )
