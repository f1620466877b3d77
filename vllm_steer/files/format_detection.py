"""Detects the format of a file from its content, never from its name.

A folder is read only if it is one of pyreft, which saves a file per layer.
"""

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
    pyreft,
    pyreft_folder,
    sae,
    sae_feature,
    safetensors_file,
    steering_vectors,
    svec,
    torch_file,
    unsupported_files,
)
from vllm_steer.files.archive import Archive, open_archive
from vllm_steer.files.format_reader import FormatReader
from vllm_steer.files.steer_file import FORMAT, read_steer_file
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import Steer
from vllm_steer.untrusted_text import listed

_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
_GGUF = b"GGUF"
_PICKLES = (lm_steer_checkpoint.CLASSES, steering_vectors.CLASSES)


def detect_format(path: Path) -> FormatReader:
    """The reader for a file, or a folder of pyreft. Raises ``SteerError`` if it is no steer."""
    if pyreft_folder.is_folder(path):
        read_folder = partial(pyreft_folder.read, path)
        return FormatReader(pyreft_folder.NAME, ("low_rank",), read_folder)
    if safetensors_file.is_safetensors(path):
        return _of_safetensors(path)
    with path.open("rb") as file:
        head, size = file.read(64), file.seek(0, 2)
    if head.startswith(_ZIPS):
        return _of_archive(path)
    if head.startswith(_GGUF):
        return FormatReader(control_vector.NAME, ("vector",), partial(control_vector.read, path))
    if head.lstrip().startswith(b"{"):
        read = partial(svec.read, path)
        return FormatReader(svec.NAME, ("vector",), read, condition_defaults=svec.CONDITION)
    raise unsupported_files.unknown_format_error(head, size)


def _of_safetensors(path: Path) -> FormatReader:
    metadata, shapes = safetensors_file.read_header(path)
    if metadata.get("format") != FORMAT:
        if concept_guidance.is_concept_guidance(shapes):
            read = partial(concept_guidance.read, path)
            return FormatReader(concept_guidance.NAME, ("vector",), read, ("orient",))
        if (decoder := sae.decoder_name(shapes)) is not None:
            return _of_sae(sae.Weights(path, decoder, shapes, frozenset(shapes), safetensors_file))
        unsupported_files.reject_adapters(shapes)
    return FormatReader("a vllm-steer file", (), partial(read_steer_file, path, metadata))


def _of_archive(path: Path) -> FormatReader:
    with open_archive(path) as archive:
        if torch_file.is_torch(archive.records):
            return _of_torch(archive)
        return _of_npz(path, archive)


def _of_npz(path: Path, archive: Archive) -> FormatReader:
    names = npz_file.array_names(archive.records)
    if not names:
        raise SteerError(
            f"a zip archive with {listed(archive.records)}; expected an archive of torch.save or "
            "numpy.savez; unpack it and give the steer file in it"
        )
    decoder = sae.decoder_name(names)
    if decoder is None:
        raise SteerError(
            f"a NumPy archive with {listed(sorted(names))}; expected SAE weights with a tensor "
            "W_dec"
        )
    names_to_read = {decoder, sae.BIAS} & set(names)
    shapes = {name: npz_file.read_shape(archive, name) for name in names_to_read}
    return _of_sae(sae.Weights(path, decoder, shapes, frozenset(names), npz_file))


def _of_sae(weights: sae.Weights) -> FormatReader:
    def read(overrides: SteerMetadata) -> Steer:
        if overrides.kind == "sae":
            return sae_feature.read(weights, overrides)
        return sae.read(weights, overrides)

    return FormatReader(sae.NAME, ("vector", "sae"), read, sae.KEYS)


def _of_torch(archive: Archive) -> FormatReader:
    pickle = torch_file.read_names(archive)
    classes = next((c for c in _PICKLES if pickle.names & set(c)), {})
    loaded = torch_file.load(pickle, classes)
    if isinstance(loaded, torch.Tensor):
        return _of_tensor(loaded)
    if isinstance(loaded, list | tuple):
        name, read = lm_steer_checkpoint.NAME, lm_steer_checkpoint.read
        return FormatReader(name, ("lm_steer",), partial(read, loaded))
    if steering_vectors.is_steering_vector(loaded):
        read_fields = partial(steering_vectors.read, loaded)
        return FormatReader(steering_vectors.NAME, ("vector",), read_fields)
    if pyreft.is_intervention(loaded):
        return FormatReader(pyreft.NAME, ("low_rank",), partial(pyreft.read, loaded))
    if isinstance(loaded, dict) and any(isinstance(key, int) for key in loaded):
        return FormatReader(
            plain_tensors.BY_LAYER, ("vector",), partial(plain_tensors.read_by_layer, loaded)
        )
    if isinstance(loaded, dict):
        unsupported_files.reject_adapters(loaded)
    raise SteerError(_unknown_content(loaded))


def _of_tensor(tensor: torch.Tensor) -> FormatReader:
    if tensor.ndim == dac.DIMENSIONS:
        return FormatReader(dac.NAME, ("delta",), partial(dac.read, tensor))
    read = partial(plain_tensors.read_tensor, tensor)
    return FormatReader(plain_tensors.NAME, ("vector", "delta"), read, ("rows",))


def _unknown_content(loaded: Any) -> str:
    description = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        description = f"a dict with the keys {listed(loaded, none='(none)')}"
    return (
        f"its content is {description}; expected a tensor, a dict of tensors by 0-based layer "
        "(integers), a "
        "vector of the steering-vectors library, an intervention of pyreft, or an LM-Steer "
        "checkpoint, a list of the training arguments, a dict of projectors and the step"
    )
